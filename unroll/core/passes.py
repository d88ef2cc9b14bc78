"""The orders in which the steps of a layer can go: each pass by itself, or several as one step of their stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from unroll.core.cells import Prepared, State, Value
from unroll.core.recurrence import Recurrence
from unroll.core.scan import Divide, Names, Outputs, Pieces, Rows, Step, divided, joined, masked, sweep


class Layout(NamedTuple):
    """The parameters as the steps want them."""

    passes: list[Prepared]
    """For each layer and direction"""
    stacks: list[Prepared]
    """For passes that go together, a step of theirs being one batched product: the directions of each layer, or all
    layers; empty where each goes by itself"""
    widths: tuple[int, ...]
    """Features of what a step reads of the input, for each product"""


def scope(recurrence: Recurrence, k: int) -> str:
    """What pass number `k` is called: `l1`, `l1.reverse`."""
    layer, direction = divmod(k, len(recurrence.directions))
    return f"l{layer}.reverse" if recurrence.directions[direction] else f"l{layer}"


class Orders(NamedTuple):
    """The orders in which the steps of a layer can go."""

    recurrence: Recurrence
    layout: Layout
    steps: Any
    names: Names
    masks: list[Value] | None
    """`[B, 1]` for each step, or None"""
    divide: Divide = divided
    """Makes pieces of rows that steps read themselves, not as what a product is added to"""

    def step(self, scope: str, weights: Prepared, masks: Any) -> Step:
        """The steps of one pass, or of several stacked, with a mask for each or None."""

        def step(t: Any, x: tuple[Value, ...], state: State) -> State:
            self.names.enter(f"{scope}.t{t}")
            new = self.recurrence.cell.step(x, state, weights, self.names)
            return new if masks is None else masked(masks[t], new, state)

        return step

    def pieces(self, rows: Value, sizes: Sequence[int] | None = None) -> Sequence[Value]:
        """What each step reads of projected rows, of which there may be `sizes`."""
        into_products = self.recurrence.cell.folds and not any(m.summed for m in self.layout.passes[0].hidden)
        return divided(rows, self.steps, sizes) if sizes or into_products else self.divide(rows, self.steps)

    def one_direction(
        self, k: int, rows: Value, start: State, over: Callable, sizes: Sequence[int] | None, *, whole: bool
    ) -> tuple[Outputs, State]:
        """Pass number `k`, by itself. With `whole`, `over` is given the rows of all steps, and returns them."""
        recurrence, weights, here = self.recurrence, self.layout.passes[k], scope(self.recurrence, k)
        self.names.enter(here)
        projected = [inputs(rows) for inputs in weights.inputs]
        step = self.step(here, weights, self.masks)
        reverse = recurrence.directions[k % len(recurrence.directions)] == "reverse"
        if whole:
            xs: Any = tuple(self.names(x, "x") for x in projected)
            put_out, final = over(step, xs, start, reverse=reverse)
            return Rows(put_out, self.steps, recurrence.output_size), final
        pieces = zip(*(self.pieces(x, sizes) for x in projected), strict=True)
        xs = [tuple(self.names(x, f"t{t}.x") for x in parts) for t, parts in enumerate(pieces)]
        put_out, final = over(step, xs, start, reverse=reverse)
        return Pieces(put_out), final

    def both_directions(self, layer: int, rows: Value, starts: Sequence[State]) -> tuple[list[Outputs], list[State]]:
        """A bidirectional layer in T steps: step `s` is step `s` forwards and step `T - 1 - s` backwards, stacked."""
        steps, size, weights = self.steps, self.recurrence.output_size, self.layout.stacks[layer]
        self.names.enter(f"l{layer}.stacked")

        def side_by_side(ahead: Value, back: Value, width: int) -> Sequence[Value]:
            """`[2, B, width]` for each step, of rows `[T * B, width]`."""
            ahead, back = (torch.reshape(x, (steps, -1, width)) for x in (ahead, back))
            both = torch.stack([ahead, torch.flip(back, [0])], 1)
            return self.pieces(torch.reshape(both, (2 * steps, -1, width)))

        passes = self.layout.passes[2 * layer : 2 * layer + 2]
        pieces = [
            side_by_side(ahead(rows), back(rows), width)
            for ahead, back, width in zip(passes[0].inputs, passes[1].inputs, self.layout.widths, strict=True)
        ]
        masks = None if self.masks is None else [torch.stack([m, n]) for m, n in zip(self.masks, self.masks[::-1])]
        start = tuple(None if parts[0] is None else torch.stack(list(parts)) for parts in zip(*starts, strict=True))
        hs, final = sweep(self.step(f"l{layer}.stacked", weights, masks), list(zip(*pieces, strict=True)), start)
        whole = torch.reshape(joined(hs), (steps, 2, -1, size))
        return [_Side(hs, whole, side, size) for side in (0, 1)], _unstacked(final, 2)

    def wavefront(
        self, rows: Value, starts: Sequence[State], dropout: Callable[[Value], Value] | None
    ) -> tuple[list[Outputs], list[State]]:
        """All layers in T + L - 1 waves: in wave `w`, layer `l` does step `w - l`, with what `l - 1` put out before.

        Waves in which all layers have a step and a state are steps of the stack; in the others, at both ends,
        each layer goes by itself.
        """
        recurrence, steps, count = self.recurrence, self.steps, self.recurrence.num_layers
        passes, (weights,), widths = self.layout.passes, self.layout.stacks, self.layout.widths
        self.names.enter("l0")
        projected: list[Any] = [inputs(rows) for inputs in passes[0].inputs]
        kept = self._kept(projected[0], widths[0], dropout)
        first = list(zip(*map(self.pieces, projected), strict=True))  # [B, n]
        flat = (torch.reshape(x, (steps, -1, width)) for x, width in zip(projected, widths, strict=True))
        stackable = list(zip(*(self.divide(x, steps) for x in flat), strict=True))  # [1, B, n]
        zeros = any(s is None for start in starts for s in start)
        begin, end = count - 1 + zeros, steps  # the waves of the stack
        masks = self.masks and {w: torch.stack(self.masks[w - count + 1 : w + 1][::-1]) for w in range(begin, end)}
        step = self.step("stacked", weights, masks)
        layers, stacked = list(starts), starts[0]
        outputs: list[Value] = [None] * steps
        core: list[Value] = []
        for w in range(steps + count - 1):
            if begin <= w < end:
                if w == begin:
                    self.names.enter("stacked")
                    stacked = tuple(torch.stack(list(parts)) for parts in zip(*layers, strict=True))
                self.names.enter(f"stacked.t{w}")
                below = torch.split(stacked[0], [count - 1, 1])[0]
                if kept:
                    below = torch.mul(below, torch.stack([k[w - layer] for layer, k in enumerate(kept, 1)]))
                above: list[Any] = [inputs(below) for inputs in weights.inputs]
                x = tuple(torch.cat([x, a]) for x, a in zip(stackable[w], above, strict=True))
                stacked = step(w, x, stacked)
                core.append(stacked[0])
                if w == end - 1:
                    layers = _unstacked(stacked, count)
                continue
            before = list(layers)
            for layer in range(max(0, w - steps + 1), min(count, w + 1)):
                t, here = w - layer, scope(recurrence, layer)
                self.names.enter(f"{here}.t{t}")
                x = first[t]
                if layer:
                    below = before[layer - 1][0]
                    below = torch.mul(below, kept[layer - 1][t]) if kept else below
                    x = tuple(inputs(below) for inputs in passes[layer].inputs)
                layers[layer] = self.step(here, passes[layer], self.masks)(t, x, before[layer])
            if w >= count - 1:
                outputs[w - count + 1] = layers[-1][0]
        if not core:
            return [Pieces(outputs)], layers
        return [_LastLayer(outputs, core, begin - count + 1, count, recurrence.output_size)], layers

    def _kept(
        self, projected: Value, width: int, dropout: Callable[[Value], Value] | None
    ) -> list[Sequence[Value]] | None:
        """What dropout does to the rows between layers, as factors for each step, `[B, P]`.

        They are drawn before the steps and in the order of the layers, as they are where layers follow each other.
        """
        if dropout is None:
            return None
        size = self.recurrence.output_size
        like = torch.split(projected, [size, width - size], 1)[0] if width > size else projected
        return [self.divide(dropout(torch.ones_like(like)), self.steps) for _ in range(1, self.recurrence.num_layers)]


class _Side(Outputs):
    """One of two stacked directions."""

    def __init__(self, hs: Sequence[Value], whole: Value, side: int, size: int) -> None:
        self.hs, self.whole, self.side, self.size, self.steps = hs, whole, side, size, len(hs)

    def at(self, t: int) -> Value:
        return torch.select(self.hs[self.steps - 1 - t if self.side else t], 0, self.side)

    def rows(self) -> Value:
        mine = torch.select(self.whole, 1, self.side)
        return torch.reshape(torch.flip(mine, [0]) if self.side else mine, (-1, self.size))


class _LastLayer(Outputs):
    """What the last layer put out: by itself in the first and last steps, and from step `begin` on in the stack."""

    def __init__(self, alone: list[Value], stacked: list[Value], begin: int, count: int, size: int) -> None:
        self.alone, self.stacked, self.begin, self.count, self.size = alone, stacked, begin, count, size
        self.steps, self.end = len(alone), begin + len(stacked)

    def at(self, t: int) -> Value:
        inside = self.begin <= t < self.end
        return torch.select(self.stacked[t - self.begin], 0, self.count - 1) if inside else self.alone[t]

    def rows(self) -> Value:
        stacked = torch.reshape(joined(self.stacked), (len(self.stacked), self.count, -1, self.size))
        middle = torch.reshape(torch.select(stacked, 1, self.count - 1), (-1, self.size))
        return torch.cat([*self.alone[: self.begin], middle, *self.alone[self.end :]])


def _unstacked(state: State, count: int) -> list[State]:
    """The state of each pass."""
    return [tuple(torch.select(s, 0, k) for s in state) for k in range(count)]
