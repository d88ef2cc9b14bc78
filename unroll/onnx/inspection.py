"""What recurrent layers a model has, and what unrolling would make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from unroll.onnx.models import read_sites, unroll_ir
from unroll.onnx.sites import Site, Steps
from unroll.plan import Plan
from unroll.recurrence import Problem, UnrollError
from unroll.trees import Where


@dataclass(frozen=True)
class Layer:
    """A recurrent layer of a model.

    Attributes:
        kind: torch's mode (`LSTM`, `RNN_TANH`), with `cell` for a single step.
        steps: time steps, or None if the model leaves them open.
        parameters: numbers in its weights.
        nodes: that would take its place, those of a loop's body included.
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
    nodes: int
    size: int


@dataclass(frozen=True)
class Inspection:
    """The recurrent layers of a model, and what stands in the way of unrolling it."""

    layers: tuple[Layer, ...]
    problems: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "problems": [problem._asdict() for problem in self.problems],
        }


def inspect_model(model: ir.Model, *, where: Where = None, plan: Plan | None = None, steps: Steps = None) -> Inspection:
    """Unroll a copy of the model, and count."""
    try:
        unrolled = unroll_ir(model.clone(), where=where, plan=plan, steps=steps)
        sites = read_sites(model, where, steps)
    except UnrollError as error:
        return Inspection((), error.problems)
    nodes = list(unrolled.graph.all_nodes())
    return Inspection(tuple(_layer(site, nodes) for site in sites))


def _layer(site: Site, nodes: Iterable[ir.Node]) -> Layer:
    recurrence = site.recurrence
    made = [node for node in nodes if (node.name or "").startswith(f"{site.name}.")]
    shapes = [site.shape(value) for value in site.parameters if value is not None]
    known = [math.prod(n for n in shape if n is not None) for shape in shapes if shape and None not in shape]
    kind = recurrence.mode.replace("GRU_RESETTING_FIRST", "GRU")
    return Layer(
        site.name,
        f"{kind} cell" if recurrence.is_cell else kind,
        recurrence.input_size,
        recurrence.hidden_size,
        recurrence.num_layers,
        len(recurrence.directions),
        site.steps,
        sum(known) if len(known) == len(shapes) else None,
        len(made),
        sum(map(_bytes, made)),
    )


def _bytes(node: ir.Node) -> int:
    """Of a node in a file, without graphs in it, whose nodes are counted themselves."""
    held = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inside = sum(ir.to_proto(inner).ByteSize() for a in held for inner in a.as_graph())
    return ir.to_proto(node).ByteSize() - inside
