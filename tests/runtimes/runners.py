"""How each runtime runs an ONNX file: `run(path, inputs) -> results`, inputs by name, results in the file's order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

Inputs = dict[str, np.ndarray]
Runner = Callable[[Path, Inputs], list[np.ndarray]]


def onnxruntime(path: Path, inputs: Inputs) -> list[np.ndarray]:
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


def reference(path: Path, inputs: Inputs) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(onnx.load(path)).run(None, inputs)


def openvino(path: Path, inputs: Inputs) -> list[np.ndarray]:
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled(inputs)
    return [found[output] for output in compiled.outputs]


def tract(path: Path, inputs: Inputs) -> list[np.ndarray]:
    import tract

    runnable = tract.onnx().load(str(path)).into_model().into_runnable()
    return [value.to_numpy() for value in runnable.run(list(inputs.values()))]


def opencv(path: Path, inputs: Inputs) -> list[np.ndarray]:
    import cv2

    net = cv2.dnn.readNetFromONNX(str(path), engine=cv2.dnn.ENGINE_NEW)
    for name, value in inputs.items():
        net.setInput(value, name)
    names = [value.name for value in onnx.load(path).graph.output]
    return [np.asarray(found) for found in net.forward(names)]


def mnn(path: Path, inputs: Inputs) -> list[np.ndarray]:
    import MNN

    converted = path.with_suffix(".mnn")
    options = ["", "-f", "ONNX", "--modelFile", str(path), "--MNNModel", str(converted), "--bizCode", "x"]
    convert = f"import _tools; _tools.mnnconvert({options!r})"  # the command would try to install a logger
    subprocess.run([sys.executable, "-c", convert], check=True, capture_output=True, timeout=120)
    graph = onnx.load(path).graph
    names, outputs = list(inputs), [value.name for value in graph.output]
    net = MNN.nn.load_module_from_file(str(converted), names, outputs)
    narrowed = [v.astype(np.int32) if v.dtype == np.int64 else v for v in inputs.values()]
    given = [MNN.expr.const(v, list(v.shape), MNN.expr.NCHW, _kind(MNN, v)) for v in narrowed]
    return [np.array(value.read()) for value in net.forward(given)]


def _kind(mnn: Any, value: np.ndarray) -> Any:
    return {"f": mnn.expr.float, "i": mnn.expr.int, "b": mnn.expr.int}[value.dtype.kind]


RUNNERS: dict[str, Runner] = {
    "onnxruntime": onnxruntime,
    "reference": reference,
    "openvino": openvino,
    "tract": tract,
    "opencv": opencv,
    "mnn": mnn,
}
