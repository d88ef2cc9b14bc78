"""Runs a cell over time, directions and layers, and puts the pieces together.

Like the cells, everything here is a function of tensor-like values. Rows stay flat: a sequence is
`[T * B, features]`, split once into `T` pieces before the steps and joined once after them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from unroll.cells import Precision, Prepared, State, Value, Weights, stack
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


@dataclass(frozen=True)
class Outputs:
    """What the steps of one direction put out. It is put together when it is asked for."""

    steps: Any
    """How many: T"""
    at: Callable[[int], Value]
    """`h` after step `t`, `[B, P]`"""
    rows: Callable[[], Value]
    """`h` after every step, `[T * B, P]`"""

    @staticmethod
    def of_pieces(pieces: Sequence[Value]) -> Outputs:
        """From `h` of each step."""
        return Outputs(len(pieces), pieces.__getitem__, partial(_joined, pieces))

    @staticmethod
    def of_rows(rows: Value, steps: Any, size: int) -> Outputs:
        """From `h` of all steps, of `size` features."""
        return Outputs(steps, lambda t: torch.select(torch.reshape(rows, (steps, -1, size)), 0, t), lambda: rows)


class Layout(NamedTuple):
    """The parameters as the steps want them."""

    passes: list[Prepared]
    """For each layer and direction"""
    stacks: list[Prepared]
    """For passes that go together, a step of theirs being one batched product: the directions of each layer, or all
    layers; empty where each goes by itself"""
    widths: tuple[int, ...]
    """Features of what a step reads of the input, for each product"""


class Result(NamedTuple):
    """What the steps left, in pieces, so that a reader can take only those it needs."""

    outputs: list[Outputs]
    """Of the last layer, for each direction"""
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
) -> Layout:
    """Lay out the parameters for the steps.

    With float16 or bfloat16 as `dtype`, gates and `c` are computed in float32.
    """
    low = dtype in (torch.float16, torch.bfloat16)
    precision = Precision(dtype, torch.float32) if low else None
    passes = []
    for k, w in enumerate(weights):
        names.enter(scope(recurrence, k))
        prepared = recurrence.cell.prepare(w, plan.gates, recurrence.hidden_size, precision)
        for kind, maps in (("ih", prepared.inputs), ("hh", prepared.hidden)):
            for weight, bias, _ in maps:
                names(weight, f"weight_{kind}")
                if bias is not None:
                    names(bias, f"bias_{kind}")
        passes.append(prepared)
    stacks = []
    if plan.directions == "stacked" and recurrence.bidirectional:
        for layer in range(recurrence.num_layers):
            names.enter(f"l{layer}.stacked")
            stacks.append(stack(passes[2 * layer : 2 * layer + 2]))
    elif plan.layers == "wavefront" and not recurrence.bidirectional and recurrence.num_layers > 1:
        names.enter("stacked")
        inputs = stack(passes[1:]).inputs  # the first layer has other features, and its input is known before the steps
        stacks.append(stack([p._replace(inputs=()) for p in passes])._replace(inputs=inputs))
    widths = tuple(len(g) * recurrence.hidden_size for g in recurrence.cell.input_products(plan.gates))
    return Layout(passes, stacks, widths)


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
    layout: Layout,
    rows: Value,
    state: tuple[Value, ...] | None,
    *,
    steps: Any,
    sizes: Sequence[int] | None = None,
    mask: Value | None = None,
    dropout: Callable[[Value], Value] | None = None,
    loop: Callable[..., tuple[Value, State]] | None = None,
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
        names: told the scope of what is computed, `l1.reverse.t7`.
    """
    names.enter("state")
    starts = _starts(recurrence, layout.passes, state)
    masks = None if mask is None or loop else _pieces(mask, steps)
    stacks = [] if sizes or loop else layout.stacks
    here = _Unrolling(recurrence, layout, steps, names, masks)
    if stacks and not recurrence.bidirectional:
        outputs, finals = here.wavefront(rows, starts, dropout)
    else:
        outputs, finals = [], []
        over = loop or (partial(sweep_packed, sizes=sizes) if sizes else sweep)
        for layer in range(recurrence.num_layers):
            if layer:
                names.enter(f"l{layer}")
                rows = joined_rows(outputs)
                rows = dropout(rows) if dropout else rows
            if stacks:
                outputs, states = here.both_directions(layer, rows, starts[2 * layer : 2 * layer + 2])
            else:
                passes = range(len(finals), len(finals) + len(recurrence.directions))
                swept = [here.one_direction(k, rows, starts[k], over, sizes, whole=loop is not None) for k in passes]
                outputs, states = [list(parts) for parts in zip(*swept, strict=True)]
            finals += states
    narrowed = [(h, *(layout.passes[0].narrow(c) for c in rest)) for h, *rest in finals]
    return Result(outputs, [list(parts) for parts in zip(*narrowed, strict=True)])


class _Unrolling(NamedTuple):
    """The orders in which the steps of a layer can go."""

    recurrence: Recurrence
    layout: Layout
    steps: Any
    names: Names
    masks: Sequence[Value] | None
    """`[B, 1]` for each step, or None"""

    def step(self, scope: str, weights: Prepared, masks: Sequence[Value] | None) -> Step:
        """The steps of one pass, or of several stacked."""

        def step(t: Any, x: tuple[Value, ...], state: State) -> State:
            self.names.enter(f"{scope}.t{t}")
            new = self.recurrence.cell.step(x, state, weights, self.names)
            return new if masks is None else _masked(masks[t], new, state)

        return step

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
            return Outputs.of_rows(put_out, self.steps, recurrence.output_size), final
        pieces = zip(*(_pieces(x, self.steps, sizes) for x in projected), strict=True)
        xs = [tuple(self.names(x, f"t{t}.x") for x in parts) for t, parts in enumerate(pieces)]
        put_out, final = over(step, xs, start, reverse=reverse)
        return Outputs.of_pieces(put_out), final

    def both_directions(self, layer: int, rows: Value, starts: Sequence[State]) -> tuple[list[Outputs], list[State]]:
        """A bidirectional layer in T steps: step `s` is step `s` forwards and step `T - 1 - s` backwards, stacked."""
        steps, size, weights = self.steps, self.recurrence.output_size, self.layout.stacks[layer]
        self.names.enter(f"l{layer}.stacked")

        def side_by_side(ahead: Value, back: Value, width: int) -> Sequence[Value]:
            """`[2, B, width]` for each step, of rows `[T * B, width]`."""
            ahead, back = (torch.reshape(x, (steps, -1, width)) for x in (ahead, back))
            both = torch.stack([ahead, torch.flip(back, [0])], 1)
            return _pieces(torch.reshape(both, (2 * steps, -1, width)), steps)

        passes = self.layout.passes[2 * layer : 2 * layer + 2]
        pieces = [
            side_by_side(ahead(rows), back(rows), width)
            for ahead, back, width in zip(passes[0].inputs, passes[1].inputs, self.layout.widths, strict=True)
        ]
        masks = None if self.masks is None else [torch.stack([m, n]) for m, n in zip(self.masks, self.masks[::-1])]
        start = tuple(None if parts[0] is None else torch.stack(list(parts)) for parts in zip(*starts, strict=True))
        hs, final = sweep(self.step(f"l{layer}.stacked", weights, masks), list(zip(*pieces, strict=True)), start)
        whole = torch.reshape(_joined(hs), (steps, 2, -1, size))

        def direction(side: int) -> Outputs:
            def rows() -> Value:
                mine = torch.select(whole, 1, side)
                return torch.reshape(torch.flip(mine, [0]) if side else mine, (-1, size))

            return Outputs(steps, lambda t: torch.select(hs[steps - 1 - t if side else t], 0, side), rows)

        return [direction(0), direction(1)], _unstacked(final, 2)

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
        first = list(zip(*(_pieces(x, steps) for x in projected), strict=True))  # [B, n]
        flat = (torch.reshape(x, (steps, -1, width)) for x, width in zip(projected, widths, strict=True))
        stackable = list(zip(*(_pieces(x, steps) for x in flat), strict=True))  # [1, B, n]
        zeros = any(s is None for start in starts for s in start)
        begin, end = count - 1 + zeros, steps  # the waves of the stack
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
                new = recurrence.cell.step(x, stacked, weights, self.names)
                if self.masks is not None:
                    new = _masked(torch.stack([self.masks[w - layer] for layer in range(count)]), new, stacked)
                stacked = new
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
        return [self._last_layer(outputs, core, begin - count + 1)], layers

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
        return [_pieces(dropout(torch.ones_like(like)), self.steps) for _ in range(1, self.recurrence.num_layers)]

    def _last_layer(self, outputs: list[Value], core: list[Value], begin: int) -> Outputs:
        """What the last layer put out: by itself in the first and last steps, and from step `begin` on in the stack."""
        if not core:
            return Outputs.of_pieces(outputs)
        size, last = self.recurrence.output_size, self.recurrence.num_layers - 1

        def rows() -> Value:
            stacked = torch.reshape(_joined(core), (len(core), last + 1, -1, size))
            middle = torch.reshape(torch.select(stacked, 1, last), (-1, size))
            return torch.cat([*outputs[:begin], middle, *outputs[begin + len(core) :]])

        def at(t: int) -> Value:
            inside = begin <= t < begin + len(core)
            return torch.select(core[t - begin], 0, last) if inside else outputs[t]

        return Outputs(self.steps, at, rows)


def _unstacked(state: State, count: int) -> list[State]:
    """The state of each pass."""
    return [tuple(torch.select(s, 0, k) for s in state) for k in range(count)]


def _masked(mask: Value, new: State, old: State) -> State:
    """The new state in the rows that have a step, the old one in the others."""
    return tuple(torch.where(mask, n, s) for n, s in zip(new, old, strict=True))


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
        starts.append(none if s is None else _pieces(s, recurrence.passes))
    return list(zip(*starts, strict=True))


def _pieces(rows: Value, count: int, sizes: Sequence[int] | None = None) -> Sequence[Value]:
    if sizes is not None:
        return torch.split(rows, list(sizes))
    if count > 1 and isinstance(rows, torch.Tensor):  # sizes given, torch.export keeps a symbolic batch; chunk fixes it
        return torch.split(rows, [rows.shape[0] // count] * count)
    return torch.chunk(rows, count) if count > 1 else (rows,)


def _joined(pieces: Sequence[Value]) -> Value:
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


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
        rows = _joined(parts)
        if recurrence.is_cell:
            states.append(rows if batched else torch.reshape(rows, (size,)))
        else:
            states.append(torch.reshape(rows, (recurrence.passes, -1, size)) if batched else rows)
    return states
