"""The pass on `torch.fx.GraphModule`: explicit gate operations where recurrent layers were called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.proxy import TraceError
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.core.layout import drop_unread
from unroll.core.options import Rules, Where, chooses
from unroll.core.passes import Layout
from unroll.core.patching import alone, patched, without_gc
from unroll.core.plan import Plan
from unroll.core.recurrence import Problem, Recurrence, UnrollError, check_arguments, read_layer
from unroll.core.scan import Divide, divided
from unroll.graphs.aten import Metadata, writer_for
from unroll.graphs.functions import FunctionCall, PackedCall, bind, form_of, layer_name
from unroll.graphs.lowering import (
    Call,
    Known,
    ModuleCall,
    Steps,
    erase_dead,
    is_packed,
    known_values,
    operands,
    unknown_steps,
)
from unroll.graphs.packed import PackedModuleCall
from unroll.modules import replace as trees
from unroll.modules.layers import Unrolled
from unroll.packed.contexts import is_padded, keeping_rows
from unroll.packed.guard import CAPTURED


def trace(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """Trace a model symbolically, with recurrent layers and (un)packing of sequences as single nodes.

    Args:
        model: what `torch.fx.symbolic_trace` takes.
        concrete_args: arguments to fix, as for `torch.fx.symbolic_trace`.

    Raises:
        UnrollError: if the model's control flow cannot be traced.

    Example:
        >>> [node.op for node in trace(nn.Sequential(nn.GRU(3, 5))).graph.nodes]
        ['placeholder', 'call_module', 'output']
    """
    if trees.is_recurrent(model):
        mend = "trace a module that holds it, such as nn.Sequential(layer)"
        raise UnrollError(Problem(type(model).__name__, "is itself a recurrent layer, with nothing around it", mend))
    try:
        tracer = _Tracer()
        with alone(), _packed_by_node(tracer):
            graph = tracer.trace(model, concrete_args)
        for node in graph.nodes:  # torch would declare these by dotted names, on which every later trace stumbles
            if node.target in (rnn.pack_padded_sequence, rnn.pad_packed_sequence):
                node.meta.pop("is_wrapped", None)
    except (TraceError, TypeError) as error:
        mend = "use unroll(module), which needs no trace, or the graph of torch.export"
        raise UnrollError(Problem(type(model).__name__, f"cannot be traced symbolically ({error})", mend)) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


@contextmanager
def _packed_by_node(tracer: fx.Tracer) -> Iterator[None]:
    """While this lasts, a `PackedSequence` made of values of the graph is a node."""
    made = PackedSequence.__new__

    def new(cls: Any, *args: Any, **kwargs: Any) -> Any:
        proxies = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, fx.Proxy)]
        if any(proxy.tracer is tracer for proxy in proxies):
            return tracer.create_proxy("call_function", PackedSequence, args, kwargs)
        return made(cls, *args, **kwargs)

    with patched(PackedSequence, __new__=staticmethod(new)):
        yield


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(rnn.pack_padded_sequence, rnn.pad_packed_sequence))
        self._autowrap_search.append(rnn)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return trees.is_recurrent(m) or isinstance(m, Unrolled) or super().is_leaf_module(m, module_qualified_name)


def unroll_graph(
    module: fx.GraphModule,
    args: Any,
    *,
    where: Where,
    rules: Rules | None,
    plan: Plan | None,
    steps: Steps,
    freeze: bool = False,
) -> fx.GraphModule:
    """A copy of the graph module with explicit gate operations in place of recurrent calls."""
    parts = graph_parts(module)
    functional = [layer_name(node) for part in parts for node in part.graph.nodes if form_of(node)]
    copied: Any = trees.replace(module, plan, where, rules, others=functional, freeze=freeze)
    run = _FakeRun(copied)
    known = run.of(args) if args is not None else {}
    found: list[tuple[fx.GraphModule, list[Call]]] = []
    problems: list[Problem] = []
    for part, original in zip(graph_parts(copied), parts, strict=True):
        try:
            calls = find_calls(part, where, Plan.of(plan), known_values(part) | known, steps, original, part is copied)
            found.append((part, calls))
        except UnrollError as error:
            problems += error.problems
    frozen, refused = _freeze(found) if freeze else ({}, [])
    problems += refused
    modules = [node.target for node in copied.graph.find_nodes(op="call_module") if _is_unrolled(copied, node)]
    problems += unknown_steps(steps, [*functional, *modules])
    if run.problem and any("unknown" in problem.finding for problem in problems):
        problems.insert(0, run.problem)
    if problems:
        raise UnrollError(*problems)
    with without_gc():
        for part, calls in found:
            rewrite(part.graph, calls)
            drop_unread(part, frozen.get(part, []))
            part.recompile()
    return copied


def _freeze(found: list[tuple[fx.GraphModule, list[Call]]]) -> tuple[dict[fx.GraphModule, list[str]], list[Problem]]:
    """Lay out the weights of calls; layers that are modules were frozen before.

    Returns the names of attributes of each graph module that may be needed no more, and problems.
    """
    names: dict[fx.GraphModule, list[str]] = {}
    problems: list[Problem] = []
    for part, calls in found:
        for call in calls:
            try:
                frozen = call.frozen.names if call.frozen else call.freeze() if isinstance(call, FunctionCall) else []
                names.setdefault(part, []).extend(frozen)
            except UnrollError as error:
                problems += error.problems
    return names, problems


def _is_unrolled(module: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(module.get_submodule(str(node.target)), Unrolled)


def graph_parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """The graph module and those inside of it: branches of control flow, checkpoints and the like."""
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def find_calls(
    module: fx.GraphModule,
    where: Where,
    plan: Plan,
    known: Known,
    steps: Any,
    original: nn.Module | None = None,
    modules: bool = True,
) -> list[Call]:
    """The calls in a graph module that run a recurrence.

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
    found: list[Call] = []
    problems: list[Problem] = []
    metadata = Metadata()
    for node in module.graph.nodes:
        try:
            if form := form_of(node):
                if chooses(where, [layer_name(node)], node):
                    kind = PackedCall if form[1] == "packed" else FunctionCall
                    found.append(kind(node, form, plan, known, steps, writer_for(node, metadata)))
            elif node.op == "call_module" and modules:
                name = str(node.target)
                layer = module.get_submodule(name)
                asked = original.get_submodule(name) if original else layer
                if isinstance(layer, Unrolled) and chooses(where, [name], asked):
                    packed = is_packed(operands(node.args, node.kwargs)[0])
                    found.append((PackedModuleCall if packed else ModuleCall)(node, layer, known, steps))
        except UnrollError as error:
            problems += error.problems
    if problems:
        raise UnrollError(*problems)
    return found


def rewrite(graph: fx.Graph, calls: Sequence[Call], *, asserts: bool = True, divide: Divide = divided) -> None:
    """Put explicit operations in place of the calls."""
    prepared: dict[Any, Layout] = {}
    for call in calls:
        call.write(prepared, asserts=asserts, divide=divide)
    erase_dead(node for call in calls for node in call.writer.made)


class _FakeRun(fx.Interpreter):
    """Runs a graph on fake tensors, without the steps of its layers, and keeps the results."""

    problem: Problem | None = None
    """Why it stopped before the end, if it did"""

    def of(self, args: Any) -> dict[fx.Node, torch.Tensor]:
        self.found: dict[fx.Node, torch.Tensor] = {}
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        fakes = pytree.tree_map_only(torch.Tensor, lambda t: mode.from_tensor(t, static_shapes=True), args)
        try:
            with mode, CAPTURED.set(True), keeping_rows(_layer_on_packed):
                self.run(*fakes)
        except UnrollError as error:  # without what the interpreter adds to the text
            raise UnrollError(*error.problems) from None
        except Exception as error:  # it may have come after all layers, and then does no harm
            finding = f"the graph cannot be run on fake tensors like these ({type(error).__name__}: {error})"
            self.problem = Problem("args", finding, "give arguments that fit the graph, or steps=")
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        form = form_of(n)
        # Packed rows are divided by the contents of a tensor, which a fake one lacks.
        result = self._packed(n) if form and form[1] == "packed" else super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.found[n] = result
        elif is_padded(result):
            self.found[n] = result.data.unflatten(0, (result.batch_sizes.steps, result.batch_sizes.count))
        return result

    def _packed(self, n: fx.Node) -> Any:
        given: Any = self.map_nodes_to_values(bind("packed", n.args, n.kwargs), n)
        states = given["hx"] if isinstance(given["hx"], (tuple, list)) else [given["hx"]]
        features = states[0].shape[-1] * (2 if given["bidirectional"] else 1)
        return given["input"].new_empty(given["input"].shape[0], features), *states

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, fx.GraphModule) and not kwargs:
            inner = type(self)(layer)
            inner.found = self.found
            return inner.run(*args)
        if not isinstance(layer, Unrolled):
            return super().call_module(target, args, kwargs)
        input, state = operands(args, kwargs)
        recurrence = layer.recurrence
        if is_padded(input):
            return _on_packed(recurrence, target, input, state)
        if not isinstance(input, torch.Tensor):
            return layer(input, state)
        check_arguments(recurrence, target, input, state)
        lead = input.shape[:-1]
        batch = lead[:-1] if recurrence.batch_first and len(lead) == 2 else lead[1:]
        states = tuple(
            input.new_empty(*(lead if recurrence.is_cell else (recurrence.passes, *batch)), size)
            for size in recurrence.state_sizes
        )
        final = states[0] if len(states) == 1 else states
        if recurrence.is_cell:
            return final
        return input.new_empty(*lead, len(recurrence.directions) * recurrence.output_size), final


def _on_packed(recurrence: Recurrence, place: str, input: Any, state: Any) -> tuple[PackedSequence, Any]:
    """What a layer returns for padded rows, without its steps: anything of the right sizes."""
    count, features = input.batch_sizes.count, len(recurrence.directions) * recurrence.output_size
    check_arguments(recurrence, place, input.data, state, rows=count)
    states = tuple(input.data.new_empty(recurrence.passes, count, size) for size in recurrence.state_sizes)
    output = PackedSequence(input.data.new_empty(len(input.data), features), *input[1:])
    return output, states[0] if len(states) == 1 else states


def _layer_on_packed(layer: Any, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    """The same of torch's own layers, which `where` has not chosen."""
    return _on_packed(read_layer(layer), type(layer).__name__, input, hx)
