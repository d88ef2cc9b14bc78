"""Stand-ins for tensors, on which the recipe writes a graph instead of computing.

Torch calls `__torch_function__` of any argument that has it. A `Value` hands the call to the writer
of its graph, which adds a node and returns the stand-in of its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unroll.schedule import Names


class Value:
    """A tensor of a graph under construction."""

    __slots__ = ("node", "writer")

    def __init__(self, node: Any, writer: Writer) -> None:
        self.node = node
        self.writer = writer

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _writer(args).write(func, args, kwargs or {})

    def to(self, dtype: torch.dtype) -> Value:
        return self.writer.write(torch.Tensor.to, (self, dtype), {})


def _writer(args: Any) -> Writer:
    for arg in args:
        if isinstance(arg, Value):
            return arg.writer
        if isinstance(arg, (list, tuple)):
            return _writer(arg)
    raise TypeError("no value of a graph among the arguments")


class Writer(Names):
    """Adds nodes to a graph, each named by the layer, the scope in it and what it is."""

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.scope = ""

    def enter(self, scope: str) -> None:
        self.scope = scope

    def name(self, what: str) -> str:
        """Such as `encoder.lstm.l1.reverse.t7.forget`."""
        return f"{self.layer}.{self.scope}.{what}"

    def write(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Add a node that calls `func`; return its value, or the list of its values."""
        raise NotImplementedError
