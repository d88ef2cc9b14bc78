"""MNN, by its converter of ONNX files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Run, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    converted = path.with_suffix(".mnn")
    options = ["", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(converted), "--bizCode", "x"]
    command = f"import _tools; _tools.mnnconvert({options!r})"  # the command would try to install a logger
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, timeout=120)
    return converted


def load(path: Path) -> Run:
    import MNN
    import onnx

    graph = onnx.load(path.with_suffix(".onnx"), load_external_data=False).graph
    outputs = [value.name for value in graph.output]
    net = MNN.nn.load_module_from_file(str(path), [value.name for value in graph.input], outputs)

    def run(inputs: Inputs) -> list[np.ndarray]:
        narrowed = [v.astype(np.int32) if v.dtype == np.int64 else v for v in inputs.values()]
        given = [MNN.expr.const(v, list(v.shape), MNN.expr.NCHW, _kind(MNN, v)) for v in narrowed]
        return [np.array(value.read()) for value in net.forward(given)]

    return run


def _kind(mnn: Any, value: np.ndarray) -> Any:
    return {"f": mnn.expr.float, "i": mnn.expr.int, "b": mnn.expr.int}[value.dtype.kind]


RUNTIME = Runtime(
    "MNN",
    "MNN",
    "MNN",
    load,
    convert,
    count=None,
    preset="mnn",
    plans=("default",),
    others={
        "native": "`sequence_lens` is ignored, and of an open length no results come",
        "default": "there is no `Scan`",
    },
)
