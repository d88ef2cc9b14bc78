"""The pass on `torch.fx.GraphModule`: explicit gate operations where recurrent layers were called."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from unroll.core.errors import Problems
from unroll.core.layout import Layout
from unroll.core.options import Rules, Steps, Where, chooses, unknown_steps
from unroll.core.patching import without_gc
from unroll.core.plan import Plan
from unroll.graphs.aten import MetadataCache, writer_for
from unroll.graphs.calls import Metadata, call_of, form_of, graph_parts, layer_name, tensor_metadata
from unroll.graphs.code import recompile_late
from unroll.graphs.effects import changes_what_is_given
from unroll.graphs.freezing import drop_unread, freeze_calls
from unroll.graphs.lowering import FunctionLowering, Lowering, ModuleLowering, erase_dead
from unroll.graphs.packed import PackedFunctionLowering, PackedModuleLowering
from unroll.graphs.shapes import FakeRun
from unroll.graphs.tracing import need_no_tracer
from unroll.modules import linears
from unroll.modules.layers import Unrolled
from unroll.modules.replace import replace


def unroll_graph(
    module: fx.GraphModule,
    args: Any,
    *,
    where: Where,
    rules: Rules | None,
    plan: Plan | None,
    steps: Steps,
    freeze: bool = False,
    asserts: bool = True,
) -> fx.GraphModule:
    """Return a copy of the graph module with explicit gate operations in place of recurrent calls.

    See `unroll.unroll`; for `asserts` see `rewrite`.
    """
    parts = graph_parts(module)
    functional = [layer_name(node) for part in parts for node in part.graph.nodes if form_of(node)]
    copied: Any = replace(module, plan, where, rules, others=functional, freeze=freeze)
    run = FakeRun(copied)
    known = run.of(args) if args is not None else {}
    found: list[tuple[fx.GraphModule, list[Lowering]]] = []
    problems = Problems()
    for part, original in zip(graph_parts(copied), parts, strict=True):
        with problems:
            calls = find_calls(
                part, where, Plan.of(plan), tensor_metadata(part) | known, steps, original, part is copied
            )
            found.append((part, calls))
    frozen, refused = freeze_calls(found) if freeze else ({}, [])
    problems += refused
    modules = [node.target for node in copied.graph.find_nodes(op="call_module") if _is_unrolled(copied, node)]
    problems += unknown_steps(steps, [*functional, *modules])
    # What stopped the run on fake tensors is why other things are unknown.
    if run.problem and any("unknown" in problem.finding for problem in problems):
        problems.insert(0, run.problem)
    problems.check()
    layers = _uncalled_layers(copied, [call.call.node for part, calls in found if part is copied for call in calls])
    with without_gc():
        for part, calls in found:
            rewrite(part.graph, calls, asserts=asserts)
            drop_unread(part, frozen.get(part, []))
            recompile_late(part)
    for layer in layers:
        _put_plain_module(copied, layer)
    need_no_tracer(copied)
    return copied


def _uncalled_layers(module: fx.GraphModule, rewritten: list[fx.Node]) -> list[Unrolled]:
    """Return the layers of which no call will be left, with the weights under the layer's own names."""
    called: set[int] = set()
    for node in module.graph.nodes:
        if node.op in ("call_module", "get_attr") and node not in rewritten:
            found = operator.attrgetter(str(node.target))(module)
            called |= set(map(id, found.modules())) if isinstance(found, nn.Module) else set()
    layers = {node.target: module.get_submodule(str(node.target)) for node in rewritten if node.op == "call_module"}
    found = [
        layer for layer in dict.fromkeys(layers.values()) if isinstance(layer, Unrolled) and id(layer) not in called
    ]
    for layer in found:
        if linears.are_held(layer):
            linears.release(layer)
    return found


def _put_plain_module(module: fx.GraphModule, layer: Unrolled) -> None:
    """Put an `nn.Module` that holds the weights in the place of a layer: it can be unpickled without `unroll`."""
    plain = nn.Module()
    vars(plain).update({name: vars(layer)[name] for name in vars(plain)})
    names = [name for name, value in module.named_modules(remove_duplicate=False) if value is layer]
    for name in names:
        module.set_submodule(name, plain)


def _is_unrolled(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), Unrolled)


def find_calls(
    module: fx.GraphModule,
    where: Where,
    plan: Plan,
    known: Metadata,
    steps: Any,
    original: nn.Module | None = None,
    modules: bool = True,
) -> list[Lowering]:
    """Find the calls in a graph module that run a recurrence.

    Args:
        module: the graph module.
        where: which of them.
        plan: for functional calls; modules have their own.
        known: what is known of the values.
        steps: the number of time steps, as for `unroll`.
        original: where the layers are those that `where` asks about, before they became `Unrolled`.
        modules: whether calls of `Unrolled` modules count. Inside of another graph they may stay: they are explicit.

    Raises:
        UnrollError: with every call that cannot be honoured.
    """
    found: list[Lowering] = []
    problems = Problems()
    metadata = MetadataCache()
    for node in module.graph.nodes:
        with problems:
            if form_of(node):
                if chooses(where, [layer_name(node)], node):
                    call: Any = call_of(module, node, known)
                    function = PackedFunctionLowering if call.packed else FunctionLowering
                    found.append(function(call, plan, known, steps, writer_for(node, metadata)))
            elif node.op == "call_module" and modules and _is_unrolled(module, node):
                name = str(node.target)
                if chooses(where, [name], (original or module).get_submodule(name)):
                    call = call_of(module, node, known)
                    found.append((PackedModuleLowering if call.packed else ModuleLowering)(call, known, steps))
    problems.check()
    return found


def rewrite(graph: fx.Graph, calls: Sequence[Lowering], *, asserts: bool = True) -> None:
    """Put explicit operations in place of the calls.

    Args:
        graph: what holds them.
        calls: from `find_calls`.
        asserts: whether the graph itself must refuse other shapes than those of the calls.
    """
    prepared: dict[Any, Layout] = {}
    keys = _keys(graph, calls)  # before anything is rewritten
    for call, call.key in zip(calls, keys, strict=True):
        call.write(prepared, asserts=asserts)
    # Only now, as later calls may read weights that earlier ones laid out.
    erase_dead(node for call in calls for node in call.writer.made)


def _keys(graph: fx.Graph, calls: Sequence[Lowering]) -> list[Any]:
    """Return the keys of calls, the same for two calls only if nothing between them may tell one layout from two."""
    repeated = [key for key, count in Counter(call.key for call in calls).items() if count > 1]
    by_key = {call.key: call for call in calls}
    writers = {key: by_key[key].weight_writers() for key in repeated}
    times = dict.fromkeys(repeated, 0)
    by_node, found = {call.call.node: call for call in calls}, {}
    for node in graph.nodes if repeated else ():
        if call := by_node.get(node):
            found[call] = (call.key, times.get(call.key))
        elif changes_what_is_given(node):
            times = {key: time + 1 for key, time in times.items()}
        else:
            times = {key: time + (node in writers[key]) for key, time in times.items()}
    return [found.get(call, call.key) for call in calls]
