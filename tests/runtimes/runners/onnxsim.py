"""onnxsim, whose file ONNX Runtime runs."""

from __future__ import annotations

from pathlib import Path

from tests.runtimes.runners.onnxruntime import load
from tests.runtimes.runners.runtime import Inputs, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    import onnx
    import onnxsim

    simplified, _ = onnxsim.simplify(onnx.load(path))
    onnx.save(simplified, path.with_name(f"{path.stem}.sim.onnx"))
    return path.with_name(f"{path.stem}.sim.onnx")


RUNTIME = Runtime("onnxsim", "onnxsim", "onnxsim", load, convert, plans=("npu", "webgpu", "tract", "mnn"))
