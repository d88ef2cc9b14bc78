"""Layers whose state is kept between calls of their model: where none is passed to them, it is given and taken outside.

Nothing is traced: the model's own code runs, and a layer that is called without a state finds one in its `Carry`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from unroll.core.arguments import as_result, as_states
from unroll.core.errors import Problem, UnrollError
from unroll.modules.layers import Unrolled
from unroll.streams.states import packed_problem

States = tuple[Tensor, ...]
"""`(h,)` or `(h, c)`"""


class Carry:
    """The states of one layer during one run of its model.

    A call without a state begins a chain, and a call with the very tensors that the last call of a chain returned,
    as it returned them, goes on with it: so does a cell in a loop over steps. A chain has one state, given to its
    first call and taken from its last. A call with any other state is left alone.

    Attributes:
        name: of the layer in the model.
        place: the same for messages, where the layer is the whole model too.
        is_cell: whether it is a cell, which returns its state alone.
        count: chains in a run, once they are known.
        running: whether a run is under way.
        given: the state that each chain begins with; None for zeros.
        chains: the state that each chain has come to.
        handed: the copy of it that the model got, and may write into.
        versions: how often each tensor of that copy had been written to by then.
        foreign: calls with a state of the model's own.
        packed: whether a chain was called with packed rows.
    """

    def __init__(self, name: str, place: str, *, is_cell: bool) -> None:
        self.name = name
        self.place = place
        self.is_cell = is_cell
        self.count: int | None = None
        self.running = False
        self.clear()

    def clear(self) -> None:
        """Forget all of a run."""
        self.given: list[States] | None = None
        self.chains: list[States] = []
        self.handed: list[States] = []
        self.versions: list[list[int]] = []
        self.foreign = 0
        self.packed = False

    def problem(self, finding: str) -> Problem:
        """Return the problem of a run that differs from the first one."""
        fix = "give pieces in which it is called as with the example, or change the model"
        return Problem(self.place, finding, fix)

    def chain_of(self, hx: Any) -> int | None:
        """Return the chain that a call with this state belongs to; None if the state is the model's own."""
        if hx is None:
            return len(self.chains)
        states: Any = as_states(hx)
        for k, last in enumerate(self.handed):
            if all(a is b for a, b in zip(last, states)) and not self._is_written(k):
                return k
        self.foreign += 1
        return None

    def _is_written(self, chain: int) -> bool:
        """Tell whether the model has changed, in place, what it got from a chain."""
        if torch.compiler.is_dynamo_compiling():  # the example has told
            return False
        return [state._version for state in self.handed[chain]] != self.versions[chain]

    def run(self, forward: Callable[[Any, Any], Any], input: Any, hx: Any) -> Any:
        """Call a layer during a run of its model: `forward(input, hx)`, with the state of its chain."""
        chain = self.chain_of(hx)
        if chain is not None and isinstance(input, PackedSequence):
            if self.count is not None:
                raise UnrollError(packed_problem(self.place))
            self.packed = True
        results = forward(input, self.start(chain, hx))
        if self.is_cell:
            return self.take(chain, results)
        output, final = results
        return output, self.take(chain, final)

    def start(self, chain: int | None, hx: Any) -> Any:
        """Return the state for a call: its own, or for one that begins a chain that which was given from outside."""
        if chain is None or hx is not None:
            return hx
        if self.count is not None and chain >= self.count:
            raise UnrollError(
                self.problem(f"is called without a state more often than with the example, {self.count} times")
            )
        if self.given is None:
            return None
        return as_result(self.given[chain])

    def take(self, chain: int | None, final: Any) -> Any:
        """Keep the last state of a call for its chain, and return the copy that the model gets."""
        if chain is None:
            return final
        states: Any = as_states(final)
        handed = tuple(_copied(state) for state in states)
        # In place of the chain's last entry, or added to the lists where the call begins it.
        self.chains[chain : chain + 1] = [states]
        self.handed[chain : chain + 1] = [handed]
        self.versions[chain : chain + 1] = [
            [] if torch.compiler.is_dynamo_compiling() else [h._version for h in handed]
        ]
        return as_result(handed)


def _copied(state: Tensor) -> Tensor:
    """Copy a state, so that torch counts writes to the copy; it counts none to tensors made in inference mode."""
    if torch.compiler.is_dynamo_compiling() or not state.is_inference():
        return state.clone()
    with torch.inference_mode(False):
        return state.clone()


def attach_carry(layer: Unrolled, name: str) -> Carry:
    """Let a layer keep its state between calls of its model."""
    carry = Carry(name, name or layer.place, is_cell=layer.recurrence.is_cell)
    object.__setattr__(layer, "carry", carry)
    return carry
