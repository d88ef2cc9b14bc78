"""Recurrent layers of modules."""
