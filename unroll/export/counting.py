"""The layers of a model, and what takes the place of each in an ONNX file."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from torch import nn
from torch.export import ExportedProgram

from unroll.comparison import compare
from unroll.core.arguments import as_args
from unroll.core.cells import ONNX_CELLS
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Rules, Steps, Where
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence, read_module
from unroll.export.inputs import in_order
from unroll.export.inspection import Inspection, Layer
from unroll.export.routes import Wanted, captured
from unroll.export.translate import quiet
from unroll.modules.find import find
from unroll.onnx.calls import Call
from unroll.onnx.rewrite import PLAN, from_torch, read_calls, write_calls


def inspect_model(
    model: ir.Model, *, where: Where = None, plan: Plan | str | None = None, steps: Steps = None
) -> Inspection:
    """Unroll a copy of the model, and count; where something stands in the way, tell what the nodes tell."""
    plan = PLAN if plan is None else Plan.of(plan)
    own = model.clone()
    try:
        calls, problems = read_calls(own, where, steps)
        layers = [_read(call) for call in calls]
        if not problems:
            write_calls(own, calls, plan)
            nodes = list(own.graph.all_nodes())
            layers = [_counted(layer, nodes, [other.name for other in layers]) for layer in layers]
    except UnrollError as error:
        return Inspection((), error.problems)
    return Inspection(tuple(layers), tuple(problems))


def inspect_module(
    model: nn.Module | ExportedProgram,
    args: Any,
    options: Mapping[str, Any] | None = None,
    *,
    where: Where = None,
    plan: Plan | str | None = None,
) -> Inspection:
    """Return the layers of a PyTorch model, as they would go to ONNX; without arguments, only what the modules tell.

    Args:
        options: keyword arguments of `export_onnx`: `kwargs`, `dynamic_shapes` and `rules` are read.
    """
    given = dict(options or {})
    rules = given.get("rules")
    if args is None and isinstance(model, nn.Module):
        return Inspection(_told(model, where, rules))
    wanted = Wanted(as_args(args), in_order(model, given.get("kwargs")), given.get("dynamic_shapes"), where, rules)
    try:
        with quiet():
            written = captured(model, wanted, "export").model
            _refuse_kept(model, wanted)
    except UnrollError as error:
        return Inspection(_told(model, where, rules), error.problems)
    return inspect_model(written, where=None if where is None else from_torch, plan=plan)


def _refuse_kept(model: nn.Module | ExportedProgram, wanted: Wanted) -> None:
    """Refuse a module of which a copy gives another result in its second call, for the tensors that it keeps."""
    if not isinstance(model, nn.Module):
        return
    try:
        own = copy.deepcopy(model)
        report = compare(own, own, wanted.args, kwargs=wanted.kwargs, reference=False)
    except Exception:  # of weights without values, say: what is wrong with it shows when it is run
        return
    finding, fix = "keeps a tensor between calls, which a file would lose", "make it an argument and a result"
    Problems(Problem(name, finding, fix) for name in report.kept).check()


def _told(model: nn.Module | ExportedProgram, where: Where, rules: Rules | None) -> tuple[Layer, ...]:
    """Return what the modules tell of themselves, if they can be unrolled; a program has none."""
    try:
        found = find(model, where, rules) if isinstance(model, nn.Module) else []
    except UnrollError:
        return ()
    layers = []
    for entry in found:
        parameters = sum(p.numel() for p in entry.layer.parameters())
        layers.append(_described(read_module(entry.layer), entry.names[0], None, parameters))
    return tuple(layers)


def _described(recurrence: Recurrence, name: str, steps: int | None, parameters: int | None) -> Layer:
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
    )


def _read(call: Call) -> Layer:
    """Return what a node tells of its layer."""
    shapes = [call.shape(value) for value in call.parameters if value is not None]
    known = [math.prod(n for n in shape if n is not None) for shape in shapes if shape and None not in shape]
    parameters = sum(known) if len(known) == len(shapes) else None
    return _described(call.recurrence, call.name, call.steps, parameters)


def _counted(layer: Layer, nodes: Iterable[ir.Node], names: Sequence[str]) -> Layer:
    """Return the layer with the count and bytes of those nodes that took its place; `rnn.1` is none of `rnn`."""
    others = tuple(f"{name}." for name in names if name.startswith(f"{layer.name}."))
    found = [node for node in nodes if (node.name or "").startswith(f"{layer.name}.")]
    made = [node for node in found if not (node.name or "").startswith(others)]
    return replace(layer, nodes=len(made), size=sum(map(_bytes, made)))


def _bytes(node: ir.Node) -> int:
    """Return the bytes of a node in a file, without those of nodes inside it, which are counted themselves."""
    held = [a for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
    inside = sum(ir.to_proto(inner).ByteSize() for a in held for inner in a.as_graph())
    return ir.to_proto(node).ByteSize() - inside
