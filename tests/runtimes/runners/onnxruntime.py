"""ONNX Runtime, on the CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.runtimes.runners.runtime import Run, Runtime


def load(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return partial(session.run, None)


RUNTIME = Runtime(
    "ONNX Runtime, CPU",
    "onnxruntime",
    "onnxruntime",
    load,
    preset="onnxruntime",
    plans=("default", "npu", "products=linear", "products=sums", "directions=stacked", "layers=wavefront"),
)
