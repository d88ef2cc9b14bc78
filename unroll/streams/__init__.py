"""Recurrent states as inputs and outputs of a whole model."""
