"""The passes of a layer over a sequence, each by itself: one for each layer and direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from unroll.core.cells import Label, State
from unroll.core.joined import Joined, run_joined
from unroll.core.layout import Layout
from unroll.core.recurrence import Recurrence, scope
from unroll.core.rows import pad_pieces, split_rows
from unroll.core.scan import Outputs, Pieces, Rows, Step
from unroll.core.values import Target
from unroll.core.weights import StepWeights, Tensorlike


class Run(NamedTuple):
    """The values that all passes of a run of a layer have in common."""

    recurrence: Recurrence
    layout: Layout
    steps: Any
    """The number of steps, T"""
    masks: list[Tensorlike] | None
    """The mask of each step, `[B, 1]`, or None"""
    target: Target

    def step(self, scope: str, weights: StepWeights, masks: Any) -> Step:
        """Return the step of one pass, or of several stacked, with a mask for each number of a step or None."""
        if weights.apart and (masks is not None or self.steps == 1):
            weights = weights._replace(apart=False)  # what is put out is a copy already, see `shown`, or not read again

        def step(t: Any, x: tuple[Tensorlike, ...], state: State) -> State:
            self.target.enter(f"{scope}.t{t}")
            label = self.target if masks is None else self._keeping(masks[t], state)
            return self.recurrence.cell.step(x, state, weights, label)

        return step

    def _keeping(self, mask: Tensorlike, state: State) -> Label:
        """Return a label by which rows that have no step keep their state; the new `c` is not read before."""
        old = dict(zip(self.recurrence.cell.states, state, strict=True))

        def label(value: Tensorlike, name: str) -> Tensorlike:
            value = self.target(value, name)
            if name not in old:
                return value
            return torch.where(mask, value, 0.0 if old[name] is None else old[name])

        return label

    def shown(self, h: Tensorlike, mask: Tensorlike) -> Tensorlike:
        """Return what a step with a mask puts out; of rows that have no step nobody reads it.

        On a GPU zeros stand there: what reads the mask of a step is written by Inductor in the kernel of that step,
        and a mere copy of `h` in that of the next one, which reads `h` too, if it is near.
        """
        return torch.where(mask, h, 0.0) if self.target.fuses else h

    def narrowed(self, state: State) -> State:
        """Return a last state; `c` went over the steps in the wider type, where there is one."""
        h, *rest = state
        return h, *map(self.layout.passes[0].narrow, rest)

    def joined(
        self, weights: StepWeights, xs: Sequence[Tensorlike], start: State, masks: Any, *, reverse: bool = False
    ) -> tuple[Tensorlike, State]:
        """Run one pass, or several stacked, as one function to autograd; see `run_joined`.

        Returns:
            The outputs, `[T, ..., B, size]`, and the last state.
        """
        if torch.compiler.is_dynamo_compiling():
            from unroll.core.joined_graph import apply
        else:
            apply = Joined.apply
        states = run_joined(weights, xs, start, masks, self.recurrence.mode, reverse=reverse, apply=apply)
        return states[0], tuple(s[0 if reverse else -1] for s in states)

    def pieces(self, rows: Tensorlike, sizes: Sequence[int] | None = None) -> Sequence[Tensorlike]:
        """Divide projected rows into what each step reads, in pieces of `sizes` if they are given."""
        # true if x is only what a product is added to, and is not read by itself; see `Target.divide`
        weights = self.layout.passes[0]
        into_products = self.recurrence.cell.folds and all(m.form == "matrix" for m in weights.hidden)
        apart = not sizes and not (into_products and not weights.fuses)
        return self.target.divide(rows, self.steps) if apart else split_rows(rows, self.steps, sizes)


def run_pass(
    run: Run, k: int, rows: Tensorlike, start: State, over: Callable, sizes: Sequence[int] | None
) -> tuple[Outputs, State]:
    """Run pass number `k`.

    Args:
        run: the run that it is a pass of.
        k: its number, direction after direction and layer after layer.
        rows: the rows that it reads, `[T * B, features]`.
        start: the state it begins with.
        over: the function that goes over the steps: `scan`, `scan_packed`, or the loop of a target, which is given the
            rows of all steps and returns them.
        sizes: of packed rows.

    Returns:
        The outputs and the last state.
    """
    recurrence, weights, here = run.recurrence, run.layout.passes[k], scope(run.recurrence, k)
    run.target.enter(here)
    projected = [inputs(rows) for inputs in weights.inputs]
    step = run.step(here, weights, run.masks)
    reverse = recurrence.directions[k % len(recurrence.directions)] == "reverse"
    # a loop takes all rows, [T * B, n] for each product; otherwise xs[t] is what step t reads, [B, n] for each
    if run.target.loop is not None:
        xs: Any = tuple(run.target(x, "x") for x in projected)
        put_out, final = over(step, xs, start, reverse=reverse)
        return Rows(put_out, run.steps, recurrence.output_size), final
    if run.target.joined:
        return _run_joined(run, weights, projected, start, sizes, reverse=reverse)
    pieces = zip(*(run.pieces(x, sizes) for x in projected), strict=True)
    xs = [tuple(run.target(x, f"t{t}.x") for x in parts) for t, parts in enumerate(pieces)]
    put_out, final = over(step, xs, start, reverse=reverse)
    return Pieces(put_out if run.masks is None else list(map(run.shown, put_out, run.masks))), final


def _run_joined(
    run: Run,
    weights: StepWeights,
    projected: Sequence[Tensorlike],
    start: State,
    sizes: Sequence[int] | None,
    *,
    reverse: bool,
) -> tuple[Outputs, State]:
    """Run a pass as one function; packed rows with their padding."""
    if sizes:
        padded = [pad_pieces(x, sizes) for x in projected]
        xs, masks = [x for x, _ in padded], padded[0][1]
    else:
        xs = [torch.reshape(x, (run.steps, -1, x.shape[-1])) for x in projected]
        masks = None if run.masks is None else torch.stack(run.masks)
    hs, final = run.joined(weights, xs, start, masks, reverse=reverse)
    if sizes:
        return Pieces([h[:n] for h, n in zip(hs.unbind(), sizes, strict=True)]), final
    size = run.recurrence.output_size
    return Rows(torch.reshape(hs, (-1, size)), run.steps, size), final
