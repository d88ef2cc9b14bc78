"""What recurrent layers a model has, and what unrolling would make of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir
from torch import nn
from torch.export import ExportedProgram

from unroll import trees
from unroll.cells import ONNX_CELLS
from unroll.onnx.capture import capture
from unroll.onnx.models import read_sites, unroll_ir
from unroll.onnx.sites import Site, Steps
from unroll.onnx.translate import quiet, translate
from unroll.plan import Plan
from unroll.recurrence import CELL_MODES, Problem, Recurrence, UnrollError, read_cell, read_layer
from unroll.trees import Where


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


def inspect_module(
    model: nn.Module | ExportedProgram,
    args: Any,
    options: Mapping[str, Any] | None = None,
    *,
    where: Where = None,
    plan: Plan | None = None,
) -> Inspection:
    """The layers of a PyTorch model, as they would go to ONNX; without arguments, only what the modules tell.

    Args:
        options: keyword arguments of `export_onnx`: `kwargs`, `dynamic_shapes` and `rules` are read.
    """
    given = options or {}
    if args is None and isinstance(model, nn.Module):
        found = trees.find(model, where, given.get("rules"))
        return Inspection(tuple(_told(entry.names[0], entry.layer) for entry in found))
    with quiet():
        chosen = {key: given.get(key) for key in ("dynamic_shapes", "rules")}
        program = capture(model, args or (), given.get("kwargs"), where=where, **chosen)
        return inspect_model(translate(program, None, None, None, None), plan=plan)


def _told(name: str, layer: Any) -> Layer:
    """What a module tells of itself."""
    mode = next((mode for kind, mode in CELL_MODES.items() if isinstance(layer, kind)), None)
    recurrence = read_cell(layer, mode) if mode else read_layer(layer)
    return _described(recurrence, name, None, sum(p.numel() for p in layer.parameters()))


def _described(recurrence: Recurrence, name: str, steps: int | None, parameters: int | None, **rest: Any) -> Layer:
    kind = "GRU" if recurrence.mode in ONNX_CELLS else recurrence.mode
    return Layer(
        name,
        f"{kind} cell" if recurrence.is_cell else kind,
        recurrence.input_size,
        recurrence.hidden_size,
        recurrence.num_layers,
        len(recurrence.directions),
        1 if recurrence.is_cell else steps,
        parameters,
        **rest,
    )


def _layer(site: Site, nodes: Iterable[ir.Node]) -> Layer:
    made = [node for node in nodes if (node.name or "").startswith(f"{site.name}.")]
    shapes = [site.shape(value) for value in site.parameters if value is not None]
    known = [math.prod(n for n in shape if n is not None) for shape in shapes if shape and None not in shape]
    parameters = sum(known) if len(known) == len(shapes) else None
    size = sum(map(_bytes, made))
    return _described(site.recurrence, site.name, site.steps, parameters, nodes=len(made), size=size)


def _bytes(node: ir.Node) -> int:
    """Of a node in a file, without graphs in it, whose nodes are counted themselves."""
    held = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inside = sum(ir.to_proto(inner).ByteSize() for a in held for inner in a.as_graph())
    return ir.to_proto(node).ByteSize() - inside
