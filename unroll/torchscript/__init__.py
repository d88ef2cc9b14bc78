"""Recurrent operators of TorchScript."""
