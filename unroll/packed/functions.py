"""Torch's functions of packing, on sequences that keep their padding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from unroll.core.arguments import refuse_nested
from unroll.core.errors import Problem, UnrollError
from unroll.core.patching import Local
from unroll.packed.guard import CAPTURED, mark, unmark
from unroll.packed.sequences import PLACE, PaddedSizes, refuse_ragged

Check = Callable[[Tensor, Tensor, str], Tensor]

OnLayer = Callable[[Any, PackedSequence, Any], tuple[PackedSequence, Any]]

OnSteps = Callable[[str, int], None]


class Padding(NamedTuple):
    """The way in which a thread packs while a graph is made."""

    on_layer: OnLayer
    """The function that runs torch's own layers on padded rows"""
    check: Check
    """The function that stops a graph that is given bad lengths"""
    on_steps: OnSteps | None
    """The function that is told the steps of each of torch's own layers that Dynamo reads"""
    eager: bool = False
    """True if it packs so in all that it runs, and not in graphs alone"""


PADDING: Local[Padding] = Local("padding")
"""Set in a thread that packs with padding where it makes a graph"""


def is_padding() -> bool:
    """Tell whether this thread packs with padding. Dynamo asks it once, in the thread in which it reads."""
    return PADDING.value is not None


@functools.cache
def unread() -> tuple[Any, Any]:
    """Return torch's own functions, which Dynamo leaves out as ever where a thread does not pack with padding."""
    torch.compiler.assume_constant_result(is_padding)
    torch.compiler.allow_in_graph([mark, unmark])
    return torch.compiler.disable(PACKS_RAGGED), torch.compiler.disable(PADS_RAGGED)


def _padding() -> bool:
    """Tell whether this thread packs with padding now: in a graph that is made, or in all that runs but TorchScript."""
    if torch.compiler.is_dynamo_compiling():
        return is_padding()
    if PADDING.value is None:
        return False
    return bool(CAPTURED.value) or (PADDING.value.eager and not torch.jit.is_tracing())


def stop_by_assertion(lengths: Tensor, good: Tensor, message: str) -> Tensor:
    """Return the lengths, from a graph that stops with the message unless all of `good` is true."""
    torch._assert_async(good.all(), message)
    return lengths


def stop_by_index(lengths: Tensor, good: Tensor, message: str) -> Tensor:
    """Return the same where there are no assertions: what is not good reads beyond the end of a table of one zero."""
    table = torch.zeros(1, dtype=lengths.dtype, device=lengths.device)
    return lengths + table.index_select(0, (~good).to(torch.int64))


def stop_at_once(lengths: Tensor, good: Tensor, message: str) -> Tensor:
    """Return the lengths, unless not all of `good` is true; also inside of transforms of `torch.func`.

    Raises:
        UnrollError: with the message, for these lengths.
    """
    while is_transformed(good):  # the numbers behind it, of all samples
        good = torch._C._functorch.get_unwrapped(good)  # pyright: ignore[reportAttributeAccessIssue]
    if not good.all():
        place, _, fix = message.partition(": ")
        raise UnrollError(Problem(place, "is given lengths that torch refuses", fix))
    return lengths


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor stands for others, in a transform of `torch.func`."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def _is_known_true(found: Any) -> bool:
    """Tell whether a comparison of sizes is true; in a trace, where they are tensors, for those of the example."""
    return bool(found) if torch.jit.is_tracing() else statically_known_true(found)


def _miscounted(found: int, count: int) -> Problem:
    return Problem(PLACE, f"there are {found} lengths for {count} rows", "give a length for each row")


class PaddedFunctions:
    """Stands in for `torch._VF`, from which `torch.nn.utils.rnn` takes what packs and pads."""

    def __init__(self, original: Any, check: Check, packs: Any, pads: Any) -> None:
        self.original, self.check, self.packs, self.pads = original, check, packs, pads

    @property
    def _check(self) -> Check:
        """This thread's check, whoever has replaced torch's functions last. While Dynamo reads, that is this thread."""
        if torch.compiler.is_dynamo_compiling() or PADDING.value is None:
            return self.check
        return stop_at_once if PADDING.value.eager and not CAPTURED.value else PADDING.value.check

    def pack_padded_sequence(
        self, input: Tensor, lengths: Any, batch_first: bool, enforce_sorted: bool
    ) -> PackedSequence:
        if not _padding():
            return self.packs(input, lengths, batch_first, enforce_sorted)
        refuse_nested(f"{PLACE}: input", input)
        if isinstance(lengths, Tensor) and lengths.dim() != 1:
            raise UnrollError(Problem(PLACE, f"lengths are {lengths.dim()}-D", "give lengths.cpu(), 1-D"))
        if lengths is None or isinstance(lengths, (int, float)):
            raise UnrollError(Problem(PLACE, f"lengths are {lengths}", "give a length for each row"))
        if not enforce_sorted:
            lengths = self._counted(input, lengths, batch_first)
            if isinstance(lengths, Tensor) and not torch.compiler.is_dynamo_compiling() and is_transformed(lengths):
                # as torch does it, but for the inverse order, which vmap would make slowly, with a warning
                lengths, order = torch.sort(lengths, descending=True)
                input = input.index_select(0 if batch_first else 1, order)
                return PackedSequence(*self._pack_padded_sequence(input, lengths, batch_first), order, order.argsort())
        return PACKS_RAGGED(input, lengths, batch_first, enforce_sorted)

    def _counted(self, input: Tensor, lengths: Any, batch_first: bool) -> Any:
        """Return the lengths, of which there must be one for each row: with fewer, sorting would leave rows out."""
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
        problems: list[Problem] = []  # what Dynamo can follow
        if lengths.device.type != "cpu":
            problems.append(Problem(PLACE, f"lengths are on {lengths.device}", "give lengths.cpu()"))
        elif lengths.shape[0] != count:
            problems.append(_miscounted(lengths.shape[0], count))
        if steps == 0 or count == 0 or 0 in features:
            problems.append(
                Problem(PLACE, f"the input is empty, {list(input.shape)}", "give at least one row and step")
            )
        if problems:
            raise UnrollError(*problems)
        check = self._check
        within = torch.logical_and(lengths > 0, lengths <= steps)
        lengths = check(lengths, within, f"{PLACE}: lengths must be from 1 to the number of padded steps")
        # none is longer than the one before it; the first has none before
        falling = torch.logical_or(lengths <= lengths.roll(1, 0), torch.arange(count) == 0)
        lengths = check(lengths, falling, f"{PLACE}: lengths must be sorted falling, or give enforce_sorted=False")
        # [T, B] as [T * B, 1], like the rows
        mask = (torch.arange(steps)[:, None] < lengths).reshape(-1, 1).to(input.device)
        sizes = PaddedSizes(lengths, steps, count, mask)
        return mark(sizes.filled(input.reshape(-1, *features))), sizes

    def _pad_packed_sequence(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self.original._pad_packed_sequence(*args)

    def pad_packed_sequence(
        self, packed: PackedSequence, batch_first: bool, padding_value: float, total_length: Any
    ) -> tuple[Tensor, Tensor]:
        sizes: Any = packed.batch_sizes
        if not isinstance(sizes, PaddedSizes):
            if not _padding():
                return self.pads(packed, batch_first, padding_value, total_length)
            refuse_ragged("pad_packed_sequence")
        data, steps, lengths = packed.data, sizes.steps, sizes.lengths
        features = data.shape[1:]
        mask = sizes.mask.reshape(-1, *[1] * len(features))
        padding = data.new_full((), padding_value)  # a number would make floats of integers
        # unmarked for this use alone: the model may have others
        # torch's function, not the tensor's method, whose code Dynamo cannot read under a mode
        result = torch.unflatten(torch.where(mask, unmark(data), padding), 0, (steps, sizes.count))
        mark(data)
        if total_length is None and torch.jit.is_tracing():  # which would keep a number as it is now
            result = result[: lengths.max()]
        elif total_length is None and not torch.compiler.is_dynamo_compiling() and is_transformed(lengths):
            pass  # each sample has a longest of its own, and all have one shape
        elif total_length is None:
            longest = lengths.max().item()
            torch._check(longest >= 1)
            torch._check(longest <= steps)
            result = result[:longest]
        elif not _is_known_true(total_length == steps):
            message = f"pad_packed_sequence: total_length={total_length} is less than the longest length"
            lengths = self._check(lengths, lengths <= total_length, message)
            # from the last axis on: features and B stay, and T becomes total_length, which may be less
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


def packs_padded(input, lengths, batch_first=False, enforce_sorted=True):
    """Pack, as the code of torch's function while padding is kept, among torch's names. Its own counts no lengths."""
    return _VF.pack_padded_sequence(input, lengths, batch_first, enforce_sorted)  # noqa: F821 # pyright: ignore


def pads_padded(sequence, batch_first=False, padding_value=0.0, total_length=None):
    """Pad, as the code of torch's function while padding is kept, among torch's names. Its own asks for batch sizes."""
    return _VF.pad_packed_sequence(sequence, batch_first, padding_value, total_length)  # noqa: F821 # pyright: ignore
