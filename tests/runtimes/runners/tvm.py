"""TVM, by its Relax importer of ONNX files, compiled for the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Missing, Run, Runtime


def load(path: Path) -> Run:
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    compiled = tvm.compile(from_onnx(onnx.load(path)), target="llvm")
    machine = relax.VirtualMachine(compiled, tvm.cpu())

    def run(inputs: Inputs) -> list[np.ndarray]:
        found = machine["main"](*(tvm.runtime.tensor(value) for value in inputs.values()))
        return [value.numpy() for value in ([found] if isinstance(found, tvm.runtime.Tensor) else found)]

    return run


RUNTIME = Runtime(
    "TVM",
    "tvm",
    "apache-tvm",
    load,
    missing={"open length": Missing("there is no `Scan`, and no `Loop`, as `mnn` writes it", "a file for each length")},
    others={"native": "no recurrent operator is known"},
    apart=True,
)
