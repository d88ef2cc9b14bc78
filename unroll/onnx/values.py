"""Stand-ins for tensors of an ONNX graph, and the constants that it holds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from unroll.core.values import Value


class OnnxValue(Value):
    """A tensor of an ONNX graph under construction, with as much about it as the writer needs."""

    __slots__ = ("count", "dtype", "features", "known", "rank", "width")

    writer: Any

    def __init__(
        self,
        writer: Any,
        write: Callable[[str | None], ir.Value] | None = None,
        node: ir.Value | None = None,
        *,
        dtype: torch.dtype,
        rank: int,
    ) -> None:
        super().__init__(writer, write, node)
        self.dtype = dtype
        self.rank = rank
        self.width: int | None = None  # of rows, `[n, width]`, where it is known
        self.count: int | None = None  # the first size, where a Reshape has set it
        self.features: int | None = None  # the last size of rows, where it is known
        self.known: list[int] | None = None  # the numbers in it, where they are known


FOLDED: dict[str, Callable[[int, int], int]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": operator.floordiv,
    "Concat": operator.add,  # of lists
}
"""Operators on sizes, which need no node where the sizes are known"""


def folded(kind: str, inputs: Sequence[Any]) -> list[int] | None:
    """Return what an operator makes of integers that are known; None if not all are."""
    given = []
    for value in inputs:
        numbers = value.known if isinstance(value, OnnxValue) else value
        if not isinstance(numbers, list) or not numbers:
            return None
        given.append(numbers)
    if kind == "Concat":
        return [number for numbers in given for number in numbers]
    first, second = given
    most = max(len(first), len(second))
    pairs = zip(*(numbers * most if len(numbers) == 1 else numbers for numbers in (first, second)), strict=True)
    return [FOLDED[kind](a, b) for a, b in pairs]


class Constants:
    """The initializers that nodes of one graph read, each stored once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.stored: dict[Any, tuple[ir.Value, Any]] = {}

    def get(self, key: Any, make: Callable[[], Any], keep: Any = None) -> ir.Value:
        """Return the initializer for `key`, made on first use; `keep` is kept alive with it."""
        if key not in self.stored:
            tensor = make()
            value = ir.Value(
                name=tensor.name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self.graph.register_initializer(value)
            self.stored[key] = (value, keep)
        return self.stored[key][0]
