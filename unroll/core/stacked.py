"""Passes that go together, one step of theirs being one batched product: both directions of a layer, or all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from unroll.core.cells import State
from unroll.core.passes import Run
from unroll.core.recurrence import scope
from unroll.core.rows import STEPS_PER_COPY, join_rows
from unroll.core.scan import Outputs, Pieces, scan
from unroll.core.weights import StepWeights, Tensorlike

Dropout = Callable[[Tensorlike], Tensorlike] | None


def run_directions(run: Run, layer: int, rows: Tensorlike, starts: Sequence[State]) -> tuple[list[Outputs], State]:
    """Run a bidirectional layer in T steps: step `s` is step `s` forwards and step `T - 1 - s` backwards, stacked.

    Returns:
        The outputs of each direction, and the last state of both, `[2, B, size]`.
    """
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
    return [_OfStack(hs, whole, side, size, reverse=side == 1) for side in (0, 1)], run.narrowed(final)


def run_masked_waves(
    run: Run, rows: torch.Tensor, starts: Sequence[State], dropout: Dropout
) -> tuple[list[Outputs], State]:
    """Run all layers in T + L - 1 waves, each of them a stack: masks tell which layers have a step.

    This is for Inductor's code on a GPU, where each step of a layer by itself would be a kernel of its own.

    Returns:
        The outputs of the last layer, and the last state of all layers, `[L, B, size]`.
    """
    steps, count, size = run.steps, run.recurrence.num_layers, run.recurrence.output_size
    (weights,), waves = run.layout.stacks, steps + count - 1
    run.target.enter("l0")
    projected: list[Any] = [inputs(rows) for inputs in run.layout.passes[0].inputs]
    kept = _draw_kept(run, projected[0], dropout)
    first, masks = _stackable(run, projected), _wave_masks(run, rows)
    step = run.step("stacked", weights, masks)
    state = _stacked_start(run, starts, projected[0])
    hs: list[Tensorlike] = []
    for w in range(waves):
        factors = [k[_alike(w - layer, steps)] for layer, k in enumerate(kept, 1)]
        state = step(w, _inputs(weights, first[_alike(w, steps)], state[0], factors, count), state)
        hs.append(run.shown(state[0], masks[w]))
    whole = torch.reshape(join_rows(hs), (waves, count, -1, size))
    return [_OfStack(hs[count - 1 :], whole[count - 1 :], count - 1, size)], run.narrowed(state)


def _wave_masks(run: Run, rows: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return for each wave which layers have a step, `[L, 1, 1]`; of rows that may have ended, `[L, B, 1]`."""
    count, waves = run.recurrence.num_layers, run.steps + run.recurrence.num_layers - 1
    wave, layer = (torch.arange(n, device=rows.device) for n in (waves, count))
    step = torch.reshape(wave[:, None] - layer, (-1,))
    have = torch.reshape((step >= 0) & (step < run.steps), (-1, 1, 1))
    if run.masks is not None:
        have = have & torch.stack(run.masks)[step.clamp(0, run.steps - 1)]
    return run.target.divide(have, waves)


def _stacked_start(run: Run, starts: Sequence[State], projected: torch.Tensor) -> State:
    """Return initial states, `[L, B, size]`; of zeros that are left out those of `h` are None."""
    h, *rest = (None if parts[0] is None else torch.stack(list(parts)) for parts in zip(*starts, strict=True))
    shape = (len(starts), projected.shape[0] // run.steps, run.recurrence.hidden_size)
    zeros = run.layout.passes[0].widen(projected.new_zeros(shape))
    return h, *(zeros if c is None else c for c in rest)


def _alike(t: int, steps: int) -> int:
    """Return `t`, or in place of a step that is none one that is read from the same place of a copy of rows."""
    return t if 0 <= t < steps else max(range(t % STEPS_PER_COPY, steps, STEPS_PER_COPY), default=0)


def _stackable(run: Run, projected: Sequence[Tensorlike]) -> list[tuple[Tensorlike, ...]]:
    """Return what the first layer reads in each step, `[1, B, n]` for each product."""
    flat = (torch.reshape(x, (run.steps, -1, width)) for x, width in zip(projected, run.layout.widths, strict=True))
    return list(zip(*(run.target.divide(x, run.steps) for x in flat), strict=True))


def _inputs(
    weights: StepWeights, first: tuple[Tensorlike, ...], h: Tensorlike | None, kept: Sequence[Tensorlike], count: int
) -> tuple[Tensorlike, ...]:
    """Return what all layers read: `first`, and what comes of the outputs in the wave before of all but the last, `h`.

    Zeros that are left out are None. `kept` are the factors of dropout, if there is any.
    """
    if h is None:
        blank = [x.new_zeros(count - 1, *x.shape[1:]) for x in first]
        above: list[Any] = [torch.add(x, m.bias) if m.bias is not None else x for x, m in zip(blank, weights.inputs)]
    else:
        below = torch.split(h, [count - 1, 1])[0]
        below = torch.mul(below, torch.stack(list(kept))) if kept else below
        above = [weights.project(inputs, below) for inputs in weights.inputs]
    return tuple(torch.cat([x, a]) for x, a in zip(first, above, strict=True))


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
    passes, (weights,) = run.layout.passes, run.layout.stacks
    run.target.enter("l0")
    projected: list[Any] = [inputs(rows) for inputs in passes[0].inputs]
    kept = _draw_kept(run, projected[0], dropout)
    # The first layer's input is known before the steps: in pieces [B, n] where it goes by itself, else [1, B, n].
    first, stackable = list(zip(*map(run.pieces, projected), strict=True)), _stackable(run, projected)
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
            factors = [k[w - layer] for layer, k in enumerate(kept, 1)]
            stacked = step(w, _inputs(weights, stackable[w], stacked[0], factors, count), stacked)
            core.append(stacked[0])
            if w == end - 1:
                layers = unstack(stacked, count)
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
        return [Pieces(outputs)], list(map(run.narrowed, layers))
    last = _LastLayer(outputs, core, begin - count + 1, count, recurrence.output_size)
    return [last], list(map(run.narrowed, layers))


def _draw_kept(run: Run, projected: Tensorlike, dropout: Dropout) -> list[Sequence[Tensorlike]]:
    """Draw what dropout does to the rows between layers, as factors for each step, `[B, P]`.

    They are drawn before the steps and in the order of the layers, as they are where layers follow each other. Without
    dropout there are none.
    """
    if dropout is None:
        return []
    size, width = run.recurrence.output_size, run.layout.widths[0]
    like = torch.split(projected, [size, width - size], 1)[0] if width > size else projected
    layers = range(1, run.recurrence.num_layers)
    return [run.target.divide(dropout(torch.ones_like(like)), run.steps) for _ in layers]


class _OfStack(Outputs):
    """The outputs of pass number `k` of a stack, whose steps may be in the reverse of its order."""

    def __init__(
        self, hs: Sequence[Tensorlike], whole: Tensorlike, k: int, size: int, *, reverse: bool = False
    ) -> None:
        self.hs, self.whole, self.k, self.size, self.reverse, self.steps = hs, whole, k, size, reverse, len(hs)

    def at(self, t: int) -> Tensorlike:
        return self.hs[self.steps - 1 - t if self.reverse else t].select(0, self.k)

    def rows(self) -> Tensorlike:
        mine = self.whole.select(1, self.k)
        return torch.reshape(torch.flip(mine, [0]) if self.reverse else mine, (-1, self.size))


class _LastLayer(Outputs):
    """The outputs of the last layer: by itself in the first and last steps, and from step `begin` on in the stack."""

    def __init__(self, alone: list[Tensorlike], stacked: list[Tensorlike], begin: int, count: int, size: int) -> None:
        self.alone, self.stacked, self.begin, self.count, self.size = alone, stacked, begin, count, size
        self.steps, self.end = len(alone), begin + len(stacked)

    def at(self, t: int) -> Tensorlike:
        inside = self.begin <= t < self.end
        return self.stacked[t - self.begin].select(0, self.count - 1) if inside else self.alone[t]

    def rows(self) -> Tensorlike:
        stacked = torch.reshape(join_rows(self.stacked), (len(self.stacked), self.count, -1, self.size))
        middle = torch.reshape(stacked.select(1, self.count - 1), (-1, self.size))
        return torch.cat([*self.alone[: self.begin], middle, *self.alone[self.end :]])


def unstack(state: State, count: int) -> list[State]:
    """Return the state of each pass."""
    return [tuple(s.select(0, k) for s in state) for k in range(count)]
