"""Passes that go together, one step of theirs being one batched product: both directions of a layer, or all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from unroll.core.cells import State
from unroll.core.passes import Run
from unroll.core.recurrence import scope
from unroll.core.rows import join_rows
from unroll.core.scan import Outputs, Pieces, scan
from unroll.core.weights import Tensorlike

Dropout = Callable[[Tensorlike], Tensorlike] | None


def run_directions(
    run: Run, layer: int, rows: Tensorlike, starts: Sequence[State]
) -> tuple[list[Outputs], list[State]]:
    """Run a bidirectional layer in T steps: step `s` is step `s` forwards and step `T - 1 - s` backwards, stacked."""
    steps, size, weights = run.steps, run.recurrence.output_size, run.layout.stacks[layer]
    run.target.enter(f"l{layer}.stacked")

    def side_by_side(ahead: Tensorlike, back: Tensorlike, width: int) -> Sequence[Tensorlike]:
        """Return `[2, B, width]` for each step, of rows `[T * B, width]`."""
        ahead, back = (torch.reshape(x, (steps, -1, width)) for x in (ahead, back))
        both = torch.stack([ahead, torch.flip(back, [0])], 1)
        return run.pieces(torch.reshape(both, (2 * steps, -1, width)))

    passes = run.layout.passes[2 * layer : 2 * layer + 2]
    pieces = [
        side_by_side(ahead(rows), back(rows), width)
        for ahead, back, width in zip(passes[0].inputs, passes[1].inputs, run.layout.widths, strict=True)
    ]
    masks = None if run.masks is None else [torch.stack([m, n]) for m, n in zip(run.masks, run.masks[::-1])]
    start = tuple(None if parts[0] is None else torch.stack(list(parts)) for parts in zip(*starts, strict=True))
    if run.target.joined:
        xs, mask = [torch.stack(list(parts)) for parts in pieces], None if masks is None else torch.stack(masks)
        whole, final = run.joined(weights, xs, start, mask)
        hs: Sequence[Tensorlike] = whole.unbind()
    else:
        hs, final = scan(run.step(f"l{layer}.stacked", weights, masks), list(zip(*pieces, strict=True)), start)
        whole = torch.reshape(join_rows(hs), (steps, 2, -1, size))
    return [_Side(hs, whole, side, size) for side in (0, 1)], _unstack(final, 2)


def run_wavefront(
    run: Run, rows: Tensorlike, starts: Sequence[State], dropout: Dropout
) -> tuple[list[Outputs], list[State]]:
    """Run all layers in T + L - 1 waves: in wave `w`, layer `l` does step `w - l`, with what `l - 1` put out before.

    Waves in which all layers have a step and a state are steps of the stack; in the others, at both ends,
    each layer goes by itself. With L = 3 layers and T = 5 steps, where a number is a step and [ ] a stack:

        wave       0   1    2    3    4    5   6
        layer 0    0   1  [ 2 ][ 3 ][ 4 ]
        layer 1        0  [ 1 ][ 2 ][ 3 ]  4
        layer 2           [ 0 ][ 1 ][ 2 ]  3   4
    """
    recurrence, steps, count = run.recurrence, run.steps, run.recurrence.num_layers
    passes, (weights,), widths = run.layout.passes, run.layout.stacks, run.layout.widths
    run.target.enter("l0")
    projected: list[Any] = [inputs(rows) for inputs in passes[0].inputs]
    kept = _draw_kept(run, projected[0], dropout)
    # The first layer's input is known before the steps: in pieces [B, n] where it goes by itself, else [1, B, n].
    first = list(zip(*map(run.pieces, projected), strict=True))
    flat = (torch.reshape(x, (steps, -1, width)) for x, width in zip(projected, widths, strict=True))
    stackable = list(zip(*(run.target.divide(x, steps) for x in flat), strict=True))
    # The stack begins when the last layer has a step, and a wave later if layers begin with zeros that are left out:
    # after its own first step each has a state. It ends with the last step of the first layer.
    zeros = any(s is None for start in starts for s in start)
    begin, end = count - 1 + zeros, steps
    masks = run.masks and {w: torch.stack(run.masks[w - count + 1 : w + 1][::-1]) for w in range(begin, end)}
    step = run.step("stacked", weights, masks)
    layers, stacked = list(starts), starts[0]
    outputs: list[Tensorlike] = [None] * steps
    core: list[Tensorlike] = []
    for w in range(steps + count - 1):
        if begin <= w < end:
            if w == begin:
                run.target.enter("stacked")
                stacked = tuple(torch.stack(list(parts)) for parts in zip(*layers, strict=True))
            run.target.enter(f"stacked.t{w}")
            # Every layer but the first reads what the one below it put out in the wave before.
            below = torch.split(stacked[0], [count - 1, 1])[0]
            if kept:
                below = torch.mul(below, torch.stack([k[w - layer] for layer, k in enumerate(kept, 1)]))
            above: list[Any] = [weights.project(inputs, below) for inputs in weights.inputs]
            x = tuple(torch.cat([x, a]) for x, a in zip(stackable[w], above, strict=True))
            stacked = step(w, x, stacked)
            core.append(stacked[0])
            if w == end - 1:
                layers = _unstack(stacked, count)
            continue
        before = list(layers)  # of this wave: no layer reads what another puts out in it
        for layer in range(max(0, w - steps + 1), min(count, w + 1)):
            t, here = w - layer, scope(recurrence, layer)
            run.target.enter(f"{here}.t{t}")
            x = first[t]
            if layer:
                below = before[layer - 1][0]
                below = torch.mul(below, kept[layer - 1][t]) if kept else below
                x = tuple(inputs(below) for inputs in passes[layer].inputs)
            layers[layer] = run.step(here, passes[layer], run.masks)(t, x, before[layer])
        if w >= count - 1:
            outputs[w - count + 1] = layers[-1][0]
    if not core:
        return [Pieces(outputs)], layers
    return [_LastLayer(outputs, core, begin - count + 1, count, recurrence.output_size)], layers


def _draw_kept(run: Run, projected: Tensorlike, dropout: Dropout) -> list[Sequence[Tensorlike]] | None:
    """Draw what dropout does to the rows between layers, as factors for each step, `[B, P]`.

    They are drawn before the steps and in the order of the layers, as they are where layers follow each other.
    """
    if dropout is None:
        return None
    size, width = run.recurrence.output_size, run.layout.widths[0]
    like = torch.split(projected, [size, width - size], 1)[0] if width > size else projected
    layers = range(1, run.recurrence.num_layers)
    return [run.target.divide(dropout(torch.ones_like(like)), run.steps) for _ in layers]


class _Side(Outputs):
    """The outputs of one of two stacked directions."""

    def __init__(self, hs: Sequence[Tensorlike], whole: Tensorlike, side: int, size: int) -> None:
        self.hs, self.whole, self.side, self.size, self.steps = hs, whole, side, size, len(hs)

    def at(self, t: int) -> Tensorlike:
        return torch.select(self.hs[self.steps - 1 - t if self.side else t], 0, self.side)

    def rows(self) -> Tensorlike:
        mine = torch.select(self.whole, 1, self.side)
        return torch.reshape(torch.flip(mine, [0]) if self.side else mine, (-1, self.size))


class _LastLayer(Outputs):
    """The outputs of the last layer: by itself in the first and last steps, and from step `begin` on in the stack."""

    def __init__(self, alone: list[Tensorlike], stacked: list[Tensorlike], begin: int, count: int, size: int) -> None:
        self.alone, self.stacked, self.begin, self.count, self.size = alone, stacked, begin, count, size
        self.steps, self.end = len(alone), begin + len(stacked)

    def at(self, t: int) -> Tensorlike:
        inside = self.begin <= t < self.end
        return torch.select(self.stacked[t - self.begin], 0, self.count - 1) if inside else self.alone[t]

    def rows(self) -> Tensorlike:
        stacked = torch.reshape(join_rows(self.stacked), (len(self.stacked), self.count, -1, self.size))
        middle = torch.reshape(torch.select(stacked, 1, self.count - 1), (-1, self.size))
        return torch.cat([*self.alone[: self.begin], middle, *self.alone[self.end :]])


def _unstack(state: State, count: int) -> list[State]:
    """Return the state of each pass."""
    return [tuple(torch.select(s, 0, k) for s in state) for k in range(count)]
