"""LiteRT, by litert-torch, from exported programs."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Missing, Run, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    import litert_torch
    import torch

    program = torch.export.load(path)
    sizes = [list(zip(*(inputs[name].shape for inputs in given), strict=True)) for name in given[0]]
    model = litert_torch.convert(
        program.module(),
        tuple(torch.from_numpy(value) for value in given[0].values()),
        # Sizes that are not the same in all are open.
        dynamic_shapes=[
            {axis: torch.export.Dim(f"size{axis}", min=2, max=64) for axis, s in enumerate(s) if len(set(s)) > 1}
            for s in sizes
        ],
    )
    written = path.with_suffix(".tflite")
    model.export(str(written))
    return written


def load(path: Path) -> Run:
    import litert_torch

    model = litert_torch.load(str(path))

    def run(inputs: Inputs) -> list[np.ndarray]:
        found = model(*inputs.values())
        return list(found) if isinstance(found, tuple | list) else [found]

    return run


RUNTIME = Runtime(
    "LiteRT, by litert-torch",
    "litert_torch",
    "litert-torch",
    load,
    convert,
    count=None,
    suffix=".pt2",
    missing={
        "packed": Missing(
            "it has no assertions, here those of lengths, and no size that a value decides, here the longest length",
            "the padded batch without lengths, whose valid steps are the same in layers that run forwards",
        ),
        "open length": Missing("it fails at `scan`, the loop of programs", "a program for each length"),
        "open batch": Missing("it computes a wrong size for a `view` with -1", "a program for each size"),
    },
    apart=True,
)
