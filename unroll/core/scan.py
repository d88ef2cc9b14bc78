"""Scans over time: a step after the other, over pieces of rows, and what they put out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch

from unroll.core.cells import State
from unroll.core.rows import join_rows
from unroll.core.weights import Tensorlike

Step = Callable[[int, Any, State], State]
"""`step(t, x, state) -> state`; the first state is the step's output."""


class Outputs:
    """The outputs of the steps of one direction, put together when they are asked for."""

    steps: Any
    """The number of steps, T"""

    def at(self, t: int) -> Tensorlike:
        """Return `h` after step `t`, `[B, P]`."""
        raise NotImplementedError

    def rows(self) -> Tensorlike:
        """Return `h` after every step, `[T * B, P]`."""
        raise NotImplementedError


class Pieces(Outputs):
    """Outputs made from `h` of each step."""

    def __init__(self, pieces: Sequence[Tensorlike]) -> None:
        self.pieces, self.steps = pieces, len(pieces)

    def at(self, t: int) -> Tensorlike:
        return self.pieces[t]

    def rows(self) -> Tensorlike:
        return join_rows(self.pieces)


class Rows(Outputs):
    """Outputs made from `h` of all steps at once, of `size` features."""

    def __init__(self, rows: Tensorlike, steps: Any, size: int) -> None:
        self.whole, self.steps, self.size = rows, steps, size

    def at(self, t: int) -> Tensorlike:
        return torch.reshape(self.whole, (self.steps, -1, self.size)).select(0, t)

    def rows(self) -> Tensorlike:
        return self.whole


def scan(step: Step, xs: Sequence[Any], state: State, *, reverse: bool = False) -> tuple[list[Tensorlike], State]:
    """Run `step` over `xs`, from the last to the first if `reverse`.

    Returns:
        The outputs in the order of `xs`, and the last state.

    Example:
        >>> scan(lambda t, x, state: (state[0] + x,), [1, 2, 3], (0,), reverse=True)
        ([6, 5, 3], (6,))
    """
    outputs: list[Tensorlike] = [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        state = step(t, xs[t], state)
        outputs[t] = state[0]
    return outputs, state


def scan_packed(
    step: Step, xs: Sequence[Any], state: State, *, sizes: Sequence[int], reverse: bool = False
) -> tuple[list[Tensorlike], State]:
    """Run `step` like `scan`, over rows sorted by falling length: only the first `sizes[t]` rows have a step `t`.

    The state has `sizes[0]` rows. A row that ends leaves its last state behind; in reverse, a row
    joins the others with its initial state where it begins.
    """
    ended = [before - now for before, now in pairwise([sizes[0], *sizes])]  # rows without a step t that had t - 1
    if not reverse:
        left: list[State] = []

        def shrinking(t: int, x: Any, state: State) -> State:
            if ended[t]:
                state, done = _cut(state, [sizes[t], ended[t]])
                left.append(done)
            return step(t, x, state)

        outputs, state = scan(shrinking, xs, state)
        # rows that ended first are the last
        return outputs, _join([state, *reversed(left)])

    joining = [*ended[1:], sizes[-1]]  # rows whose last step is t
    # initial states of the rows that begin, in reverse, at each t; the first rows, the longest, begin at the last t
    starts = _cut(state, joining[::-1])[::-1]

    def growing(t: int, x: Any, state: State) -> State:
        return step(t, x, _join([state, starts[t]]) if state and joining[t] else state or starts[t])

    return scan(growing, xs, (), reverse=True)


def _cut(state: State, rows: list[int]) -> list[State]:
    return list(zip(*(torch.split(s, rows) for s in state), strict=True))


def _join(states: list[State]) -> State:
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True)) if len(states) > 1 else states[0]


def mask_state(mask: Tensorlike, new: State, old: State) -> State:
    """Return the new state in the rows that have a step, the old one in the others."""
    return tuple(torch.where(mask, n, s) for n, s in zip(new, old, strict=True))
