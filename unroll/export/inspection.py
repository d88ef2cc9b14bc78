"""The recurrent layers of a model, and what unrolling would make of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from unroll.core.errors import Problem
from unroll.reports import align


@dataclass(frozen=True)
class Layer:
    """A recurrent layer of a model.

    Attributes:
        kind: torch's mode (`LSTM`, `RNN_TANH`), with `cell` for a single step.
        steps: time steps, or None if the model leaves them open.
        parameters: numbers in its weights, or None if unknown.
        nodes: that would take its place in an ONNX file, those of a loop's body included; None if unknown.
        size: bytes of those nodes in a file, without weights.
    """

    name: str
    kind: str
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    steps: int | None
    parameters: int | None
    nodes: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Inspection:
    """The recurrent layers of a model, and what stands in the way of unrolling it; printing it shows a table."""

    layers: tuple[Layer, ...]
    problems: tuple[Problem, ...] = ()

    def table(self) -> str:
        """Return the layers as a table, with sums if they are several."""
        names = ("layer", "kind", "sizes", "layers", "directions", "steps", "parameters", "nodes", "added kB")
        lines = [names, *map(_cells, self.layers)]
        if len(self.layers) > 1:
            lines.append(("all", *[""] * 5, *_amounts(*map(_sum, zip(*map(_counts, self.layers), strict=True)))))
        return "\n".join(align(lines)) if self.layers else "no recurrent layers"

    def __str__(self) -> str:
        told = [self.table()] if self.layers or not self.problems else []
        return "\n".join([*told, *(f"in the way: {problem}" for problem in self.problems)])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "problems": [problem._asdict() for problem in self.problems],
        }


def _counts(layer: Layer) -> tuple[int | None, int | None, int | None]:
    return layer.parameters, layer.nodes, layer.size


def _sum(counts: Iterable[int | None]) -> int | None:
    """Return the sum of all, if all are known."""
    found = list(counts)
    return None if None in found else sum(count or 0 for count in found)


def _amounts(parameters: int | None, nodes: int | None, size: int | None) -> tuple[str, str, str]:
    kilobytes = "?" if size is None else f"{size / 1000:,.1f}"
    return "?" if parameters is None else f"{parameters:,}", "?" if nodes is None else f"{nodes:,}", kilobytes


def _cells(layer: Layer) -> tuple[str, ...]:
    """Return a line of the table."""
    steps = "any" if layer.steps is None else str(layer.steps)
    sizes = f"{layer.input_size} → {layer.hidden_size}"
    return layer.name, layer.kind, sizes, str(layer.layers), str(layer.directions), steps, *_amounts(*_counts(layer))
