"""Runs a cell over time, directions and layers, and puts the pieces together.

Like the cells, everything here is a function of tensor-like values. Rows stay flat: a sequence is
`[T * B, features]`, split once into `T` pieces before the steps and joined once after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from unroll.core.cells import State
from unroll.core.layout import Layout
from unroll.core.passes import Run, run_pass
from unroll.core.recomputing import run_recomputed
from unroll.core.recurrence import Recurrence
from unroll.core.rows import join_rows, split_rows
from unroll.core.scan import Outputs, scan, scan_packed
from unroll.core.stacked import run_directions, run_masked_waves, run_wavefront, unstack
from unroll.core.values import TENSORS, Target
from unroll.core.weights import StepWeights, Tensorlike


class Result(NamedTuple):
    """The results of the steps, in pieces, so that a reader can take only those it needs."""

    outputs: list[Outputs]
    """The outputs of the last layer, for each direction"""
    finals: list[list[Tensorlike]]
    """For `h`, and for an LSTM `c`, the last state of each layer and direction, `[B, size]`"""
    together: list[Tensorlike] | None = None
    """The same in one piece, `[passes * B, size]`, if all passes went in one stack"""


def run(
    recurrence: Recurrence,
    layout: Layout,
    rows: Tensorlike,
    state: tuple[Tensorlike, ...] | None,
    *,
    steps: Any,
    sizes: Sequence[int] | None = None,
    mask: Tensorlike | None = None,
    dropout: Callable[[Tensorlike], Tensorlike] | None = None,
    recompute: int | None = None,
    target: Target = TENSORS,
) -> Result:
    """Unroll a whole layer: all its steps, directions and stacked layers.

    Args:
        recurrence: the layer without its tensors.
        layout: its weights, from `lay_out`.
        rows: the input, step after step, `[T * B, F]`.
        state: initial `h` (and `c`), each `[layers * directions, B, size]`, or flat, or None for zeros; None if
            all are zeros.
        steps: T.
        sizes: for packed rows, how many there are in each step; `rows` is then `[sum(sizes), F]`.
        mask: for padded rows, which of them have a step, boolean `[T * B, 1]`; the others keep
            their state. Needs an initial state.
        dropout: applied to the rows between layers, or None.
        recompute: of tensors, the steps of a block that is computed anew in the backward pass; None to keep all steps.
        target: the target that is computed on or written into. Its loop, if it has one, goes over the steps.
    """
    target.enter("state")
    layout = layout.written_for(target)
    starts = _starts(recurrence, layout.passes, state)
    looped = target.loop is not None
    # a loop masks by itself; loops and packed rows go pass by pass, without stacks
    masks = None if mask is None or looped else list(target.divide(mask, steps))
    stacks = [] if sizes or looped else layout.stacks
    here = Run(recurrence, layout, steps, masks, target)
    last = None  # of all passes, `[n, B, size]`, where they go in one stack
    if stacks and not recurrence.bidirectional:
        if target.fuses and isinstance(rows, torch.Tensor):
            outputs, last = run_masked_waves(here, rows, starts, dropout)
            finals = unstack(last, recurrence.passes)
        else:
            outputs, finals = run_wavefront(here, rows, starts, dropout)
    else:
        outputs, finals = [], []
        over = target.loop if target.loop is not None else partial(scan_packed, sizes=sizes) if sizes else scan
        for layer in range(recurrence.num_layers):
            if layer:
                target.enter(f"l{layer}")
                rows = joined_rows(outputs)
                rows = dropout(rows) if dropout else rows
            if stacks:
                outputs, last = run_directions(here, layer, rows, starts[2 * layer : 2 * layer + 2])
                states = unstack(last, 2)
            else:
                # passes of the layers below have their last states in `finals`
                passes = range(len(finals), len(finals) + len(recurrence.directions))
                if recompute is None:
                    ran = [run_pass(here, k, rows, starts[k], over, sizes) for k in passes]
                else:
                    ran = [run_recomputed(here, k, rows, starts[k], sizes, recompute) for k in passes]
                outputs, states = [output for output, _ in ran], [here.narrowed(state) for _, state in ran]
            finals += states
    together = None
    if last is not None and (recurrence.num_layers == 1 or not recurrence.bidirectional):
        together = [torch.reshape(s, (-1, size)) for s, size in zip(last, recurrence.state_sizes, strict=True)]
    return Result(outputs, [list(parts) for parts in zip(*finals, strict=True)], together)


def _starts(recurrence: Recurrence, passes: Sequence[StepWeights], state: tuple[Tensorlike, ...] | None) -> list[State]:
    """Return the initial state of each layer and direction, `c` in the wider type, where there is one."""
    none = (None,) * recurrence.passes
    if state is None:
        state = (None,) * len(recurrence.state_sizes)
    starts: list[Sequence[Tensorlike]] = []
    for k, (s, size) in enumerate(zip(state, recurrence.state_sizes, strict=True)):
        if s is not None:
            s = torch.reshape(s, (-1, size))  # [passes * B, size]
            s = passes[0].widen(s) if k else s
        starts.append(none if s is None else split_rows(s, recurrence.passes))
    return list(zip(*starts, strict=True))


def _features(parts: Sequence[Tensorlike]) -> Tensorlike:
    """Put directions side by side."""
    return torch.cat(list(parts), 1) if len(parts) > 1 else parts[0]


def flat_rows(recurrence: Recurrence, input: Tensorlike, *, batched: bool = True) -> Tensorlike:
    """Return the input of a layer or cell as rows `[T * B, F]`, one step after the other."""
    if recurrence.is_cell:
        return input if batched else torch.reshape(input, (1, recurrence.input_size))
    if batched and recurrence.batch_first:
        input = torch.transpose(input, 0, 1)
    return torch.reshape(input, (-1, recurrence.input_size))


def joined_rows(outputs: Sequence[Outputs]) -> Tensorlike:
    """Return output rows `[T * B, directions * P]` of one direction or both."""
    return _features([output.rows() for output in outputs])


def joined_output(recurrence: Recurrence, outputs: Sequence[Outputs], *, batched: bool = True) -> Tensorlike:
    """Return the output as the layer gives it, of one direction or both."""
    rows = joined_rows(outputs)
    if not batched:
        return rows
    output = torch.reshape(rows, (outputs[0].steps, -1, len(outputs) * recurrence.output_size))
    return torch.transpose(output, 0, 1) if recurrence.batch_first else output


def joined_states(recurrence: Recurrence, result: Result, *, batched: bool = True) -> list[Tensorlike]:
    """Return the last `h` (and `c`) as the layer or cell gives them."""
    states = []
    wholes = map(join_rows, result.finals) if result.together is None else result.together
    for rows, size in zip(wholes, recurrence.state_sizes, strict=True):
        if recurrence.is_cell:
            states.append(rows if batched else torch.reshape(rows, (size,)))
        else:
            states.append(torch.reshape(rows, (recurrence.passes, -1, size)) if batched else rows)
    return states
