"""Contexts in which sequences are packed with their padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

from unroll.core import patching
from unroll.core.alone import alone
from unroll.core.arguments import refuse_nested
from unroll.core.errors import Problem, UnrollError
from unroll.core.patching import configured, patched
from unroll.core.recurrence import LAYERS
from unroll.packed.functions import (
    PACKS,
    PACKS_RAGGED,
    PADDING,
    PADS,
    PADS_RAGGED,
    Check,
    OnLayer,
    OnSteps,
    PaddedFunctions,
    Padding,
    is_padding,
    packs_padded,
    pads_padded,
    stop_by_assertion,
    unread,
)
from unroll.packed.guard import PaddingGuard, guard_dynamo, guard_export
from unroll.packed.sequences import is_padded, refuse_ragged


def _forward_for(kind: Any, on_layer: OnLayer, on_steps: OnSteps | None) -> Callable[..., Any]:
    """Return the `forward` of a kind of layer while padding is kept."""
    original = patching.original(kind, "forward")

    def forward(self: Any, input: Any, hx: Any = None) -> Any:
        if is_padded(input):
            # this thread's own, whoever has replaced `forward` last; see `PaddedFunctions._check`
            run = on_layer
            if not torch.compiler.is_dynamo_compiling() and PADDING.value is not None:
                run = PADDING.value.on_layer
            return run(self, input, hx)
        if isinstance(input, PackedSequence) and torch.compiler.is_dynamo_compiling() and is_padding():
            refuse_ragged(type(self).__name__)
        if on_steps is not None and torch.compiler.is_dynamo_compiling() and isinstance(input, torch.Tensor):
            refuse_nested(f"{type(self).__name__}: input", input)
            on_steps(type(self).__name__, input.shape[1 if self.batch_first and input.dim() == 3 else 0])
        return original(self, input, hx)

    return forward


@contextmanager
def keep_padding(
    on_layer: OnLayer,
    check: Check = stop_by_assertion,
    *,
    dynamo: bool = False,
    on_steps: OnSteps | None = None,
    eager: bool = False,
) -> Iterator[None]:
    """Pack sequences with all their rows while this lasts, where a graph is made in this thread.

    Args:
        on_layer: a function that runs torch's own layers on them.
        check: a function that stops a graph that is given bad lengths.
        dynamo: whether Dynamo is to read torch's functions of packing, which it otherwise leaves out, and the longest
            of some lengths. Of what runs as plain Python, `CAPTURED` tells when a graph is made.
        on_steps: a function that is given the kind and the number of steps of each layer of torch's in a graph of
            Dynamo's, before Dynamo runs it, which takes minutes for many steps of an RNN or GRU.
        eager: whether to pack so too where none is made.
    """
    packs, pads = PACKS_RAGGED, PADS_RAGGED
    with ExitStack() as stack:
        if dynamo:
            packs, pads = unread()
            stack.enter_context(configured(dont_skip_tracing=True, capture_scalar_outputs=True))
        stack.enter_context(PADDING.set(Padding(on_layer, check, on_steps, eager)))
        functions = PaddedFunctions(patching.original(rnn, "_VF"), check, packs, pads)
        with alone():  # as what was entered last is what Dynamo reads, also in another thread
            stack.enter_context(patched(rnn, _VF=functions))
            # code is exchanged, and not the functions: models may hold these themselves
            stack.enter_context(patched(PACKS, __code__=packs_padded.__code__))
            stack.enter_context(patched(PADS, __code__=pads_padded.__code__))
            for kind in LAYERS:
                stack.enter_context(patched(kind, forward=_forward_for(kind, on_layer, on_steps)))
        yield


def refuse_layer(layer: nn.Module, input: PackedSequence, hx: Any) -> Any:
    """Stand in for torch's own layers, which cannot run on padded rows."""
    finding = "is given a packed sequence inside of unroll.packing(), which keeps the padding"
    raise UnrollError(
        Problem(type(layer).__name__, finding, "export or compile unroll(model), or with eager=True call it")
    )


@contextmanager
def packing(*, eager: bool = False) -> Iterator[None]:
    """Let `torch.export` and `torch.compile` take unrolled models that pack sequences, with lengths as a real input.

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

    With `eager=True`, models of this thread that run eagerly keep the padding too, at the price of the steps that it
    has. Then `torch.func` differentiates and vectorises models that pack, which it does not know torch's packing for:
    `vmap(grad(loss), (None, 1, 0))(params, x, lengths)` gives the gradient of each sample, with a length of its own.
    Under `vmap` over lengths, `pad_packed_sequence` without `total_length` gives all padded steps.

    Args:
        eager: whether to keep the padding also where no graph is made.

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
    watched = PaddingGuard(graphs=False) if eager else nullcontext()
    with keep_padding(refuse_layer, dynamo=True, eager=eager), guard_dynamo(), guard_export(), watched:
        yield
