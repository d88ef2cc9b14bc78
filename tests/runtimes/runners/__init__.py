"""The runtimes, a file each."""

from __future__ import annotations

from tests.runtimes.runners import mnn, onnxruntime, opencv, openvino, reference, tract
from tests.runtimes.runners.runtime import Runtime

RUNTIMES: dict[str, Runtime] = {
    "onnxruntime": onnxruntime.RUNTIME,
    "reference": reference.RUNTIME,
    "openvino": openvino.RUNTIME,
    "tract": tract.RUNTIME,
    "opencv": opencv.RUNTIME,
    "mnn": mnn.RUNTIME,
}
"""By the name of the file"""
