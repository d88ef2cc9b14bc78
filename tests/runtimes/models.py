"""The eleven models that every runtime is given, native and unrolled, and their results in float64."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from tests.cases import Case
from tests.runtimes.runners.runtime import Inputs
from unroll import Plan, export_onnx, packing, streaming, unroll

STEPS, BATCH = 12, 2

NATIVE = "native"
"""The plan of files that keep their recurrent operators"""


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

    packed: bool = False
    """The second argument are lengths"""
    streamed: bool = False
    """States are arguments and results"""

    def export(self, path: Path, plan: str) -> Path:
        """Write an unrolled file, of ONNX or of an exported program; `native` keeps the recurrent operators."""
        if path.suffix == ".pt2":
            self._export_program(path, plan)
        elif plan == NATIVE:
            self._export_native(path)
        else:
            model, args = self.make()
            if self.streamed:
                args = args[:1]
                model = streaming(Output(model.layer).eval(), args, check=False).eval()
            export_onnx(model, args, path, plan=self._plan(plan), dynamic_shapes=self.shapes, check=False)
        return path

    def _plan(self, plan: str) -> Plan:
        return replace(Plan.of(plan), time=self.time or "explicit")

    def _export_program(self, path: Path, plan: str) -> None:
        model, args = self.make()
        # torch exports neither packed batches nor an open length of the layer as it is.
        early = plan != NATIVE and (self.packed or self.time is not None)
        if early:
            model = unroll(model, plan=self._plan(plan))
        with packing(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, args, dynamic_shapes=self.shapes, strict=True)
        if not early and plan != NATIVE:
            program = unroll(program, plan=self._plan(plan))
        torch.export.save(program, path)

    def _export_native(self, path: Path) -> None:
        """Write a file by torch's older exporter, which always keeps recurrent operators."""
        model, args = self.make()
        names = [f"input{number}" for number in range(len(args))]
        axes = {names[0]: {axis: str(size) for axis, size in self.shapes["input"].items()}} if self.shapes else None
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model, args, str(path), dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes
            )

    def runs(self) -> list[tuple[tuple[Tensor, ...], list[np.ndarray]]]:
        """Return arguments, and the results for them in float64."""
        model, args = self.make()
        given = [args, _drawn((*self.other, args[0].shape[-1]))] if self.other else [args]
        model = model.double()
        with torch.no_grad():
            results = [model(*(a.double() if a.is_floating_point() else a for a in several)) for several in given]
        return [
            (several, [r.numpy() for r in (found if isinstance(found, tuple) else (found,))])
            for several, found in zip(given, results, strict=True)
        ]

    def feeds(self, path: Path) -> list[tuple[Inputs, list[np.ndarray]]]:
        """Return the same for the inputs of a file."""
        given = self.runs()
        names = [str(number) for number in range(len(given[0][0]))]
        if path.suffix == ".onnx":
            names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
        return [({n: a.numpy() for n, a in zip(names, args, strict=True)}, found) for args, found in given]


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
    return Plain(model.rnn).eval(), (x, *_drawn(*[(1, BATCH, 5)] * 2))


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
    Model("packed", partial(_case, Case("LSTM", steps=STEPS, batch=BATCH, form="packed")), packed=True),
    Model("streamed", _streamed, streamed=True),
    Model(
        "open length",
        partial(_case, Case("LSTM", steps=STEPS, batch=BATCH)),
        {"input": {0: Dim("T", min=2, max=64)}},
        (7, BATCH),
        4,
    ),
    Model(
        "open batch",
        partial(_case, Case("LSTM", steps=STEPS, batch=BATCH)),
        {"input": {1: Dim("B", min=2, max=64)}},
        (STEPS, 5),
    ),
]
"""One recurrent layer each of 6 features and 5 hidden, 12 steps, a batch of 2, unless the name says otherwise"""
