"""OpenCV's module dnn, by its new engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Run, Runtime


def load(path: Path) -> Run:
    import cv2
    import onnx

    net = cv2.dnn.readNetFromONNX(str(path), engine=cv2.dnn.ENGINE_NEW)
    names = [value.name for value in onnx.load(path, load_external_data=False).graph.output]

    def run(inputs: Inputs) -> list[np.ndarray]:
        for name, value in inputs.items():
            net.setInput(value, name)
        return [np.asarray(found) for found in net.forward(names)]

    return run


RUNTIME = Runtime(
    "OpenCV",
    "cv2",
    "opencv-python-headless",
    load,
    preset="opencv",
    plans=("default",),
    others={
        "native": "`sequence_lens` is ignored, and an input of `RNN` not found",
        "default": "there is no `Scan`",
    },
)
