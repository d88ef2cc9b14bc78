"""The results of a call, handed in parts to those that read them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from unroll.core import schedule
from unroll.core.recurrence import Recurrence
from unroll.core.scan import Outputs, Pieces
from unroll.core.values import Value
from unroll.graphs.users import constant_index
from unroll.graphs.writer import GraphWriter

ALL = slice(None)


class Returned(NamedTuple):
    """A tensor that a call returned, of which a part may be had without the whole."""

    whole: Value
    rank: int
    read: Callable[[tuple[Any, ...]], Value | Returned | None]
    """Return the part at an index of as many entries as the rank, or None if it takes the whole"""


def undivided(whole: Value, rank: int) -> Returned:
    """Return a tensor of which parts are taken from the whole."""
    return Returned(whole, rank, lambda index: None)


class Results:
    """The results of a layer, made of what its steps left.

    Args:
        writer: of the graph.
        recurrence: what the layer is.
        result: what its steps left.
        batched: whether its input has a batch.
        written: whether the graph writes into a result.
    """

    def __init__(
        self, writer: GraphWriter, recurrence: Recurrence, result: schedule.Result, *, batched: bool, written: bool
    ) -> None:
        self.writer, self.recurrence, self.result = writer, recurrence, result
        self.batched, self.written = batched, written

    def states(self) -> list[Returned]:
        """Return the last states."""
        wholes = schedule.joined_states(self.recurrence, self.result.finals, batched=self.batched)
        rank = self.recurrence.rank(batched=self.batched)
        return [self._returned(whole, rank, partial(self._read_state, k)) for k, whole in enumerate(wholes)]

    def output(self) -> Returned:
        """Return the output of all steps."""
        return self._view(self.result.outputs, None)

    def _returned(self, whole: Any, rank: int, read: Callable[[tuple[Any, ...]], Any]) -> Returned:
        if not self.written:
            return Returned(whole, rank, read)
        # Results, and parts of them, may share memory here, which those of the layer do not.
        return undivided(torch.clone(whole), rank)  # pyright: ignore[reportArgumentType]

    def _read_state(self, k: int, index: tuple[Any, ...]) -> Any:
        """Return the state of one layer and direction, for `h_n[-1]` and the like; None for other indices."""
        first, *rest = index
        parts = self.result.finals[k]
        if self.recurrence.is_cell or not isinstance(first, int) or not -len(parts) <= first < len(parts):
            return None
        part = parts[first] if self.batched else torch.reshape(parts[first], (self.recurrence.state_sizes[k],))
        return self._item(part, tuple(rest))

    def _view(self, outputs: list[Outputs], step: int | None) -> Returned:
        """Return the output of some directions, at one step or at all."""
        whole: Any
        if step is None:
            whole = schedule.joined_output(self.recurrence, outputs, batched=self.batched)
        else:
            whole = schedule.joined_rows([Pieces([output.at(step)]) for output in outputs])
            if not self.batched:
                whole = torch.reshape(whole, (len(outputs) * self.recurrence.output_size,))
        rank = 1 + self.batched + (step is None)
        return self._returned(whole, rank, partial(self._read_output, outputs, step))

    def _read_output(self, outputs: list[Outputs], step: int | None, index: tuple[Any, ...]) -> Any:
        """Return one step or direction, for `output[:, -1]`, `output[..., :size]` and the like; None for the whole."""
        rest, chosen, at = list(index), outputs, step
        size, features = self.recurrence.output_size, index[-1]
        # Features are [forward, reverse], `size` of each: an index inside of one half needs that direction alone.
        if len(outputs) == 2 and isinstance(features, int) and -2 * size <= features < 2 * size:
            side, rest[-1] = divmod(features % (2 * size), size)
            chosen = outputs[side : side + 1]
        elif len(outputs) == 2 and isinstance(features, slice):
            begin, end, stride = features.indices(2 * size)
            if end <= size or begin >= size:
                side = 0 if end <= size else 1
                chosen = outputs[side : side + 1]
                part = slice(begin - side * size, end - side * size, stride)
                rest[-1] = ALL if part == slice(0, size, 1) else part
        time, steps = self.recurrence.time_axis if self.batched else 0, outputs[0].steps
        if step is None and isinstance(index[time], int) and -steps <= index[time] < steps:
            at = rest.pop(time) % steps
        # Neither direction nor step has narrowed it.
        if chosen is outputs and at == step:
            return None
        view = self._view(chosen, at)
        return view if all(part == ALL for part in rest) else self._item(view.whole, tuple(rest))

    def _item(self, value: Any, index: tuple[Any, ...]) -> Value:
        """Return `value[index]`, or the value where that is all of it."""
        return value if all(part == ALL for part in index) else self.writer.index(value, index)


def hand_over(node: fx.Node, result: Any, replaced: dict[fx.Node, fx.Node]) -> None:
    """Give the users of `node` the results, through `getitem` chains of any depth.

    Args:
        node: what returned them.
        result: a `Returned`, or tuples of them.
        replaced: to which nodes are added that are gone, with those that hold their values now.
    """
    for user in list(node.users):
        if isinstance(result, Returned):
            index = constant_index(user, node, result.rank)
            whole = index == (ALL,) * result.rank
            part = result if whole else result.read(index) if index else None
            # A tensor with parts of its own, of which the users of `user` may need still less.
            if isinstance(part, Returned):
                hand_over(user, part, replaced)
                node.graph.erase_node(user)
                continue
            if part is not None:
                user.replace_all_uses_with(part.node)
                replaced[user] = part.node
                node.graph.erase_node(user)
                continue
        elif user.target is operator.getitem and user.args[0] is node:
            position: Any = user.args[1]
            hand_over(user, result[position], replaced)
            node.graph.erase_node(user)
            continue
        # Anything else reads the whole.
        whole = _whole(result)
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: whole if n is node else n)
        if isinstance(whole, fx.Node):
            replaced[node] = whole


def _whole(result: Any) -> Any:
    """Return the nodes of a result, in its structure."""
    return result.whole.node if isinstance(result, Returned) else tuple(map(_whole, result))
