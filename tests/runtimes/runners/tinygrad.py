"""tinygrad, by its runner of ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Missing, Run, Runtime


def load(path: Path) -> Run:
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    runner = OnnxRunner(str(path))

    def run(inputs: Inputs) -> list[np.ndarray]:
        found = runner({name: Tensor(value) for name, value in inputs.items()})
        return [value.numpy() for value in found.values()]

    return run


RUNTIME = Runtime(
    "tinygrad",
    "tinygrad",
    "tinygrad",
    load,
    missing={
        "open length": Missing("there is no `Scan`, and no `Loop`, as `mnn` writes it", "a file for each length"),
        "open batch": Missing(
            "an open size is that of the first run from then on, in the forms `tract` and `npu` too",
            "loading the file for each size",
        ),
    },
    others={"native": "no recurrent operator is known"},
    apart=True,
)
