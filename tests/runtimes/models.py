"""The eleven models that every runtime is given, native and unrolled, and how its results are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.cases import Case
from unroll import Plan, Streaming, export_onnx, streaming

STEPS, BATCH = 12, 2


class Recognizer(nn.Module):
    """A convolution, a bidirectional LSTM over its columns, and a linear head, as in text recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, (6, 3), padding=(0, 1))
        self.lstm = nn.LSTM(4, 5, bidirectional=True)
        self.head = nn.Linear(10, 7)

    def forward(self, image: Tensor) -> Tensor:
        columns = torch.relu(self.convolution(image)).squeeze(2)  # [B, 4, T]
        return self.head(self.lstm(columns.permute(2, 0, 1))[0])


@dataclass(frozen=True)
class Model:
    """A model, example arguments, and what may be of another size when it runs."""

    name: str
    make: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]
    shapes: dict[str, dict[int, Dim]] | None = None
    other: tuple[int, int] | None = None
    """Steps and batch of a second run, where a size is open"""
    time: int | None = None
    """Steps in a block, where the number of all is open"""

    def export(self, path: Path, plan: str) -> Path:
        """Write an unrolled file."""
        model, args = self.make()
        chosen = replace(Plan.of(plan), time=self.time or "explicit")
        return Path(export_onnx(model, args, path, plan=chosen, dynamic_shapes=self.shapes, check=False).path)

    def runs(self) -> list[tuple[tuple[Tensor, ...], list[np.ndarray]]]:
        """Return arguments, and the results for them in float64."""
        model, args = self.make()
        given = [args]
        if isinstance(model, Streaming):
            model, given = Plain(model.model.layer), [(*args, *_drawn(*[(1, BATCH, 5)] * 2))]
        if self.other:
            given.append(_drawn((*self.other, args[0].shape[-1])))
        model = model.double()
        with torch.no_grad():
            results = [model(*(a.double() if a.is_floating_point() else a for a in several)) for several in given]
        return [
            (several, [r.numpy() for r in (found if isinstance(found, tuple) else (found,))])
            for several, found in zip(given, results, strict=True)
        ]


class Output(nn.Module):
    """A layer without its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Plain(nn.Module):
    """A layer that takes and returns its states one by one, as the file of a streaming model does."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        output, states = self.layer(x, states)
        return output, *states


def _drawn(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _case(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return case.model().eval(), case.tensors()


def _recognizer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Recognizer().eval(), (torch.randn(BATCH, 1, 6, STEPS),)


def _streamed() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, (x,) = _case(Case("LSTM", steps=STEPS, batch=BATCH))
    return streaming(Output(model.rnn).eval(), x, check=False).eval(), (x,)


def _of(name: str, kind: str, **options: object) -> Model:
    return Model(name, partial(_case, Case(kind, steps=STEPS, batch=BATCH, **options)))


MODELS = [
    _of("LSTM", "LSTM"),
    _of("GRU", "GRU"),
    _of("RNN", "RNN"),
    _of("two layers", "LSTM", num_layers=2),
    _of("both directions", "GRU", bidirectional=True),
    _of("projection", "LSTM", proj_size=2),
    Model("recognizer", _recognizer),
    _of("packed", "LSTM", form="packed"),
    Model("streamed", _streamed),
    Model(
        "open length",
        partial(_case, Case("LSTM", steps=STEPS, batch=BATCH)),
        {"input": {0: Dim("T", min=2)}},
        (7, BATCH),
        4,
    ),
    Model(
        "open batch",
        partial(_case, Case("LSTM", steps=STEPS, batch=BATCH)),
        {"input": {1: Dim("B", min=2)}},
        (STEPS, 5),
    ),
]
"""One recurrent layer each of 6 features and 5 hidden, 12 steps, a batch of 2, unless the name says otherwise"""


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest difference, of the largest value of each result; infinity for other shapes."""
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        if np.size(f) != np.size(e):
            return float("inf")
        scale = np.abs(e).max(initial=0) or 1.0
        worst = max(worst, float(np.abs(np.reshape(f, e.shape) - e).max(initial=0) / scale))
    return worst if np.isfinite(worst) else float("inf")
