"""Stand-ins for tensors, on which the recipe writes a graph instead of computing.

Torch calls `__torch_function__` of any argument that has it. A `Value` hands the call to the writer
of its graph, which adds a node and returns the stand-in of its result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from unroll.core.rows import Divide, copy_apart, split_rows
from unroll.core.weights import Tensorlike

Loop = Callable[..., tuple[Any, tuple[Any, ...]]]


class Target:
    """The target that the recipe computes on or writes into. This one is for tensors: it has no use for names.

    Attributes:
        divide: how rows that steps read themselves, not as what a product is added to, become pieces: `split_rows`,
            or `copy_apart` for Inductor.
        fuses: whether a product leaves what is added to it to the kernel that comes after it, as Inductor's on a GPU:
            cuBLAS would copy it first, a launch a step. Elsewhere the product adds it itself.
        loop: for a loop that the target runs itself, called like `scan` with the rows of all time steps in place of
            pieces; what it returns as output has all rows too. It looks after a mask by itself. None where every step
            is written.
        differentiable: whether gradients may go through what is written.
        joined: whether the gradients of a pass's weights are one product, see core/joined.py; only of tensors.
    """

    differentiable = True
    fuses = False

    def __init__(self, divide: Divide = split_rows, loop: Loop | None = None, *, joined: bool = False) -> None:
        self.divide = divide
        self.loop = loop
        self.joined = joined

    def compile_for(self, device: str) -> Self:
        """Write for Inductor's code on a device of this type; return the target."""
        self.divide, self.fuses = copy_apart, device == "cuda"
        return self

    def enter(self, scope: str) -> None:
        """Have what follows belong to `scope`, such as `l1.reverse.t7`."""

    def __call__(self, value: Tensorlike, name: str) -> Tensorlike:
        """Call `value` by `name` in the current scope, and return it."""
        return value


TENSORS = Target()


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
            self._write = None  # which held on to everything that was read
        return self

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        value = args[0] if isinstance(args[0], Value) else _first(args)
        return value.writer.call(func, args, kwargs or {})

    # Methods, where the functions of the same names are another's: PyTorch Geometric puts its own, which ask a tensor
    # for its dimensions first, in the place of `torch.select` and `torch.index_select`.

    def to(self, dtype: torch.dtype) -> Value:
        return self.writer.call(torch.Tensor.to, (self, dtype), {})

    def select(self, dim: int, index: int) -> Value:
        return self.writer.call(torch.Tensor.select, (self, dim, index), {})

    def index_select(self, dim: int, index: Any) -> Value:
        return self.writer.call(torch.Tensor.index_select, (self, dim, index), {})


def _first(args: Any) -> Value:
    """Return the first value among arguments, which may be lists."""
    for arg in args:
        if isinstance(arg, (list, tuple)):
            arg = _first(arg)
        if isinstance(arg, Value):
            return arg
    raise TypeError("no value of a graph among the arguments")


class Writer(Target):
    """Adds nodes to a graph, each named by the layer, the scope in it and what it is."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer
        self.scope = ""

    def enter(self, scope: str) -> None:
        self.scope = scope

    def __call__(self, value: Value, name: str) -> Value:
        return value.named(self.name(name))

    def name(self, what: str) -> str:
        """Return a full name, such as `encoder.lstm.l1.reverse.t7.forget`."""
        return f"{self.layer}.{self.scope}.{what}"

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Return the value of a torch function, or the list of its values."""
        raise NotImplementedError
