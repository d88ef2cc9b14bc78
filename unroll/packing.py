"""Packed sequences inside of graphs, whose sizes cannot depend on lengths.

Their rows stay padded there, and lengths go beside them: a row that has ended keeps its state in the steps that
remain. Layers, and torch's own functions of packing, work on such a sequence as on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from unroll.recurrence import LAYERS, Problem, UnrollError

PLACE = "pack_padded_sequence"


class _Longest:
    """The number of steps of the longest row, which only the running graph knows. No number is smaller, or larger."""

    def __gt__(self, other: Any) -> bool:
        return False


LONGEST = _Longest()


class Sizes:
    """What a padded batch has in place of `batch_sizes`, in a `PackedSequence` whose data are all its rows.

    Attributes:
        lengths: steps of each row, sorted falling, int64 `[B]`.
        steps: T, of the padding.
        count: B.
        mask: which rows have a step, boolean `[T * B, 1]`.
    """

    device = torch.device("cpu")
    """Where torch wants batch sizes to be"""

    def __init__(self, lengths: Tensor, steps: int, count: int, mask: Tensor) -> None:
        self.lengths, self.steps, self.count, self.mask = lengths, steps, count, mask

    def size(self, dim: int) -> Any:
        return LONGEST


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


class _Functions:
    """Stands in for `torch._VF`, from which `torch.nn.utils.rnn` takes what packs and pads."""

    def __init__(self, check: Check) -> None:
        self.check = check

    def _pack_padded_sequence(self, input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Sizes]:
        input = input.transpose(0, 1) if batch_first else input
        steps, count, *features = input.shape
        problems = []
        if lengths.dim() != 1 or lengths.device.type != "cpu":
            finding = f"lengths are {lengths.dim()}-D, on {lengths.device}"
            problems.append(Problem(PLACE, finding, "give lengths.cpu(), 1-D"))
        elif lengths.shape[0] != count:
            finding = f"there are {lengths.shape[0]} lengths for {count} rows"
            problems.append(Problem(PLACE, finding, "give a length for each row"))
        if steps == 0 or count == 0 or 0 in features:
            problems.append(
                Problem(PLACE, f"the input is empty, {list(input.shape)}", "give at least one row and step")
            )
        if problems:
            raise UnrollError(*problems)
        within = (lengths > 0) & (lengths <= steps)
        lengths = self.check(lengths, within, f"{PLACE}: lengths must be from 1 to the number of padded steps")
        falling = (lengths <= lengths.roll(1)) | (torch.arange(count) == 0)
        lengths = self.check(lengths, falling, f"{PLACE}: lengths must be sorted falling, or give enforce_sorted=False")
        mask = (torch.arange(steps)[:, None] < lengths).reshape(-1, 1).to(input.device)
        return input.flatten(0, 1), Sizes(lengths, steps, count, mask)

    def _pad_packed_sequence(
        self, data: Tensor, sizes: Sizes, batch_first: bool, padding_value: float, total_length: Any
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(sizes, Sizes):
            finding = "is given a sequence that was packed outside of unroll.packing()"
            raise UnrollError(Problem("pad_packed_sequence", finding, "pack it inside"))
        steps, lengths = sizes.steps, sizes.lengths
        features = data.shape[1:]
        mask = sizes.mask.reshape(-1, *[1] * len(features))
        padded = torch.where(mask, data, padding_value).unflatten(0, (steps, sizes.count))
        if total_length is LONGEST:
            longest = lengths.max().item()
            torch._check(longest >= 1)
            torch._check(longest <= steps)
            padded = padded[:longest]
        elif not statically_known_true(total_length == steps):
            message = f"pad_packed_sequence: total_length={total_length} is less than the longest length"
            lengths = self.check(lengths, lengths <= total_length, message)
            room = [0, 0] * (len(features) + 1) + [0, total_length - steps]
            padded = functional.pad(padded, room, value=padding_value)
        return padded.transpose(0, 1) if batch_first else padded, lengths


@contextmanager
def keeping_rows(on_layer: OnLayer, check: Check = _stopped) -> Iterator[None]:
    """While this lasts, sequences are packed with all their rows.

    Args:
        on_layer: runs torch's own layers on them.
        check: stops a graph that is given bad lengths.
    """

    def replaced(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, input: Any, hx: Any = None) -> Any:
            return on_layer(self, input, hx) if is_padded(input) else original(self, input, hx)

        return forward

    home: Any = rnn
    before, forwards = home._VF, [(kind, kind.forward) for kind in LAYERS]
    home._VF = _Functions(check)
    try:
        for kind, forward in forwards:
            kind.forward = replaced(forward)
        yield
    finally:
        home._VF = before
        for kind, forward in forwards:
            kind.forward = forward


def _refused(layer: nn.Module, input: PackedSequence, hx: Any) -> Any:
    finding = "is given a packed sequence inside of unroll.packing(), which keeps the padding"
    raise UnrollError(Problem(type(layer).__name__, finding, "export or compile unroll(model)"))


@contextmanager
def packing() -> Iterator[None]:
    """Lets `torch.export` and `torch.compile` take unrolled models that pack sequences, with lengths as a real input.

    While it lasts, `pack_padded_sequence` keeps the padding and the lengths, `Unrolled` layers leave the state of a
    row alone in the steps after its end, and `pad_packed_sequence` writes the padding anew; the results are the same.
    T, the padded length, is fixed; lengths and their longest may be any. Lengths that torch refuses stop the graph
    when it runs. What a model does with `packed.data` must treat each row by itself.

    `export_onnx` and `unroll.compile` need none of this: they do it by themselves.

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
    with tracing_packing(), keeping_rows(_refused):
        yield


def tracing_packing() -> Any:
    """Lets Dynamo read torch's functions of packing, which it otherwise leaves out, and the longest of some lengths."""
    from torch._dynamo import config

    return config.patch(dont_skip_tracing=True, capture_scalar_outputs=True)
