"""Layers whose state is kept between calls of their model: where none is passed to them, it is given and taken outside.

Nothing is traced: the model's own code runs, and a layer that is called without a state finds one in its `Carry`.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import Tensor
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from unroll.modules import Unrolled, UnrolledCell, UnrolledLayer
from unroll.recurrence import Problem, UnrollError
from unroll.subclasses import assign_class

States = tuple[Tensor, ...]
"""`(h,)` or `(h, c)`"""


class Carry:
    """The states of one layer during one run of its model.

    A call without a state begins a chain, and a call with the very tensors that the last call of a chain returned
    goes on with it: so does a cell in a loop over steps. A chain has one state, given to its first call and taken
    from its last. A call with any other state is left alone.

    Attributes:
        name: of the layer in the model.
        count: chains in a run, once they are known.
        running: whether a run is under way.
        given: the state that each chain begins with; None for zeros.
        chains: the state that each chain has come to.
        foreign: calls with a state of the model's own.
        packed: whether a chain was called with packed rows.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count: int | None = None
        self.running = False
        self.clear()

    def clear(self) -> None:
        """Forget all of a run."""
        self.given: list[States] | None = None
        self.chains: list[States] = []
        self.foreign = 0
        self.packed = False

    def problem(self, finding: str) -> Problem:
        """A run that differs from the first one."""
        return Problem(self.name, finding, "give pieces in which it is called as with the example, or change the model")

    def chain_of(self, hx: Any) -> int | None:
        """The chain that a call with this state belongs to; None if the state is the model's own."""
        if hx is None:
            return len(self.chains)
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        for k, last in enumerate(self.chains):
            if all(a is b for a, b in zip(last, states)):
                return k
        self.foreign += 1
        return None

    def start(self, chain: int | None, hx: Any) -> Any:
        """What a call is given for its state."""
        if chain is None or hx is not None:
            return hx
        if self.count is not None and chain >= self.count:
            raise UnrollError(
                self.problem(f"is called without a state more often than with the example, {self.count} times")
            )
        if self.given is None:
            return None
        states = self.given[chain]
        return states[0] if len(states) == 1 else states

    def take(self, chain: int | None, final: Any) -> None:
        """Keep what a call left."""
        states = (final,) if isinstance(final, Tensor) else tuple(final)
        if chain is None:
            return
        if chain == len(self.chains):
            self.chains.append(states)
        else:
            self.chains[chain] = states


class _Carrying:
    """Comes between a layer's own `forward` and that of the unrolled layer."""

    carry: Carry

    def forward(self, input: Any, hx: Any = None) -> Any:
        carry = self.carry
        if not carry.running:
            return super().forward(input, hx)  # pyright: ignore[reportAttributeAccessIssue]
        chain = carry.chain_of(hx)
        if chain is not None and isinstance(input, PackedSequence):
            if carry.count is not None:
                raise UnrollError(packed_problem(carry.name))
            carry.packed = True
        results = super().forward(input, carry.start(chain, hx))  # pyright: ignore[reportAttributeAccessIssue]
        carry.take(chain, results if isinstance(self, UnrolledCell) else results[1])
        return results


class CarryingLayer(_Carrying, UnrolledLayer):
    """An unrolled layer whose state is kept between calls of its model."""


class CarryingCell(_Carrying, UnrolledCell):
    """An unrolled cell whose state is kept between calls of its model."""


def packed_problem(name: str) -> Problem:
    """Why packed rows cannot be streamed."""
    finding = "runs on a PackedSequence, whose rows end at lengths of their own: a piece does not tell which go on"
    return Problem(name, finding, "give the model padded pieces, and take a row's state where it ends")


def carried(layer: Unrolled, name: str) -> Carry:
    """Let a layer keep its state between calls of its model."""
    assign_class(layer, carrying(parametrize.type_before_parametrizations(layer)))
    carry = Carry(name)
    object.__setattr__(layer, "carry", carry)
    return carry


@functools.cache
def carrying(kind: type) -> type:
    """The class that keeps the state of layers of a class of `Unrolled`, between whose methods and torch's it comes."""
    if kind in (UnrolledLayer, UnrolledCell):
        return CarryingLayer if kind is UnrolledLayer else CarryingCell
    base = CarryingLayer if issubclass(kind, UnrolledLayer) else CarryingCell
    return types.new_class(kind.__name__, (kind, base), {}, lambda body: body.update(__reduce_ex__=_reduce))


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    kind: Any = parametrize.type_before_parametrizations(self).__bases__[0]
    return _empty, (kind.__new__(kind),), self.__dict__


def _empty(layer: Unrolled) -> Unrolled:
    """An instance without contents of the class that keeps the state of such layers."""
    kind: Any = carrying(type(layer))
    return kind.__new__(kind)
