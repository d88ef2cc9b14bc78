"""Runs a cell over time, directions and layers, and puts the pieces together.

Like the cells, everything here is a function of tensor-like values. Rows stay flat: a sequence is
`[T * B, features]`, split once into `T` pieces before the steps and joined once after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from unroll.cells import Precision, Prepared, State, Value, Weights
from unroll.plan import Plan
from unroll.recurrence import Recurrence

Step = Callable[[int, Any, State], State]
"""`step(t, x, state) -> state`; the first state is the step's output."""


class Names:
    """Tells a graph where the recipe is and what a value is called. This one tells nobody."""

    def enter(self, scope: str) -> None:
        """What follows belongs to `scope`, such as `l1.reverse.t7`."""

    def __call__(self, value: Value, name: str) -> Value:
        """Call `value` by `name` in the current scope, and return it."""
        return value


UNNAMED = Names()


class Result(NamedTuple):
    """What the steps left, in pieces, so that a reader can take only those it needs."""

    outputs: list[list[Value]]
    """`h` of the last layer, for each direction and step, `[B, P]`"""
    finals: list[list[Value]]
    """For `h`, and for an LSTM `c`: the last state of each layer and direction, `[B, size]`"""


def scope(recurrence: Recurrence, k: int) -> str:
    """What pass number `k` is called: `l1`, `l1.reverse`."""
    layer, direction = divmod(k, len(recurrence.directions))
    return f"l{layer}.reverse" if recurrence.directions[direction] else f"l{layer}"


def prepare(
    recurrence: Recurrence,
    weights: Sequence[Weights],
    plan: Plan,
    dtype: torch.dtype | None = None,
    names: Names = UNNAMED,
) -> list[Prepared]:
    """Lay out the parameters for the steps, for each layer and direction.

    With float16 or bfloat16 as `dtype`, gates and `c` are computed in float32.
    """
    low = dtype in (torch.float16, torch.bfloat16)
    precision = Precision(dtype, torch.float32) if low else None
    prepared = []
    for k, w in enumerate(weights):
        names.enter(scope(recurrence, k))
        layout = recurrence.cell.prepare(w, plan.gates, recurrence.hidden_size, precision)
        for kind, maps in (("ih", layout.inputs), ("hh", layout.hidden)):
            for weight, bias in maps:
                names(weight, f"weight_{kind}")
                if bias is not None:
                    names(bias, f"bias_{kind}")
        prepared.append(layout)
    return prepared


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


def run(
    recurrence: Recurrence,
    prepared: Sequence[Prepared],
    rows: Value,
    state: tuple[Value, ...] | None,
    *,
    steps: int,
    sizes: Sequence[int] | None = None,
    masks: Sequence[Value] | None = None,
    dropout: Callable[[Value], Value] | None = None,
    loop: Callable[..., tuple[list[Value], State]] | None = None,
    names: Names = UNNAMED,
) -> Result:
    """Unroll a whole layer: all its steps, directions and stacked layers.

    Args:
        recurrence: what the layer is.
        prepared: its weights from `prepare`, for each layer and direction.
        rows: the input, step after step, `[T * B, F]`.
        state: initial `h` (and `c`), each `[layers * directions, B, size]`, or flat, or None for zeros; None if
            all are zeros.
        steps: T.
        sizes: for packed rows, how many there are in each step; `rows` is then `[sum(sizes), F]`.
        masks: for padded rows, which of them have a step `t`, boolean `[B, 1]` each; the others keep
            their state. Needs an initial state.
        dropout: applied to the rows between layers, or None.
        loop: called like `sweep`, with the rows of all time steps as its only piece, for a loop that the target runs
            itself; `steps` is then 1, and what `loop` returns as output has all rows too.
        names: told the scope of what is computed, `l1.reverse.t7`.
    """
    names.enter("state")
    starts = _starts(recurrence, prepared, state)
    finals: list[State] = []
    outputs: list[list[Value]] = []
    for layer in range(recurrence.num_layers):
        if layer:
            names.enter(f"l{layer}")
            rows = joined_rows(outputs)
            rows = dropout(rows) if dropout else rows
        outputs = []
        for direction in recurrence.directions:
            k = len(finals)
            weights, here = prepared[k], scope(recurrence, k)
            names.enter(here)
            projected = [_pieces(inputs(rows), steps, sizes) for inputs in weights.inputs]

            def step(t: int, x: tuple[Value, ...], state: State, here=here, weights=weights) -> State:
                names.enter(f"{here}.t{t}")
                new = recurrence.cell.step(x, state, weights, names)
                return new if masks is None else tuple(torch.where(masks[t], n, s) for n, s in zip(new, state))

            xs = [tuple(names(x, f"t{t}.x") for x in pieces) for t, pieces in enumerate(zip(*projected, strict=True))]
            over = loop or (partial(sweep_packed, sizes=sizes) if sizes else sweep)
            hs, final = over(step, xs, starts[k], reverse=direction == "reverse")
            outputs.append(hs)
            finals.append((final[0], *(weights.narrow(c) for c in final[1:])))
    return Result(outputs, [list(parts) for parts in zip(*finals, strict=True)])


def _starts(recurrence: Recurrence, prepared: Sequence[Prepared], state: tuple[Value, ...] | None) -> list[State]:
    """The initial state of each layer and direction. `c` is carried in the wider type, where there is one."""
    none = (None,) * recurrence.passes
    if state is None:
        state = (None,) * len(recurrence.state_sizes)
    starts: list[Sequence[Value]] = []
    for k, (s, size) in enumerate(zip(state, recurrence.state_sizes, strict=True)):
        if s is not None:
            s = torch.reshape(s, (-1, size))
            s = prepared[0].widen(s) if k else s
        starts.append(none if s is None else _pieces(s, recurrence.passes))
    return list(zip(*starts, strict=True))


def _pieces(rows: Value, count: int, sizes: Sequence[int] | None = None) -> Sequence[Value]:
    if sizes is not None:
        return torch.split(rows, list(sizes))
    if count > 1 and isinstance(rows, torch.Tensor):  # sizes given, torch.export keeps a symbolic batch; chunk fixes it
        return torch.split(rows, [rows.shape[0] // count] * count)
    return torch.chunk(rows, count) if count > 1 else (rows,)


def _features(parts: Sequence[Value]) -> Value:
    """Directions side by side."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def flat_rows(recurrence: Recurrence, input: Value, *, batched: bool = True) -> Value:
    """The input of a layer or cell as rows `[T * B, F]`, one step after the other."""
    if recurrence.is_cell:
        return input if batched else torch.reshape(input, (1, recurrence.input_size))
    if batched and recurrence.batch_first:
        input = torch.transpose(input, 0, 1)
    return torch.reshape(input, (-1, recurrence.input_size))


def joined_rows(outputs: Sequence[Sequence[Value]]) -> Value:
    """Output rows `[T * B, directions * P]` from the pieces of one direction or both."""
    return _features([torch.cat(list(hs)) if len(hs) > 1 else hs[0] for hs in outputs])


def joined_output(recurrence: Recurrence, outputs: Sequence[Sequence[Value]], *, batched: bool = True) -> Value:
    """The output as the layer gives it, from the pieces of one direction or both."""
    rows = joined_rows(outputs)
    if not batched:
        return rows
    output = torch.reshape(rows, (len(outputs[0]), -1, len(outputs) * recurrence.output_size))
    return torch.transpose(output, 0, 1) if recurrence.batch_first else output


def joined_states(recurrence: Recurrence, finals: Sequence[Sequence[Value]], *, batched: bool = True) -> list[Value]:
    """The last `h` (and `c`) as the layer or cell gives them."""
    states = []
    for parts, size in zip(finals, recurrence.state_sizes, strict=True):
        rows = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        if recurrence.is_cell:
            states.append(rows if batched else torch.reshape(rows, (size,)))
        else:
            states.append(torch.reshape(rows, (recurrence.passes, -1, size)) if batched else rows)
    return states
