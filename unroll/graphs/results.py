"""The results of a call, handed in parts to those that read them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from unroll.core import schedule
from unroll.core.recurrence import Recurrence
from unroll.core.scan import Outputs, Pieces
from unroll.core.values import Value
from unroll.graphs.effects import effect, is_written, origins, uses
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
    """

    def __init__(self, writer: GraphWriter, recurrence: Recurrence, result: schedule.Result, *, batched: bool) -> None:
        self.writer, self.recurrence, self.result, self.batched = writer, recurrence, result, batched

    def states(self) -> list[Returned]:
        """Return the last states."""
        wholes = schedule.joined_states(self.recurrence, self.result, batched=self.batched)
        rank = self.recurrence.rank(batched=self.batched)
        return [Returned(whole, rank, partial(self._read_state, k)) for k, whole in enumerate(wholes)]

    def output(self) -> Returned:
        """Return the output of all steps."""
        return self._view(self.result.outputs, None)

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
        return Returned(whole, rank, partial(self._read_output, outputs, step))

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


class Handover:
    """Gives the users of a call its results, through `getitem` chains of any depth.

    Torch's results have memory of their own each, where here `output[-1]` may be the last state. So a result that the
    graph writes into is copied as a whole, and of those in one memory that the graph returns, all but the first.

    Attributes:
        replaced: nodes that are gone, and those that hold their values now.
    """

    def __init__(self, writer: GraphWriter, replaced: dict[fx.Node, fx.Node]) -> None:
        self.writer, self.replaced = writer, replaced
        # nodes in whose memory the graph returns something, and of which result that is a part
        self._lent: dict[fx.Node, Any] = {}

    def give(self, node: fx.Node, results: Any) -> None:
        """Hand over what `node` returned: a `Returned`, or tuples of them."""
        written = {id(result) for user, holder, result in _readers(node, results) if _may_write(user, holder)}
        self._give(node, _each(results, lambda r: _copied(r) if id(r) in written else r))

    def _give(self, node: fx.Node, result: Any, source: Returned | None = None) -> None:
        """Hand over a part of the results, of which `source` is the result that it belongs to, if it belongs to one."""
        if isinstance(result, Returned):
            source = source or result
        for user in list(node.users):
            if isinstance(result, Returned):
                index = constant_index(user, node, result.rank)
                part = result if index == (ALL,) * result.rank else result.read(index) if index else None
                # A tensor with parts of its own, of which the users of `user` may need still less.
                if isinstance(part, Returned):
                    self._give(user, part, source)
                    node.graph.erase_node(user)
                    continue
                if part is not None:
                    own = self._apart(part.node, source, returned=_is_returned(user))
                    user.replace_all_uses_with(own)
                    self.replaced[user] = own
                    node.graph.erase_node(user)
                    continue
            elif (position := _position(user, node)) is not None:
                self._give(user, result[position], source)
                node.graph.erase_node(user)
                continue
            # Anything else reads the whole.
            returned = user.op == "output" or (effect(user, node).shares and _is_returned(user))
            whole = _each(result, lambda r, last=returned: self._apart(r.whole.node, source or r, returned=last))
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: whole if n is node else n)
            if isinstance(whole, fx.Node):
                self.replaced[node] = whole

    def _apart(self, value: fx.Node, source: Any, *, returned: bool) -> fx.Node:
        """Return a value, or a copy if the graph returns it and something of another result in the same memory."""
        memory = origins(value) if returned else ()
        if any(self._lent.get(origin, source) is not source for origin in memory):
            return self.writer.call(torch.clone, (Value(self.writer, node=value),), {}).node
        self._lent |= dict.fromkeys(memory, source)
        return value


def _each(results: Any, change: Callable[[Returned], Any]) -> Any:
    """Return the results with `change(result)` in place of each."""
    return change(results) if isinstance(results, Returned) else tuple(_each(part, change) for part in results)


def _copied(result: Returned) -> Returned:
    return undivided(torch.clone(result.whole), result.rank)  # pyright: ignore[reportArgumentType]


def _position(user: fx.Node, node: fx.Node) -> int | None:
    """Return the number at which a node takes an item out of a tuple, if that is what it does."""
    takes = user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int)
    return user.args[1] if takes else None  # pyright: ignore[reportReturnType]


def _readers(node: fx.Node, results: Any) -> Iterator[tuple[fx.Node, fx.Node, Returned]]:
    """Yield the nodes that read a result, each with what it reads it from and the result."""
    for user in node.users:
        position = None if isinstance(results, Returned) else _position(user, node)
        if position is not None:
            yield from _readers(user, results[position])
        else:
            found: list[Returned] = []
            _each(results, found.append)
            yield from ((user, node, result) for result in found)


def _may_write(user: fx.Node, operand: fx.Node) -> bool:
    does = effect(user, operand)
    return does.writes or (does.shares and is_written(user))


def _is_returned(node: fx.Node) -> bool:
    """Tell whether a graph returns what is in the memory of a value."""
    return any(user.op == "output" for user, _ in uses(node))


def constant_index(user: fx.Node, node: fx.Node, rank: int) -> tuple[Any, ...] | None:
    """Return the index at which `user` reads `node`, an entry for each dimension, if it does and with constants."""
    if not user.args or user.args[0] is not node or user.kwargs:
        return None
    index: Any
    if user.target is operator.getitem:
        index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        if index.count(...) == 1:
            at = index.index(...)
            index = index[:at] + (slice(None),) * (rank - len(index) + 1) + index[at + 1 :]
    elif user.target in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor):
        dim, *rest = user.args[1:] or (0,)
        # aten's slice(dim, start) has a start, where Python's slice of one argument has an end
        part = rest[0] if user.target is torch.ops.aten.select.int else slice(*(*rest, None, None, None)[:3])
        if not isinstance(dim, int):
            return None
        index = (slice(None),) * (dim % rank) + (part,)
    else:
        return None
    parts = [
        part
        for entry in index
        for part in ((entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,))
    ]
    # Entries that are None or bool add dimensions; nodes and tensors are no constants.
    if len(index) > rank or not all(part is None or type(part) is int for part in parts) or None in index:
        return None
    index += (slice(None),) * (rank - len(index))
    return tuple(slice(None) if _is_full(entry) else entry for entry in index)


def _is_full(entry: Any) -> bool:
    if not isinstance(entry, slice) or (entry.start or 0, entry.step or 1) != (0, 1):
        return False
    return entry.stop is None or entry.stop >= sys.maxsize
