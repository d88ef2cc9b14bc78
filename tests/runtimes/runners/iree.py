"""IREE, by its importer of ONNX files, compiled for the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Missing, Run, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    imported, compiled = path.with_suffix(".mlir"), path.with_suffix(".vmfb")
    tools = Path(sys.executable).parent
    target = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu"]
    for command in (
        [tools / "iree-import-onnx", path, "-o", imported, "--opset-version", "17"],
        [tools / "iree-compile", imported, "-o", compiled, *target, "--iree-llvmcpu-target-cpu=host"],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=200)
    return compiled


def load(path: Path) -> Run:
    import iree.runtime

    module = iree.runtime.load_vm_flatbuffer_file(str(path), driver="local-sync")
    name = next(name for name in module.vm_module.function_names if not name.startswith("__") and "$" not in name)

    def run(inputs: Inputs) -> list[np.ndarray]:
        found = module[name](*inputs.values())
        return [np.asarray(value) for value in (found if isinstance(found, tuple | list) else [found])]

    return run


RUNTIME = Runtime(
    "IREE, CPU",
    "iree",
    "iree-base-compiler",
    load,
    convert,
    count=None,
    missing={
        "open length": Missing(
            "`iree-compile` ends in a fault at a `Scan`, and refuses a `Loop`, as `mnn` writes it",
            "a file for each length",
        )
    },
    others={"native": "`sequence_lens` is ignored, and a `GRU` of both directions refused"},
    apart=True,
)
