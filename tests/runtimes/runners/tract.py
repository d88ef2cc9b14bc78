"""tract."""

from __future__ import annotations

from pathlib import Path

from tests.runtimes.runners.runtime import Missing, Run, Runtime


def load(path: Path) -> Run:
    import tract

    runnable = tract.onnx().load(str(path)).into_model().into_runnable()
    return lambda inputs: [value.to_numpy() for value in runnable.run(list(inputs.values()))]


RUNTIME = Runtime(
    "tract",
    "tract",
    "tract",
    load,
    preset="tract",
    plans=("default",),
    missing={
        "packed": Missing(
            "its Python package loses a symbol of its own, of a size that is open",
            "the padded batch without lengths, whose valid steps are the same in layers that run forwards",
        )
    },
)
