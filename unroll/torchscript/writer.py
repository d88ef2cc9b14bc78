"""Values on which the recipe writes nodes of a TorchScript graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll.core.values import Value, Writer

INT, TENSOR = torch._C.IntType.get(), torch._C.TensorType.get()


class ScriptWriter(Writer):
    """Writes nodes into a TorchScript graph, at its current point of insertion; constants at its top."""

    def __init__(self, layer: str, graph: Any) -> None:
        super().__init__(layer)
        self.graph = graph
        with graph.insert_point_guard(next(iter(graph.nodes()), graph.return_node())):
            self.top = graph.insertConstant(None).node()  # constants go before this
        self.constants: dict[Any, Any] = {}

    def __call__(self, value: Any, name: str) -> Any:
        if isinstance(value, Value):
            value.node.setDebugName(self.name(name))
        return value

    def constant(self, value: Any) -> Value:
        # with the type: 1, 1.0 and True are three constants
        key = id(value) if isinstance(value, Tensor) else (type(value), repr(value))
        if key not in self.constants:
            with self.graph.insert_point_guard(self.top):
                self.constants[key] = Value(self, node=self.graph.insertConstant(value))
        return self.constants[key]

    def insert(self, operator: str, *args: Any) -> Value:
        """Write an aten operator, in the overload and with the defaults that fit the arguments; return its value."""
        return Value(self, node=self.graph.insert(f"aten::{operator}", [self.operand(arg) for arg in args]))

    def node(self, kind: str, args: Sequence[Any], outputs: int = 1) -> Any:
        return self.graph.insertNode(self.graph.create(kind, [self.operand(arg) for arg in args], outputs))

    def list(self, parts: Sequence[Any], kind: Any = TENSOR) -> Value:
        value = self.node("prim::ListConstruct", parts).output()
        return Value(self, node=value.setType(torch._C.ListType(kind)))

    def items(self, values: Value, count: int) -> list[Value]:
        """Return the parts of a list of tensors, of which there must be `count`."""
        return [Value(self, node=output) for output in self.node("prim::ListUnpack", [values], count).outputs()]

    def run(self, function: Any, *args: Any) -> list[Value]:
        """Write the graph of a scripted function here, and return its results."""
        (result,) = self.graph.insertGraph(function.graph, [self.operand(arg) for arg in args])
        if result.type().kind() != "TupleType":
            return [Value(self, node=result)]
        kinds = result.type().elements()
        parts = self.node("prim::TupleUnpack", [Value(self, node=result)], len(kinds)).outputs()
        return [Value(self, node=part.setType(kind)) for part, kind in zip(parts, kinds, strict=True)]

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        result = self.insert(func.__name__, *args, *kwargs.values())
        if func not in (torch.chunk, torch.split):
            return result
        # chunk takes the number of parts, split their sizes
        return self.items(result, args[1] if func is torch.chunk else len(args[1]))

    def operand(self, arg: Any) -> Any:
        """Return the graph's value of an argument."""
        if isinstance(arg, Value):
            return arg.node
        if isinstance(arg, (list, tuple)) and any(isinstance(part, Value) for part in arg):
            return self.list(arg, INT if any(isinstance(part, int) for part in arg) else TENSOR).node
        return self.constant(list(arg) if isinstance(arg, tuple) else arg).node
