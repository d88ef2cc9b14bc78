"""OpenVINO, on the CPU, in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Run, Runtime


def load(path: Path) -> Run:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Inputs) -> list[np.ndarray]:
        found = compiled(inputs)
        return [found[output] for output in compiled.outputs]

    return run


RUNTIME = Runtime(
    "OpenVINO, CPU",
    "openvino",
    "openvino",
    load,
    preset="openvino",
    plans=("products=sums", "directions=stacked"),
)
