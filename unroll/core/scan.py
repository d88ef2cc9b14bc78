"""Sweeps over time: a step after the other, over pieces of rows, and what they put out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from unroll.core.cells import State, Value

Step = Callable[[int, Any, State], State]
"""`step(t, x, state) -> state`; the first state is the step's output."""

Divide = Callable[[Value, int], Sequence[Value]]
"""`divide(rows, count)`: as many equal pieces"""


class Names:
    """Tells a graph where the recipe is and what a value is called. This one tells nobody."""

    def enter(self, scope: str) -> None:
        """What follows belongs to `scope`, such as `l1.reverse.t7`."""

    def __call__(self, value: Value, name: str) -> Value:
        """Call `value` by `name` in the current scope, and return it."""
        return value


UNNAMED = Names()


def divided(rows: Value, count: int, sizes: Sequence[int] | None = None) -> Sequence[Value]:
    """As many equal pieces, or pieces of these sizes."""
    if sizes is not None:
        return torch.split(rows, list(sizes))
    if count > 1 and isinstance(rows, torch.Tensor):  # sizes given, torch.export keeps a symbolic batch; chunk fixes it
        return torch.split(rows, [rows.shape[0] // count] * count)
    return torch.chunk(rows, count) if count > 1 else (rows,)


SEPARATED = 8
"""Steps whose rows `separated` copies together: so many kernels, or so many times fewer copies"""


def separated(rows: Value, count: int) -> Sequence[Value]:
    """As many equal pieces, some after the other in memory of their own.

    Inductor's code for a CPU has a piece's place as a constant: a kernel of its own is compiled for each step that
    reads one. Copies of some steps, which Inductor leaves alone, begin anew at place 0.
    """
    if has_torch_function_unary(rows):
        return handle_torch_function(separated, (rows,), rows, count)
    if count <= SEPARATED:
        return divided(rows, count)
    whole = torch.reshape(rows, (count, -1, *rows.shape[1:]))  # [T, B, n], so that B may stay open
    copies: Any = torch.split_copy(whole, SEPARATED)
    return [piece for copy in copies for piece in torch.unbind(copy)]


def joined(pieces: Sequence[Value]) -> Value:
    """Rows one after the other."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


class Outputs:
    """What the steps of one direction put out. It is put together when it is asked for."""

    steps: Any
    """How many: T"""

    def at(self, t: int) -> Value:
        """`h` after step `t`, `[B, P]`"""
        raise NotImplementedError

    def rows(self) -> Value:
        """`h` after every step, `[T * B, P]`"""
        raise NotImplementedError


class Pieces(Outputs):
    """From `h` of each step."""

    def __init__(self, pieces: Sequence[Value]) -> None:
        self.pieces, self.steps = pieces, len(pieces)

    def at(self, t: int) -> Value:
        return self.pieces[t]

    def rows(self) -> Value:
        return joined(self.pieces)


class Rows(Outputs):
    """From `h` of all steps at once, of `size` features."""

    def __init__(self, rows: Value, steps: Any, size: int) -> None:
        self.whole, self.steps, self.size = rows, steps, size

    def at(self, t: int) -> Value:
        return torch.select(torch.reshape(self.whole, (self.steps, -1, self.size)), 0, t)

    def rows(self) -> Value:
        return self.whole


def sweep(step: Step, xs: Sequence[Any], state: State, *, reverse: bool = False) -> tuple[list[Value], State]:
    """Run `step` over `xs`, from the last to the first if `reverse`.

    Returns:
        The outputs in the order of `xs`, and the last state.

    Example:
        >>> sweep(lambda t, x, state: (state[0] + x,), [1, 2, 3], (0,), reverse=True)
        ([6, 5, 3], (6,))
    """
    outputs: list[Value] = [None] * len(xs)
    for t in reversed(range(len(xs))) if reverse else range(len(xs)):
        state = step(t, xs[t], state)
        outputs[t] = state[0]
    return outputs, state


def sweep_packed(
    step: Step, xs: Sequence[Any], state: State, *, sizes: Sequence[int], reverse: bool = False
) -> tuple[list[Value], State]:
    """Like `sweep`, over rows sorted by falling length: only the first `sizes[t]` rows have a step `t`.

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

        outputs, state = sweep(shrinking, xs, state)
        return outputs, _join([state, *reversed(left)])

    joining = [*ended[1:], sizes[-1]]  # rows whose last step is t
    starts = _cut(state, joining[::-1])[::-1]

    def growing(t: int, x: Any, state: State) -> State:
        return step(t, x, _join([state, starts[t]]) if state and joining[t] else state or starts[t])

    return sweep(growing, xs, (), reverse=True)


def _cut(state: State, rows: list[int]) -> list[State]:
    return list(zip(*(torch.split(s, rows) for s in state), strict=True))


def _join(states: list[State]) -> State:
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True)) if len(states) > 1 else states[0]


def masked(mask: Value, new: State, old: State) -> State:
    """The new state in the rows that have a step, the old one in the others."""
    return tuple(torch.where(mask, n, s) for n, s in zip(new, old, strict=True))
