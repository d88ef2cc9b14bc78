"""Packed sequences inside of graphs, whose sizes cannot depend on lengths.

Their rows stay padded there, and lengths go beside them: a row that has ended keeps its state in the steps that
remain. Layers, and torch's own functions of packing, work on such a sequence as on any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.core.arguments import as_states
from unroll.core.errors import Problem, UnrollError
from unroll.core.weights import Tensorlike
from unroll.packed.guard import mark, unmark

PLACE = "pack_padded_sequence"


class PaddedSizes:
    """The stand-in of a padded batch for `batch_sizes`, in a `PackedSequence` whose data are all its rows.

    Attributes:
        lengths: steps of each row, sorted falling, int64 `[B]`.
        steps: T, of the padding.
        count: B.
        mask: true for rows that have a step, boolean `[T * B, 1]`.

    Raises:
        UnrollError: for all that batch sizes are asked for, which depends on lengths.
    """

    device = torch.device("cpu")
    """The device on which torch wants batch sizes"""

    def __init__(self, lengths: Tensor, steps: int, count: int, mask: Tensor) -> None:
        self.lengths, self.steps, self.count, self.mask = lengths, steps, count, mask

    def filled(self, rows: Tensor) -> Tensor:
        """Return these rows, `[T * B, ...]`, with the first step of a row in place of all that follows its end.

        What is computed from padding is thrown away, but a gradient of 0 comes back, and is NaN behind a function
        that has none there, such as a norm of zeros. A step of the same row has a gradient if the row has one.
        """
        ones = [1] * (rows.dim() - 1)
        first = rows[: self.count].repeat(self.steps, *ones)  # broadcast instead, its strides would keep a batch fixed
        return torch.where(self.mask.reshape(-1, *ones), rows, first)

    def __bool__(self) -> bool:  # or it would be asked for its length
        return True

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what Python asks of any object
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        finding = "is read, and depends on lengths, which only the running graph knows"
        raise UnrollError(Problem("packed.batch_sizes", finding, "work with the lengths"))

    __torch_function__: Any = classmethod(_refuse)  # pyright: ignore[reportArgumentType]
    __getitem__ = __len__ = __iter__ = __int__ = __index__ = __float__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _refuse
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _refuse


def _refuse_to_leave(sizes: PaddedSizes) -> NoReturn:
    """Refuse `torch.export`, which takes a model's results apart: these are no part that a graph can have."""
    finding = "leaves the model, in a sequence with rows of padding among its rows"
    raise UnrollError(Problem("packed.batch_sizes", finding, "return what pad_packed_sequence makes of it"))


pytree.register_pytree_node(PaddedSizes, _refuse_to_leave, _refuse_to_leave)  # pyright: ignore[reportArgumentType]


def is_padded(input: Any) -> bool:
    """Tell whether this is a `PackedSequence` whose rows are padded."""
    return isinstance(input, PackedSequence) and isinstance(input.batch_sizes, PaddedSizes)


def refuse_ragged(place: str) -> NoReturn:
    """Refuse a sequence without its padding that is given to a graph."""
    finding = "is given a sequence that was packed outside of the graph, or outside of unroll.packing()"
    fix = "pack it in the model, and export that within `with unroll.packing():`, or call unroll.compile(model)"
    raise UnrollError(Problem(place, finding, fix))


def known_sizes(packed: PackedSequence, place: str) -> list[int]:
    """Return the batch sizes of a sequence without its padding, unless it is the input of a graph, which knows none."""
    if has_static_value(packed.batch_sizes.shape[0]):
        sizes = packed.batch_sizes.tolist()
        if all(has_static_value(size) for size in sizes):
            _check_rows(packed, sum(sizes), place)
            return sizes
    refuse_ragged(place)


def _check_rows(packed: PackedSequence, asked: int, place: str) -> None:
    """Refuse fewer rows than batch sizes ask for, as torch packs them where a length is above the padded steps."""
    rows = packed.data.shape[0]
    if has_static_value(rows) and rows != asked:
        finding = f"has {rows} rows, and batch sizes that ask for {asked}"
        fix = "give pack_padded_sequence no length above the number of padded steps"
        raise UnrollError(Problem(f"{place}: packed.data", finding, fix))


def sort_states(packed: PackedSequence, hx: Any) -> tuple[Tensor, ...] | None:
    """Return an initial state in the order of a packed sequence's rows."""
    state, order = as_states(hx), packed.sorted_indices
    return state if state is None or order is None else tuple(s.index_select(1, order) for s in state)


def restore_order(packed: PackedSequence, states: Sequence[Tensor]) -> list[Tensor]:
    """Return last states in the order that rows had before they were packed."""
    order = packed.unsorted_indices
    return list(states) if order is None else [state.index_select(1, order) for state in states]


class Ragged:
    """The places of rows without padding among rows with it, as a recipe of tensor-like values.

    Step `t` has the rows `begins[t]` up to `ends[t]` of those without padding, and with it the rows `t * count` up to
    `t * count + sizes[t]`; those up to `(t + 1) * count` have ended.

    Args:
        sizes: rows in each step, falling, `[T]`.
        count: rows in the first step.
        row: the numbers from 0 up to `count`.
    """

    def __init__(self, sizes: Tensorlike, count: Any, row: Tensorlike) -> None:
        self.count, self.row = count, row
        self.ends = torch.cumsum(sizes, 0)
        self.begins = torch.sub(self.ends, sizes)
        # [T, count]: true if row b has a step t
        self.going = torch.lt(row, torch.reshape(sizes, (-1, 1)))

    def mask(self) -> Tensorlike:
        """Return the rows with padding that have a step, as a boolean `[T * count, 1]`."""
        return torch.reshape(self.going, (-1, 1))

    def padded(self) -> Tensorlike:
        """Return the row that each with padding is, `[T * count]`: that of the first step where it has ended."""
        index = torch.where(self.going, torch.add(self.row, torch.reshape(self.begins, (-1, 1))), self.row)
        return torch.reshape(index, (-1,))

    def unpadded(self, entry: Tensorlike) -> Tensorlike:
        """Return the places of the rows without padding, of these numbers, among those with padding."""
        # an entry's step is the number of steps that end at or before it
        step = torch.searchsorted(self.ends, entry, right=True)
        position = torch.sub(entry, self.begins.index_select(0, step))
        return torch.add(torch.mul(step, self.count), position)


def pad_rows(packed: PackedSequence, steps: int) -> tuple[Tensor, Tensor]:
    """Pad the rows of a packed sequence to `steps`, `[T * B, F]`; and tell which have a step, `[T * B, 1]`."""
    sizes: Any = packed.batch_sizes
    found = sizes.steps if is_padded(packed) else len(sizes)
    message = f"the longest sequence must have at most {steps} time steps, as unrolled for; unroll again for more"
    torch._assert(found <= steps, message)
    if is_padded(packed):
        torch._assert(found == steps, f"sequences must be padded to {steps} time steps, as unrolled for")
        rows = unmark(packed.data)
        rows = rows.view_as(rows)  # while what the model itself does with the data is watched
        mark(packed.data)
        return rows, sizes.mask
    ragged = _ragged(packed, steps)
    device = packed.data.device
    return packed.data.index_select(0, ragged.padded().to(device)), ragged.mask().to(device)


def unpad_rows(packed: PackedSequence, rows: Tensor, steps: int) -> PackedSequence:
    """Return the same packing around what has become of its rows."""
    if is_padded(packed):
        sizes: Any = packed.batch_sizes
        return PackedSequence(mark(sizes.filled(rows)), *packed[1:])
    index = _ragged(packed, steps).unpadded(torch.arange(len(packed.data)))
    return PackedSequence(rows.index_select(0, index.to(rows.device)), *packed[1:])


def _ragged(packed: PackedSequence, steps: int) -> Ragged:
    # no row has the steps after the longest sequence
    sizes = functional.pad(packed.batch_sizes, (0, steps - len(packed.batch_sizes)))
    return Ragged(sizes, int(sizes[0]), torch.arange(int(sizes[0])))


def initial_states(packed: PackedSequence, hx: Any, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Return initial states in the order of the rows, zeros for None; passes and features of each are in `shapes`."""
    sizes: Any = packed.batch_sizes
    count = sizes.count if is_padded(packed) else int(sizes[0])
    state = sort_states(packed, hx)
    if state is None:
        return tuple(packed.data.new_zeros(passes, count, size) for passes, size in shapes)
    for s, (passes, size) in zip(state, shapes, strict=True):
        good = tuple(s.shape) == (passes, count, size)
        torch._assert(good, f"an initial state must have shape {[passes, count, size]}")
    return state
