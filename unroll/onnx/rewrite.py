"""The pass on ONNX models: plain operators where recurrent nodes were."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from unroll.core.errors import Problem, Problems, UnrollError, refusing
from unroll.core.forms import FORMS
from unroll.core.layout import Layout
from unroll.core.limits import check_written, limit
from unroll.core.options import Steps, Where, chooses, unknown_names, unknown_steps
from unroll.core.patching import without_gc
from unroll.core.plan import PRESETS, Plan
from unroll.onnx.batches import Batches
from unroll.onnx.calls import Call
from unroll.onnx.layers import DOMAIN, LAYER, LayerCall, is_layer
from unroll.onnx.lowering import Lowering
from unroll.onnx.reading import read_model
from unroll.onnx.standard import OF_RUNTIMES, STANDARD, StandardCall, check_node
from unroll.onnx.surgery import drop_unread, drop_unread_initializers, hand_over, without_unread
from unroll.onnx.values import Constants
from unroll.onnx.writer import OnnxWriter

OLDEST_OPSET = 13

NODES_PER_STEP = 50
"""The nodes that functions may be written out as, and steps in all, for each step of the limit: 1,000,000"""

PLAN = PRESETS["onnxruntime"]
"""The plan for callers that ask for none"""


def unroll_model(model: Any, *, where: Where = None, plan: Plan | str | None = None, steps: Steps = None) -> Any:
    """Return a copy of an ONNX model with plain operators in place of its recurrent nodes.

    See `unroll.unroll`. Where the number of time steps is known, or given by `steps`, every step is written out;
    else, or if the plan has blocks, the steps run in a `Scan`, a block in each turn, or a single step.

    Args:
        model: an `onnx.ModelProto`, an `onnx_ir.Model`, or the path of a file.
        where: which nodes, by name.
        plan: how the steps are laid out; `PLAN` by default.
        steps: the number of time steps where the model leaves it open, for all nodes or by name.

    Returns:
        A model of the same kind; for a path an `onnx_ir.Model`.
    """
    with without_gc():
        unrolled = unroll_ir(read_model(model), where=where, plan=plan, steps=steps)
    return ir.to_proto(unrolled) if isinstance(model, onnx.ModelProto) else unrolled


def from_torch(name: str, node: Any) -> bool:
    """Tell, for `where`, whether a node stands for a layer of torch, which was chosen before."""
    return node.domain == DOMAIN


def is_recurrent(node: ir.Node) -> bool:
    """Tell whether a node is of an operator that this pass replaces."""
    return (node.op_type in STANDARD and node.domain == "") or is_layer(node)


def unroll_ir(model: ir.Model, *, where: Where = None, plan: Plan | str | None = None, steps: Steps = None) -> ir.Model:
    """Unroll a model in place, and return it."""
    asked = None if plan is None else Plan.of(plan)
    if asked is not None:
        asked.refuse_training("plan=...")
    calls, problems = read_calls(model, where, steps)
    for call in calls:
        if call.plan is not None and asked is not None and replace(asked, runtime=call.plan.runtime) != call.plan:
            fix = f"leave plan out, or make it {str(call.plan)!r}; or give a layer that is not frozen"
            problems.add(f"{call.name}: plan={str(asked)!r}", f"was frozen with {str(call.plan)!r}", fix)
    problems.check()
    write_calls(model, calls, asked or PLAN)
    left = [node for node in recurrent_nodes(model) if chooses(where, [_label(node)], _any(node))]
    if left:
        raise UnrollError(*(Problem(_label(node), "is still recurrent", "report this model") for node in left))
    return model


BROKEN = ("model", "cannot be unrolled", "see that onnx.checker takes it; if it does, report this model")
"""The refusal of a model in which something is wrong that no reading has looked at"""


@refusing(*BROKEN)
def read_calls(model: ir.Model, where: Where = None, steps: Steps = None) -> tuple[list[Call], Problems]:
    """Read and check the recurrent nodes that `where` picks; return them, and everything that cannot be honoured.

    Functions that hold such nodes are written out in the model.

    Raises:
        UnrollError: for a model in which no node can be read.
    """
    _normalize(model)
    opset = model.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        fix = f"convert it with onnx.version_converter to {OLDEST_OPSET} or newer"
        raise UnrollError(Problem("model", f"uses version {opset} of the ONNX operators", fix))
    _inline(model)
    nodes = list(recurrent_nodes(model))
    chosen = [node for node in nodes if chooses(where, [_label(node)], _any(node))]
    foreign = [node for node in all_nodes(model) if (node.domain, node.op_type) in OF_RUNTIMES]
    problems = unknown_steps(steps, map(_label, chosen))
    problems += unknown_names(where, list(map(_label, [*nodes, *foreign])), "node")
    for node in foreign:
        if chooses(where, [_label(node)], _any(node)):
            fix = "give the file as it was before ONNX Runtime's tools rewrote it, or leave the node out by where="
            problems.add(_label(node), f"is recurrent, and ONNX Runtime's own {node.domain}::{node.op_type}", fix)
    if any(_is_open(value) for node in chosen for value in node.inputs[:1]):
        _check_size(_inlined_size(model, model.functions))  # inference goes through every call of a function
        common.ShapeInferencePass(check_type=False, strict_mode=False).call(model)
    # A shape in the middle of a model may be wrong, and unless all sizes are known nothing checks it in a run.
    fixed = not any(map(_is_open, model.graph.inputs))
    batches = Batches(model.graph, fixed)
    calls, used = [], set[str]()
    for node in chosen:
        kind = LayerCall if node.domain == DOMAIN else StandardCall
        with problems:
            if kind is StandardCall:
                check_node(node, _label(node), opset)
            call = kind(node, _label(node), steps)
            call.uncounted = batches.uncounted(call)
            if isinstance(call, StandardCall):
                call.guard(batches.trusts)
            call.trusted = kind is LayerCall or batches.trusts(call.given)
            number, label = 1, call.name
            while call.name in used:
                number += 1
                call.name = f"{label}_{number}"
            used.add(call.name)
            calls.append(call)
    return calls, problems


@refusing(*BROKEN)
def write_calls(model: ir.Model, calls: Iterable[Call], plan: Plan) -> None:
    """Put plain operators in the place of nodes of a model.

    Raises:
        UnrollError: before anything is written, for layers with too many steps, and too many in all.
    """
    planned, problems = [(call, _plan_of(call, plan)) for call in calls], Problems()
    for call, own in planned:
        with problems:
            check_written(call.name, call.steps, None if call.recurrence.is_cell else own.block)
    problems.check()
    _check_size(sum(call.recurrence.passes * (call.steps or 1) for call, own in planned if not own.block))
    graphs, opset = _graphs(model), model.opset_imports[""]
    taken = set(_names(graphs))
    constants, prepared = Constants(model.graph), dict[Any, Layout]()
    with without_gc():
        for call, own in planned:
            _replace(call, OnnxWriter(call.name, constants, opset, taken, FORMS[own.runtime]), own, prepared)
        for graph in graphs:
            drop_unread_initializers(graph)
    if DOMAIN in model.opset_imports and not any(node.domain == DOMAIN for node in all_nodes(model)):
        del model.opset_imports[DOMAIN]
    if constants.stored:  # before, a model's initializers had to be inputs of it, too
        model.ir_version = max(model.ir_version, 4)


def _plan_of(call: Call, plan: Plan) -> Plan:
    """Return the plan of a call: what is frozen is laid out, and only its operators are to be chosen."""
    chosen = plan if call.plan is None else replace(call.plan, runtime=plan.runtime or call.plan.runtime)
    return chosen.resolve(call.situation())


def _any(node: ir.Node) -> Any:
    return node


def _is_open(value: ir.Value | None) -> bool:
    """Tell whether shape inference might tell more about a value."""
    return value is None or value.shape is None or not all(isinstance(n, int) for n in value.shape.dims)


def _label(node: ir.Node) -> str:
    """Return the name of a node in messages, and in the names of what replaces it."""
    name = node.metadata_props.get(LAYER)
    if not name and node.domain == DOMAIN:  # torch's exporter tells the path of the module that a node came from
        name = ["", *ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "['']"))][-2]
        name = name or str(node.attributes["mode"].value).lower()
    return name or node.name or next((v.name for v in node.outputs if v.name), None) or node.op_type.lower()


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes of a model, with those inside of others and of its functions."""
    for holder in (model.graph, *model.functions.values()):
        yield from _nodes_of(holder)


def _nodes_of(graph: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Yield the nodes of a graph, each before those inside of it: `all_nodes` of onnx_ir, in a third of its time."""
    for node in graph:
        yield node
        if not node.attributes:
            continue
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                yield from _nodes_of(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS and not attribute.is_ref():
                for inner in attribute.as_graphs():
                    yield from _nodes_of(inner)


def _graphs(model: ir.Model) -> list[ir.Graph]:
    """Return the main graph and those in it that have nodes."""
    inner = dict.fromkeys(node.graph for node in _nodes_of(model.graph))
    return [model.graph, *(graph for graph in inner if isinstance(graph, ir.Graph) and graph is not model.graph)]


def recurrent_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes that this pass replaces; those that call a function of the model are none, whatever its name."""
    return (node for node in all_nodes(model) if is_recurrent(node) and node.op_identifier() not in model.functions)


def _names(graphs: Iterable[ir.Graph]) -> Iterator[str]:
    """Yield the names of everything in graphs."""
    for graph in graphs:
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        yield from (item.name for item in (*values, *graph) if item.name)


def _normalize(model: ir.Model) -> None:
    """Write in one way what the standard allows in two: its domain's name, and sizes that are open."""
    for holder in (model, *model.functions.values()):
        if "ai.onnx" in holder.opset_imports:
            holder.opset_imports[""] = holder.opset_imports.pop("ai.onnx")
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            if value.shape is not None and any(isinstance(n, int) and n < 0 for n in value.shape.dims):
                value.shape = ir.Shape([None if isinstance(n, int) and n < 0 else n for n in value.shape.dims])


def _inline(model: ir.Model) -> None:
    """Write out the functions that hold recurrent nodes, so that shapes and weights can be seen from inside."""
    recurrent = {node.op_identifier() for node in recurrent_nodes(model)}
    # A function that calls one of these is one too: repeated until none is added.
    holding: set[ir.OperatorIdentifier] = set()
    while True:
        wanted = recurrent | holding
        found = {
            key
            for key, function in model.functions.items()
            if any(node.op_identifier() in wanted for node in function.all_nodes())
        }
        if found == holding:
            break
        holding = found
    if not holding:
        return
    _check_size(_inlined_size(model, holding))
    try:
        common.InlinePass(criteria=lambda function: function.identifier() in holding)(model)
    except Exception as error:
        finding = f"holds recurrent nodes and cannot be inlined ({error.__cause__ or error})"
        places = [f"function {domain}::{name}" for domain, name, _ in holding]
        fix = "inline it with onnx.inliner, or make it one the standard allows"
        raise UnrollError(*(Problem(place, finding, fix) for place in places)) from error
    common.RemoveUnusedFunctionsPass()(model)


def _inlined_size(model: ir.Model, holding: Collection[ir.OperatorIdentifier]) -> int:
    """Return how many nodes a model has when these of its functions are written out."""

    @cache
    def size(key: ir.OperatorIdentifier) -> int:
        return of(model.functions[key].all_nodes())

    def of(nodes: Iterable[ir.Node]) -> int:
        keys = (node.op_identifier() for node in nodes)
        return sum(size(key) if key in holding else 1 for key in keys)

    return of(model.graph.all_nodes())


def _check_size(count: int) -> None:
    """Refuse a model that would have too many nodes: of each step of the limit, there may be some."""
    if count > (most := NODES_PER_STEP * limit()):
        finding = f"would have {count:,} nodes and steps, more than {most:,}"
        fix = f"pass limit={-(-count // NODES_PER_STEP)} if that is meant"
        raise UnrollError(Problem("model", finding, fix))


def _replace(call: Call, writer: OnnxWriter, plan: Plan, prepared: dict[Any, Layout]) -> None:
    """Put plain operators in the place of a node."""
    node = call.node
    graph = node.graph
    assert graph is not None
    read = list(node.inputs)
    results = Lowering(call, writer).write(plan, prepared)
    for old, result in zip(node.outputs, results, strict=False):
        if old.uses() or old.is_graph_output():
            hand_over(old, result.node, writer)
    # What is read shows only now that the results are handed over.
    kept = without_unread(writer.made)
    there = set(kept)
    for value in writer.unnamed:
        if value.name is None and value.producer() in there:
            value.name = writer.unique(f"{writer.layer}.unread")
    graph.insert_before(node, kept)
    graph.remove(node, safe=True)
    drop_unread(read)
