"""Recurrent layers as explicit unrolled operations."""

from unroll.compare import Report, compare
from unroll.dynamo import compile
from unroll.graphs import trace
from unroll.modules import Unrolled
from unroll.onnx.export import Export, export_onnx
from unroll.plan import Plan
from unroll.programs import decompositions
from unroll.recurrence import Problem, UnrollError
from unroll.unrolling import unroll

__all__ = [
    "Export",
    "Plan",
    "Problem",
    "Report",
    "UnrollError",
    "Unrolled",
    "compare",
    "compile",
    "decompositions",
    "export_onnx",
    "trace",
    "unroll",
]
