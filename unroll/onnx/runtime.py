"""ONNX files loaded into ONNX Runtime."""

from __future__ import annotations

import os
from typing import Any

from unroll.core.errors import Problem, UnrollError


def session(path: str | os.PathLike[str], name: str | os.PathLike[str]) -> Any:
    """Load a file into ONNX Runtime, on the CPU and for one thread; messages call it `name`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        # ONNX Runtime 1.31 crashes in that optimization, of convolutions, where a float16 file has an open batch.
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
        )
    except Exception as error:
        if not os.path.exists(path):
            finding, fix = "cannot be read (No such file or directory)", "give the path of an ONNX file"
        else:
            finding, fix = f"is refused by ONNX Runtime ({first_line(error)})", _fix(str(error))
        raise UnrollError(Problem(os.fspath(name), finding, fix)) from error


# By a part of what ONNX Runtime says: what to do.
FIXES = {
    "NOT_IMPLEMENTED": "export in float32, or pass check=False for another runtime",
    "under development": "ask for an older opset_version, or pass check=False for another runtime",
    "Unsupported model IR version": "install a newer ONNX Runtime, or write the file for an older version",
    "INVALID_PROTOBUF": "give the path of an ONNX file",
    "ShapeInferenceError": "torch's exporter wrote that node if it is no step of a layer: change the operation",
}


def _fix(reason: str) -> str:
    return next((fix for part, fix in FIXES.items() if part in reason), "report this model")


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
