"""The public names of the package."""

from unroll.bench.results import Measurements
from unroll.bench.run import benchmark
from unroll.comparison import compare
from unroll.core.errors import Problem, UnrollError, UnrollWarning
from unroll.core.plan import Plan
from unroll.drawing.pictures import draw
from unroll.export.exporting import Export, export_onnx
from unroll.export.inspecting import inspect
from unroll.export.inspection import Inspection
from unroll.graphs.dynamo import compile
from unroll.graphs.passes import UnrollPass
from unroll.graphs.programs import decompositions
from unroll.graphs.tracing import trace
from unroll.modules.layers import Unrolled
from unroll.modules.recording import record
from unroll.packed.contexts import packing
from unroll.reports import Report
from unroll.streams.modules import Streaming
from unroll.streams.stateful import streaming
from unroll.streams.stream import Stream
from unroll.targets.checking import Verdict, check
from unroll.unrolling import unroll

__all__ = [
    "Export",
    "Inspection",
    "Measurements",
    "Plan",
    "Problem",
    "Report",
    "Stream",
    "Streaming",
    "UnrollError",
    "UnrollPass",
    "UnrollWarning",
    "Unrolled",
    "Verdict",
    "benchmark",
    "check",
    "compare",
    "compile",
    "decompositions",
    "draw",
    "export_onnx",
    "inspect",
    "packing",
    "record",
    "streaming",
    "trace",
    "unroll",
]
