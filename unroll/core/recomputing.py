"""Passes whose steps are not kept for the backward pass, but computed anew in it, a block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from unroll.core.cells import State
from unroll.core.passes import Run, run_pass
from unroll.core.scan import Outputs, Rows, scan, scan_packed


def run_recomputed(
    run: Run, k: int, rows: Tensor, start: State, sizes: Sequence[int] | None, block: int
) -> tuple[Outputs, State]:
    """Run pass number `k` like `run_pass`, on tensors, with blocks of steps by `torch.utils.checkpoint`.

    Of a block are kept the rows that it reads and puts out, and the state it begins with. Its product with the input is
    made inside of it.

    Args:
        run: the run that it is a pass of.
        k: its number.
        rows: the rows that it reads, `[T * B, features]`, or with sizes `[sum(sizes), features]`.
        start: the state it begins with.
        sizes: of packed rows.
        block: how many steps a block has; the last one may have fewer.
    """
    recurrence, steps = run.recurrence, run.steps
    reverse = recurrence.directions[k % len(recurrence.directions)] == "reverse"
    spans = [slice(first, min(first + block, steps)) for first in range(0, steps, block)]
    counts = [sum(sizes[span]) if sizes else (span.stop - span.start) * (len(rows) // steps) for span in spans]
    put_out: list[Tensor] = [rows] * len(spans)
    # a module that stands for a product may draw random numbers; nothing else in a block does
    draws = any(m.form == "linear" for m in run.layout.passes[k].hidden)

    def over_block(n: int, piece: Tensor, state: State) -> State:
        span = spans[n]
        part = run._replace(steps=span.stop - span.start, masks=run.masks and run.masks[span])
        within = sizes[span] if sizes else None
        over = partial(scan_packed, sizes=within) if within else scan

        def steps_of_block(piece: Tensor, *state: Tensor | None) -> tuple[Tensor, ...]:
            outputs, final = run_pass(part, k, piece, state, over, within)
            return outputs.rows(), *final

        found = checkpoint(steps_of_block, piece, *state, use_reentrant=False, preserve_rng_state=draws)
        put_out[n] = found[0]
        return tuple(found[1:])

    # packed rows go on from block to block, each with the rows of its first step, as they do from step to step
    over_blocks = partial(scan_packed, sizes=[sizes[span.start] for span in spans]) if sizes else scan
    _, final = over_blocks(over_block, torch.split(rows, counts), start, reverse=reverse)
    return Rows(torch.cat(put_out), steps, recurrence.output_size), final
