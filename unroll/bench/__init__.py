"""Measurements, advice and pictures of `unroll bench`."""
