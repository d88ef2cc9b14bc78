"""onnxslim, whose file ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

from tests.runtimes.runners.onnxruntime import load
from tests.runtimes.runners.runtime import Inputs, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    import onnx
    import onnxslim

    slim = path.with_name(f"{path.stem}.slim.onnx")
    onnx.save(onnxslim.slim(onnx.load(path)), slim)
    return slim


RUNTIME = Runtime("onnxslim", "onnxslim", "onnxslim", load, convert, plans=("npu", "webgpu", "tract", "mnn"))
