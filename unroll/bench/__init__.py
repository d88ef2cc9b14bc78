"""Measurements, advice and pictures of `unroll bench`."""

from unroll.bench.contenders import CONTENDERS
from unroll.bench.results import Measurements, Row
from unroll.bench.run import benchmark
from unroll.bench.subjects import Subject

__all__ = ["CONTENDERS", "Measurements", "Row", "Subject", "benchmark"]
