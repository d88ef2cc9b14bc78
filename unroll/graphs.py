"""The pass on `torch.fx.GraphModule`: explicit gate operations where recurrent layers were called."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from unroll import schedule, trees
from unroll.cells import Prepared
from unroll.modules import Unrolled
from unroll.plan import Plan
from unroll.recurrence import Problem, Recurrence, UnrollError, check_arguments
from unroll.trees import Rules, Where
from unroll.values import Value, Writer

Steps = int | Mapping[str, int] | None
"""The number of time steps, for all layers or by the layer's name."""


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
    try:
        tracer = _Tracer()
        graph = tracer.trace(model, concrete_args)
    except (torch.fx.proxy.TraceError, TypeError) as error:
        mend = "use unroll(module), which needs no trace, or the graph of torch.export"
        raise UnrollError(Problem(type(model).__name__, f"cannot be traced symbolically ({error})", mend)) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(rnn.pack_padded_sequence, rnn.pad_packed_sequence))
        self._autowrap_search.append(rnn)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return trees.is_recurrent(m) or isinstance(m, Unrolled) or super().is_leaf_module(m, module_qualified_name)


def unroll_graph(
    module: fx.GraphModule, args: Any, *, where: Where, rules: Rules | None, plan: Plan, steps: Steps
) -> fx.GraphModule:
    """A copy of the graph module with explicit gate operations in place of recurrent layers."""
    copied = trees.replace(module, plan, where, rules)
    sites = [node for node in copied.graph.nodes if _layer(copied, node) and trees.chooses(where, [node.target], _layer(copied, node))]
    shapes = _Shapes(copied).of(args) if args is not None else {}
    calls, problems = [], []
    for node in sites:
        try:
            calls.append(_Call(node, copied.get_submodule(node.target), shapes.get(node), steps))
        except UnrollError as error:
            problems += error.problems
    if problems:
        raise UnrollError(*problems)
    prepared: dict[str, list[Prepared]] = {}
    for call in calls:
        call.write(prepared)
    copied.graph.lint()
    copied.recompile()
    return copied


def _layer(module: fx.GraphModule, node: fx.Node) -> Unrolled | None:
    layer = module.get_submodule(node.target) if node.op == "call_module" else None
    return layer if isinstance(layer, Unrolled) else None


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors, without the steps of its layers, and keeps the input shape of each layer."""

    def of(self, args: Any) -> dict[fx.Node, tuple[int, ...]]:
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        try:
            with mode:
                self.run(*fakes)
        except UnrollError:
            raise
        except Exception as error:
            finding = f"the graph cannot be run on fake tensors like these ({type(error).__name__}: {error})"
            raise UnrollError(Problem("args", finding, "give arguments that fit the graph, or steps=")) from error
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if not isinstance(layer, Unrolled):
            return super().call_module(target, args, kwargs)
        input, state = _arguments(args, kwargs)
        if not isinstance(input, torch.Tensor):
            return layer(input, state)
        recurrence = layer.recurrence
        check_arguments(recurrence, target, input, state)
        self.found[self.node] = tuple(input.shape)
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


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Input and state of a layer's call, however they were passed."""
    given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
    return given.get("input"), given.get("hx")


class _GraphWriter(Writer):
    """Writes `call_function` nodes before one node of an FX graph."""

    def __init__(self, layer: str, graph: fx.Graph) -> None:
        super().__init__(layer)
        self.graph = graph
        self.made: list[fx.Node] = []

    def node(self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None, name: str = "") -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs, name=self.name(name or "value").replace(".", "_"))
        self.made.append(node)
        return node

    def __call__(self, value: Value, name: str) -> Value:
        value.node._rename(self.name(name).replace(".", "_"))
        return value

    def write(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        args = _nodes(args)
        if func is torch.Tensor.to:
            return Value(self.node("call_method", "to", args, name="to"), self)
        node = self.node("call_function", func, args, kwargs, func.__name__)
        if func not in (torch.chunk, torch.split):
            return Value(node, self)
        count = args[1] if func is torch.chunk else len(args[1])
        return [Value(self.node("call_function", operator.getitem, (node, i), name="getitem"), self) for i in range(count)]


def _nodes(args: Any) -> Any:
    if isinstance(args, Value):
        return args.node
    if isinstance(args, (tuple, list)):
        return type(args)([_nodes(arg) for arg in args])
    return args
