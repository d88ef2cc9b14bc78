"""Runs a cell over time, directions and layers, and puts the pieces together.

Like the cells, everything here is a function of tensor-like values. Rows stay flat: a sequence is
`[T * B, features]`, split once into `T` pieces before the steps and joined once after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from unroll.core.cells import Precision, Prepared, State, Value, Weights, stack
from unroll.core.passes import Layout, Orders, scope
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence
from unroll.core.scan import UNNAMED, Divide, Names, Outputs, divided, joined, sweep, sweep_packed


class Result(NamedTuple):
    """What the steps left, in pieces, so that a reader can take only those it needs."""

    outputs: list[Outputs]
    """Of the last layer, for each direction"""
    finals: list[list[Value]]
    """For `h`, and for an LSTM `c`: the last state of each layer and direction, `[B, size]`"""


def prepare(
    recurrence: Recurrence,
    weights: Sequence[Weights],
    plan: Plan,
    dtype: torch.dtype | None = None,
    names: Names = UNNAMED,
) -> Layout:
    """Lay out the parameters for the steps.

    With float16 or bfloat16 as `dtype`, gates and `c` are computed in float32.
    """
    precision = precision_of(dtype)
    passes = []
    for k, w in enumerate(weights):
        names.enter(scope(recurrence, k))
        prepared = recurrence.cell.prepare(
            w, plan.gates, recurrence.hidden_size, precision, summed=plan.products == "sums"
        )
        for kind, maps in (("ih", prepared.inputs), ("hh", prepared.hidden)):
            for m in maps:
                names(m.weight, f"weight_{kind}")
                if m.bias is not None:
                    names(m.bias, f"bias_{kind}")
        passes.append(prepared)
    stacks = []
    if plan.directions == "stacked" and recurrence.bidirectional:
        for layer in range(recurrence.num_layers):
            names.enter(f"l{layer}.stacked")
            stacks.append(stack([p._replace(inputs=()) for p in passes[2 * layer : 2 * layer + 2]]))
    elif plan.layers == "wavefront" and not recurrence.bidirectional and recurrence.num_layers > 1:
        names.enter("stacked")
        inputs = stack(passes[1:]).inputs  # the first layer has other features, and its input is known before the steps
        stacks.append(stack([p._replace(inputs=()) for p in passes])._replace(inputs=inputs))
    widths = tuple(len(g) * recurrence.hidden_size for g in recurrence.cell.input_products(plan.gates))
    return Layout(passes, stacks, widths)


def precision_of(dtype: torch.dtype | None) -> Precision | None:
    """The types for rows of `dtype`, where there are two."""
    return Precision(dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else None


def run(
    recurrence: Recurrence,
    layout: Layout,
    rows: Value,
    state: tuple[Value, ...] | None,
    *,
    steps: Any,
    sizes: Sequence[int] | None = None,
    mask: Value | None = None,
    dropout: Callable[[Value], Value] | None = None,
    loop: Callable[..., tuple[Value, State]] | None = None,
    divide: Divide = divided,
    names: Names = UNNAMED,
) -> Result:
    """Unroll a whole layer: all its steps, directions and stacked layers.

    Args:
        recurrence: what the layer is.
        layout: its weights, from `prepare`.
        rows: the input, step after step, `[T * B, F]`.
        state: initial `h` (and `c`), each `[layers * directions, B, size]`, or flat, or None for zeros; None if
            all are zeros.
        steps: T.
        sizes: for packed rows, how many there are in each step; `rows` is then `[sum(sizes), F]`.
        mask: for padded rows, which of them have a step, boolean `[T * B, 1]`; the others keep
            their state. Needs an initial state.
        dropout: applied to the rows between layers, or None.
        loop: for a loop that the target runs itself, called like `sweep` with the rows of all time steps in place of
            pieces; what it returns as output has all rows too. It looks after the mask by itself.
        divide: how rows that steps read themselves become pieces: `divided`, or `separated` for Inductor on a CPU.
        names: told the scope of what is computed, `l1.reverse.t7`.
    """
    names.enter("state")
    starts = _starts(recurrence, layout.passes, state)
    looped = loop is not None
    masks = None if mask is None or looped else list(divide(mask, steps))
    stacks = [] if sizes or looped else layout.stacks
    here = Orders(recurrence, layout, steps, names, masks, divide)
    if stacks and not recurrence.bidirectional:
        outputs, finals = here.wavefront(rows, starts, dropout)
    else:
        outputs, finals = [], []
        over = loop if loop is not None else partial(sweep_packed, sizes=sizes) if sizes else sweep
        for layer in range(recurrence.num_layers):
            if layer:
                names.enter(f"l{layer}")
                rows = joined_rows(outputs)
                rows = dropout(rows) if dropout else rows
            if stacks:
                outputs, states = here.both_directions(layer, rows, starts[2 * layer : 2 * layer + 2])
            else:
                passes = range(len(finals), len(finals) + len(recurrence.directions))
                swept = [here.one_direction(k, rows, starts[k], over, sizes, whole=looped) for k in passes]
                outputs, states = [list(parts) for parts in zip(*swept, strict=True)]
            finals += states
    narrowed = [(h, *(layout.passes[0].narrow(c) for c in rest)) for h, *rest in finals]
    return Result(outputs, [list(parts) for parts in zip(*narrowed, strict=True)])


def _starts(recurrence: Recurrence, passes: Sequence[Prepared], state: tuple[Value, ...] | None) -> list[State]:
    """The initial state of each layer and direction. `c` is carried in the wider type, where there is one."""
    none = (None,) * recurrence.passes
    if state is None:
        state = (None,) * len(recurrence.state_sizes)
    starts: list[Sequence[Value]] = []
    for k, (s, size) in enumerate(zip(state, recurrence.state_sizes, strict=True)):
        if s is not None:
            s = torch.reshape(s, (-1, size))
            s = passes[0].widen(s) if k else s
        starts.append(none if s is None else divided(s, recurrence.passes))
    return list(zip(*starts, strict=True))


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


def joined_rows(outputs: Sequence[Outputs]) -> Value:
    """Output rows `[T * B, directions * P]` of one direction or both."""
    return _features([output.rows() for output in outputs])


def joined_output(recurrence: Recurrence, outputs: Sequence[Outputs], *, batched: bool = True) -> Value:
    """The output as the layer gives it, of one direction or both."""
    rows = joined_rows(outputs)
    if not batched:
        return rows
    output = torch.reshape(rows, (outputs[0].steps, -1, len(outputs) * recurrence.output_size))
    return torch.transpose(output, 0, 1) if recurrence.batch_first else output


def joined_states(recurrence: Recurrence, finals: Sequence[Sequence[Value]], *, batched: bool = True) -> list[Value]:
    """The last `h` (and `c`) as the layer or cell gives them."""
    states = []
    for parts, size in zip(finals, recurrence.state_sizes, strict=True):
        rows = joined(parts)
        if recurrence.is_cell:
            states.append(rows if batched else torch.reshape(rows, (size,)))
        else:
            states.append(torch.reshape(rows, (recurrence.passes, -1, size)) if batched else rows)
    return states
