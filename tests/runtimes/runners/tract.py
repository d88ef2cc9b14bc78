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
    others={
        "native": "`sequence_lens` and open sizes are refused, and the first LSTM fails when it runs",
        "default": "a `Split` of `[T * B, n]` with an open batch is refused",
    },
    missing={
        "packed": Missing(
            "of a `Slice` up to the longest length its Python package loses the symbol of the size",
            "`pad_packed_sequence(..., total_length=steps)`, which was right, or a `Gather` of a `Range`, too",
        )
    },
)
