"""What `unroll bench` measures, says and draws."""

from unroll.bench.benchmark import benchmark
from unroll.bench.contenders import CONTENDERS
from unroll.bench.results import Measurements, Row
from unroll.bench.subjects import Subject

__all__ = ["CONTENDERS", "Measurements", "Row", "Subject", "benchmark"]
