"""Packed sequences with their padding, for graphs."""
