"""Values on which the recipe writes nodes of an FX graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from unroll.core.rows import copy_apart
from unroll.core.values import Value, Writer

# Metadata that nodes written for a call take over from it.
KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")

# What the recipe calls as a method.
METHODS = (torch.Tensor.to, torch.Tensor.select, torch.Tensor.index_select)


class GraphWriter(Writer):
    """Writes nodes into an FX graph, at its current point of insertion."""

    def __init__(self, layer: str, graph: fx.Graph, meta: Mapping[str, Any]) -> None:
        super().__init__(layer)
        self.graph = graph
        self.meta = {key: meta[key] for key in KEPT_META if key in meta}
        self.made: list[fx.Node] = []

    def node(
        self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None, name: str | None = None
    ) -> fx.Node:
        name = name or self.name(target.rpartition(".")[2] if isinstance(target, str) else target.__name__)
        node = self.graph.create_node(op, target, name=name.replace(".", "_"))
        # given afterwards: `create_node` walks its arguments by pytree, half of the time that a node takes
        node.args = args
        if kwargs:
            node.kwargs = kwargs
        node.meta.update(self.meta)
        self.made.append(node)
        return node

    def value(self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None) -> Value:
        return Value(self, lambda name: self.node(op, target, nodes_of(args), kwargs, name))

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in METHODS:
            return self.value("call_method", func.__name__, args)
        if func is torch.chunk and len(args) == 2:
            # Rows of any number, also a symbolic one, which chunk itself would have to know.
            stacked = self.value("call_function", torch.unflatten, (args[0], 0, (args[1], -1)))
            return self.items(self.value("call_function", torch.unbind, (stacked,)), args[1])
        result = self.value("call_function", func, args, kwargs)
        if func not in (torch.chunk, torch.split, copy_apart):
            return result
        return self.items(result, len(args[1]) if func is torch.split else args[1])

    def items(self, values: Value, count: int) -> list[Value]:
        """Return the values of a node that returns a tuple."""
        return [self.value("call_function", operator.getitem, (values, i)) for i in range(count)]

    def index(self, value: Value, index: tuple[Any, ...]) -> Value:
        """Return `value[index]`."""
        return self.value("call_function", operator.getitem, (value, index))


def nodes_of(args: Any) -> Any:
    """Return arguments with nodes in the place of values."""
    if isinstance(args, Value):
        return args.node
    if isinstance(args, (tuple, list)):
        return type(args)([nodes_of(arg) for arg in args])
    return args
