"""Packed sequences inside of graphs, whose sizes cannot depend on lengths.

Their rows stay padded there, and lengths go beside them: a row that has ended keeps its state in the steps that
remain. Layers, and torch's own functions of packing, work on such a sequence as on any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_static_value, statically_known_true
from torch.nn import functional
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.core import patching
from unroll.core.patching import Local, patched
from unroll.core.recurrence import LAYERS, Problem, UnrollError
from unroll.packed.guard import CAPTURED, released, watched, watching, watching_graphs

PLACE = "pack_padded_sequence"


class Sizes:
    """What a padded batch has in place of `batch_sizes`, in a `PackedSequence` whose data are all its rows.

    Attributes:
        lengths: steps of each row, sorted falling, int64 `[B]`.
        steps: T, of the padding.
        count: B.
        mask: which rows have a step, boolean `[T * B, 1]`.

    Raises:
        UnrollError: for all that batch sizes are asked for, which depends on lengths.
    """

    device = torch.device("cpu")
    """Where torch wants batch sizes to be"""

    def __init__(self, lengths: Tensor, steps: int, count: int, mask: Tensor) -> None:
        self.lengths, self.steps, self.count, self.mask = lengths, steps, count, mask

    def filled(self, rows: Tensor) -> Tensor:
        """These rows, `[T * B, ...]`, with the first step of a row in place of all that follows its end.

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


def _refuse_to_leave(sizes: Sizes) -> NoReturn:
    """What `torch.export` calls to take a model's results apart, of which these are no part that a graph can have."""
    finding = "leaves the model, in a sequence with rows of padding among its rows"
    raise UnrollError(Problem("packed.batch_sizes", finding, "return what pad_packed_sequence makes of it"))


pytree.register_pytree_node(Sizes, _refuse_to_leave, _refuse_to_leave)  # pyright: ignore[reportArgumentType]


def is_padded(input: Any) -> bool:
    """Whether this is a `PackedSequence` whose rows are padded."""
    return isinstance(input, PackedSequence) and isinstance(input.batch_sizes, Sizes)


def _stopped(lengths: Tensor, good: Tensor, message: str) -> Tensor:
    """The lengths, from a graph that stops with the message unless all of `good` is true."""
    torch._assert_async(good.all(), message)
    return lengths


def stopped_by_index(lengths: Tensor, good: Tensor, message: str) -> Tensor:
    """The same where there are no assertions: what is not good reads beyond the end of a table of one zero."""
    table = torch.zeros(1, dtype=lengths.dtype, device=lengths.device)
    return lengths + table.index_select(0, (~good).to(torch.int64))


Check = Callable[[Tensor, Tensor, str], Tensor]
OnLayer = Callable[[Any, PackedSequence, Any], tuple[PackedSequence, Any]]


class Padding(NamedTuple):
    """How a thread packs while a graph is made."""

    on_layer: OnLayer
    """Runs torch's own layers on padded rows"""
    check: Check
    """Stops a graph that is given bad lengths"""


PADDING: Local[Padding] = Local("padding")
"""Of a thread that packs with padding where it makes a graph"""


def _is_padding() -> bool:
    """Whether this thread packs with padding. Dynamo asks it once, in the thread in which it reads."""
    return PADDING.value is not None


@functools.cache
def _unread() -> tuple[Any, Any]:
    """Torch's own functions, which Dynamo leaves out as ever where a thread does not pack with padding."""
    torch.compiler.assume_constant_result(_is_padding)
    torch.compiler.allow_in_graph([watched, released])
    return torch.compiler.disable(PACKS_RAGGED), torch.compiler.disable(PADS_RAGGED)


def _padding() -> bool:
    """Whether a graph is made, in this thread, that packs with padding."""
    return _is_padding() if torch.compiler.is_dynamo_compiling() else bool(CAPTURED.value) and _is_padding()


def _miscounted(found: int, count: int) -> Problem:
    return Problem(PLACE, f"there are {found} lengths for {count} rows", "give a length for each row")


class _Functions:
    """Stands in for `torch._VF`, from which `torch.nn.utils.rnn` takes what packs and pads."""

    def __init__(self, original: Any, check: Check, packs: Any, pads: Any) -> None:
        self.original, self.check, self.packs, self.pads = original, check, packs, pads

    @property
    def _check(self) -> Check:
        """That of this thread, whoever has replaced torch's functions last. While Dynamo reads, that is this thread."""
        if torch.compiler.is_dynamo_compiling() or PADDING.value is None:
            return self.check
        return PADDING.value.check

    def pack_padded_sequence(
        self, input: Tensor, lengths: Any, batch_first: bool, enforce_sorted: bool
    ) -> PackedSequence:
        if not _padding():
            return self.packs(input, lengths, batch_first, enforce_sorted)
        if not enforce_sorted:
            lengths = self._counted(input, lengths, batch_first)
        return PACKS_RAGGED(input, lengths, batch_first, enforce_sorted)

    def _counted(self, input: Tensor, lengths: Any, batch_first: bool) -> Any:
        """The lengths, of which there must be one for each row: with fewer, sorting would leave rows out."""
        if isinstance(lengths, Tensor) and lengths.dim() != 1:
            return lengths
        found = lengths.shape[0] if isinstance(lengths, Tensor) else len(lengths)
        count = input.shape[0 if batch_first else 1]
        if found != count:
            raise UnrollError(_miscounted(found, count))
        if isinstance(lengths, Tensor) and lengths.device == input.device and 0 not in input.shape:
            # For files, which have no guards on sizes: only what has as many rows can be stacked.
            rows = input.select(1 if batch_first else 0, 0)
            rows = rows.flatten(1).select(1, 0) if rows.dim() > 1 else rows
            lengths = torch.stack([lengths, rows.to(lengths.dtype)])[0]
        return lengths

    def _pack_padded_sequence(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Any]:
        if not _padding():
            return self.original._pack_padded_sequence(input, lengths, batch_first)
        input = input.transpose(0, 1) if batch_first else input
        steps, count, *features = input.shape
        problems = []
        if lengths.dim() != 1 or lengths.device.type != "cpu":
            finding = f"lengths are {lengths.dim()}-D, on {lengths.device}"
            problems.append(Problem(PLACE, finding, "give lengths.cpu(), 1-D"))
        elif lengths.shape[0] != count:
            problems.append(_miscounted(lengths.shape[0], count))
        if steps == 0 or count == 0 or 0 in features:
            problems.append(
                Problem(PLACE, f"the input is empty, {list(input.shape)}", "give at least one row and step")
            )
        if problems:
            raise UnrollError(*problems)
        check = self._check
        within = (lengths > 0) & (lengths <= steps)
        lengths = check(lengths, within, f"{PLACE}: lengths must be from 1 to the number of padded steps")
        falling = (lengths <= lengths.roll(1)) | (torch.arange(count) == 0)
        lengths = check(lengths, falling, f"{PLACE}: lengths must be sorted falling, or give enforce_sorted=False")
        mask = (torch.arange(steps)[:, None] < lengths).reshape(-1, 1).to(input.device)
        sizes = Sizes(lengths, steps, count, mask)
        return watched(sizes.filled(input.reshape(-1, *features))), sizes

    def _pad_packed_sequence(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.original._pad_packed_sequence(*args)

    def pad_packed_sequence(
        self, packed: PackedSequence, batch_first: bool, padding_value: float, total_length: Any
    ) -> tuple[Tensor, Tensor]:
        sizes: Any = packed.batch_sizes
        if not isinstance(sizes, Sizes):
            if not _padding():
                return self.pads(packed, batch_first, padding_value, total_length)
            refuse_ragged("pad_packed_sequence")
        data, steps, lengths = packed.data, sizes.steps, sizes.lengths
        features = data.shape[1:]
        mask = sizes.mask.reshape(-1, *[1] * len(features))
        padding = data.new_full((), padding_value)  # a number would make floats of integers
        result = torch.where(mask, released(data), padding).unflatten(0, (steps, sizes.count))
        watched(data)
        if total_length is None:
            longest = lengths.max().item()
            torch._check(longest >= 1)
            torch._check(longest <= steps)
            result = result[:longest]
        elif not statically_known_true(total_length == steps):
            message = f"pad_packed_sequence: total_length={total_length} is less than the longest length"
            lengths = self._check(lengths, lengths <= total_length, message)
            room = [0, 0] * (len(features) + 1) + [0, total_length - steps]
            result = functional.pad(result, room, value=padding_value)
        order = packed.unsorted_indices
        if order is not None:
            result, lengths = result.index_select(1, order), lengths[order.cpu()]
        return result.transpose(0, 1) if batch_first else result, lengths


PACKS: Any = rnn.pack_padded_sequence
PADS: Any = rnn.pad_packed_sequence
PACKS_RAGGED, PADS_RAGGED = (FunctionType(function.__code__, rnn.__dict__) for function in (PACKS, PADS))
"""The same functions, whose code stays as it is"""


def _packs(input, lengths, batch_first=False, enforce_sorted=True):
    """The code of torch's function while rows are kept, to be run among torch's names. Its own counts no lengths."""
    return _VF.pack_padded_sequence(input, lengths, batch_first, enforce_sorted)  # noqa: F821 # pyright: ignore


def _pads(sequence, batch_first=False, padding_value=0.0, total_length=None):
    """The code of torch's function while rows are kept, to be run among torch's names. Its own asks for batch sizes."""
    return _VF.pad_packed_sequence(sequence, batch_first, padding_value, total_length)  # noqa: F821 # pyright: ignore


def _forward_for(kind: Any, on_layer: OnLayer) -> Callable[..., Any]:
    """The `forward` of a kind of layer while rows are kept."""
    original = patching.original(kind, "forward")

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        if is_padded(input):
            run = on_layer
            if not torch.compiler.is_dynamo_compiling() and PADDING.value is not None:
                run = PADDING.value.on_layer
            return run(self, input, hx)
        if isinstance(input, PackedSequence) and torch.compiler.is_dynamo_compiling() and _is_padding():
            refuse_ragged(type(self).__name__)
        return original(self, input, hx)

    return forward


@contextmanager
def keeping_rows(on_layer: OnLayer, check: Check = _stopped, *, dynamo: bool = False) -> Iterator[None]:
    """While this lasts, sequences are packed with all their rows where a graph is made in this thread.

    Args:
        on_layer: runs torch's own layers on them.
        check: stops a graph that is given bad lengths.
        dynamo: whether Dynamo is to read torch's functions of packing, which it otherwise leaves out, and the longest
            of some lengths. Of what runs as plain Python, `CAPTURED` tells when a graph is made.
    """
    packs, pads = PACKS_RAGGED, PADS_RAGGED
    with ExitStack() as stack:
        if dynamo:
            from torch._dynamo import config

            packs, pads = _unread()
            stack.enter_context(config.patch(dont_skip_tracing=True, capture_scalar_outputs=True))
        stack.enter_context(PADDING.set(Padding(on_layer, check)))
        functions = _Functions(patching.original(rnn, "_VF"), check, packs, pads)
        stack.enter_context(patched(rnn, _VF=functions))
        stack.enter_context(patched(PACKS, __code__=_packs.__code__))
        stack.enter_context(patched(PADS, __code__=_pads.__code__))
        for kind in LAYERS:
            stack.enter_context(patched(kind, forward=_forward_for(kind, on_layer)))
        yield


def refuse_ragged(place: str) -> NoReturn:
    """A sequence without its padding, given to a graph."""
    finding = "is given a sequence that was packed outside of the graph, or outside of unroll.packing()"
    mend = "pack it in the model, and export or compile that within `with unroll.packing():`"
    raise UnrollError(Problem(place, finding, mend))


def known_sizes(packed: PackedSequence, place: str) -> list[int]:
    """The batch sizes of a sequence without its padding, unless it is the input of a graph, which knows none."""
    if has_static_value(packed.batch_sizes.shape[0]):
        sizes = packed.batch_sizes.tolist()
        if all(has_static_value(size) for size in sizes):
            return sizes
    refuse_ragged(place)


def refuse_layer(layer: nn.Module, input: PackedSequence, hx: Any) -> Any:
    """Stands in for torch's own layers, which cannot run on padded rows."""
    finding = "is given a packed sequence inside of unroll.packing(), which keeps the padding"
    raise UnrollError(Problem(type(layer).__name__, finding, "export or compile unroll(model)"))


@contextmanager
def packing() -> Iterator[None]:
    """Lets `torch.export` and `torch.compile` take unrolled models that pack sequences, with lengths as a real input.

    While it lasts, `pack_padded_sequence` keeps the padding and the lengths, `Unrolled` layers leave the state of a
    row alone in the steps after its end, and `pad_packed_sequence` writes the padding anew; the results are the same.
    T, the padded length, is fixed unless the plan has blocks; lengths and their longest may be any. Lengths that torch
    refuses stop the graph when it runs. A list of lengths that is read from a tensor needs `strict=False`.

    `packed.data` holds rows of padding too: what a model does with it must treat each row by itself (a linear layer,
    dropout, a norm over features; not a mean over rows, nor batch norm in training). All else is refused while the
    graph is made, and so is returning such rows. Nothing watches the number of rows, `packed.data.shape[0]`, which is
    T * B then, nor what goes around torch's functions, such as a C++ extension.

    Models that run eagerly meanwhile pack as ever, and so do those of other threads. What `torch.compile` returned must
    be called inside too: outside, Dynamo would compile it anew.

    `export_onnx` and `unroll.compile` need none of this: they do it by themselves.

    Raises:
        UnrollError: for work that may mix rows. From a compiled model it is told by Dynamo's error.

    Example:
        >>> class Encoder(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gru = nn.GRU(3, 5, bidirectional=True)
        ...
        ...     def forward(self, x, lengths):
        ...         packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        ...         return rnn.pad_packed_sequence(self.gru(packed)[0], total_length=7)[0]
        >>> x, model = torch.randn(7, 2, 3), Encoder()
        >>> with packing():
        ...     program = torch.export.export(unroll(model), (x, torch.tensor([7, 4])))
        >>> other = torch.tensor([1, 6])
        >>> torch.allclose(program.module()(x, other), model(x, other), atol=1e-6)
        True
    """
    with keeping_rows(refuse_layer, dynamo=True), watching_graphs(), watching():
        yield


def spread(packed: PackedSequence, steps: int) -> tuple[Tensor, Tensor]:
    """The rows of a packed sequence padded to `steps`, `[T * B, F]`, and which of them have a step, `[T * B, 1]`."""
    sizes: Any = packed.batch_sizes
    found = sizes.steps if is_padded(packed) else len(sizes)
    torch._assert(found <= steps, f"the longest sequence must have at most {steps} time steps, as unrolled for")
    if is_padded(packed):
        torch._assert(found == steps, f"sequences must be padded to {steps} time steps, as unrolled for")
        rows = released(packed.data)
        rows = rows.view_as(rows)  # while what the model itself does with the data is watched
        watched(packed.data)
        return rows, sizes.mask
    mask = _mask(packed, steps)
    rows = packed.data.new_zeros(len(mask), *packed.data.shape[1:])
    return rows.index_copy(0, mask.nonzero()[:, 0], packed.data), mask


def gathered(packed: PackedSequence, rows: Tensor, steps: int) -> PackedSequence:
    """The same packing around what has become of its rows."""
    sizes: Any = packed.batch_sizes
    if is_padded(packed):
        data = watched(sizes.filled(rows))
    else:
        data = rows.index_select(0, _mask(packed, steps).nonzero()[:, 0])
    return PackedSequence(data, *packed[1:])


def _mask(packed: PackedSequence, steps: int) -> Tensor:
    sizes = functional.pad(packed.batch_sizes, (0, steps - len(packed.batch_sizes)))
    return (torch.arange(int(sizes[0])) < sizes[:, None]).reshape(-1, 1).to(packed.data.device)


def started(packed: PackedSequence, hx: Any, shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The initial states in the order of the rows, zeros for None; passes and features of each are in `shapes`."""
    sizes: Any = packed.batch_sizes
    count = sizes.count if is_padded(packed) else int(sizes[0])
    state = sorted_state(packed, hx)
    if state is None:
        return tuple(packed.data.new_zeros(passes, count, size) for passes, size in shapes)
    for s, (passes, size) in zip(state, shapes, strict=True):
        good = tuple(s.shape) == (passes, count, size)
        torch._assert(good, f"an initial state must have shape {[passes, count, size]}")
    return state


def sorted_state(packed: PackedSequence, hx: Any) -> tuple[Tensor, ...] | None:
    """An initial state in the order of a packed sequence's rows."""
    if hx is None:
        return None
    state, order = (hx,) if isinstance(hx, Tensor) else tuple(hx), packed.sorted_indices
    return state if order is None else tuple(s.index_select(1, order) for s in state)


def original_order(packed: PackedSequence, states: Sequence[Tensor]) -> list[Tensor]:
    """Last states in the order that rows had before they were packed."""
    order = packed.unsorted_indices
    return list(states) if order is None else [state.index_select(1, order) for state in states]
