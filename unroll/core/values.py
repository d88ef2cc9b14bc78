"""Stand-ins for tensors, on which the recipe writes a graph instead of computing.

Torch calls `__torch_function__` of any argument that has it. A `Value` hands the call to the writer
of its graph, which adds a node and returns the stand-in of its result.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from unroll.core.scan import Names, separated


class Value:
    """A tensor of a graph under construction.

    Its node is written when it is first named or read, so that what nobody reads costs nothing.
    """

    __slots__ = ("_node", "_write", "writer")

    def __init__(self, writer: Writer, write: Callable[[str | None], Any] | None = None, node: Any = None) -> None:
        self.writer = writer
        self._write = write
        self._node = node

    @property
    def node(self) -> Any:
        return self._node if self._node is not None else self.named(None)._node

    def named(self, name: str | None) -> Value:
        """Write the node, if it is not there yet."""
        if self._node is None and self._write is not None:
            self._node = self._write(name)
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _first(args).writer.call(func, args, kwargs or {})

    def to(self, dtype: torch.dtype) -> Value:
        return self.writer.call(torch.Tensor.to, (self, dtype), {})


def _first(args: Any) -> Value:
    """The first value among arguments, which may be lists."""
    for arg in args:
        if isinstance(arg, (list, tuple)):
            arg = _first(arg)
        if isinstance(arg, Value):
            return arg
    raise TypeError("no value of a graph among the arguments")


class Writer(Names):
    """Adds nodes to a graph, each named by the layer, the scope in it and what it is."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.scope = ""

    def enter(self, scope: str) -> None:
        self.scope = scope

    def __call__(self, value: Value, name: str) -> Value:
        return value.named(self.name(name))

    def name(self, what: str) -> str:
        """Such as `encoder.lstm.l1.reverse.t7.forget`."""
        return f"{self.layer}.{self.scope}.{what}"

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """The value of a torch function, or the list of its values."""
        raise NotImplementedError


# What the nodes written for a call take over from it.
KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")


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
        node = self.graph.create_node(op, target, args, kwargs, name=name.replace(".", "_"))
        node.meta.update(self.meta)
        self.made.append(node)
        return node

    def value(self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None) -> Value:
        return Value(self, lambda name: self.node(op, target, nodes_of(args), kwargs, name))

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is torch.Tensor.to:
            return self.value("call_method", "to", args)
        if func is torch.chunk and len(args) == 2:
            # Rows of any number, also a symbolic one, which chunk itself would have to know.
            stacked = self.value("call_function", torch.unflatten, (args[0], 0, (args[1], -1)))
            return self.items(self.value("call_function", torch.unbind, (stacked,)), args[1])
        result = self.value("call_function", func, args, kwargs)
        if func not in (torch.chunk, torch.split, separated):
            return result
        return self.items(result, len(args[1]) if func is torch.split else args[1])

    def items(self, values: Value, count: int) -> list[Value]:
        """The values of a node that returns a tuple."""
        return [self.value("call_function", operator.getitem, (values, i)) for i in range(count)]

    def index(self, value: Value, index: tuple[Any, ...]) -> Value:
        """`value[index]`"""
        return self.value("call_function", operator.getitem, (value, index))


def nodes_of(args: Any) -> Any:
    """Arguments with the nodes of their values."""
    if isinstance(args, Value):
        return args.node
    if isinstance(args, (tuple, list)):
        return type(args)([nodes_of(arg) for arg in args])
    return args
