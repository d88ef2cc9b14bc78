"""Recurrent layers as explicit unrolled operations."""

from unroll.bench.benchmark import benchmark
from unroll.compare import Report, compare
from unroll.contracts.checking import check
from unroll.dynamo import compile
from unroll.graphs import trace
from unroll.modules import Unrolled
from unroll.onnx.export import Export, export_onnx
from unroll.packing import packing
from unroll.plan import Plan
from unroll.programs import decompositions
from unroll.recurrence import Problem, UnrollError
from unroll.streaming import Stream, Streaming, streaming
from unroll.unrolling import unroll

__all__ = [
    "Export",
    "Plan",
    "Problem",
    "Report",
    "Stream",
    "Streaming",
    "UnrollError",
    "Unrolled",
    "benchmark",
    "check",
    "compare",
    "compile",
    "decompositions",
    "export_onnx",
    "packing",
    "streaming",
    "trace",
    "unroll",
]
