"""Measurements, and what their results are drawn by. A package, as one of this name may be installed."""
