"""Recurrent calls of FX graphs, exported programs and `torch.compile`."""
