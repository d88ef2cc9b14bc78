"""Runs a layer on tensors: its weights laid out, its steps over rows, its results as torch's layers give them."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from unroll.core import schedule
from unroll.core.arguments import AUTOCAST, as_result, autocast_dtype, check_arguments
from unroll.core.errors import Problem, UnrollError
from unroll.core.layout import Frozen, Layout, lay_out
from unroll.core.limits import check_written
from unroll.core.plan import Plan
from unroll.core.presets import Situation
from unroll.core.recurrence import Recurrence
from unroll.core.rows import split_rows
from unroll.core.torch_version import PACKED_LSTM_IS_CAST
from unroll.core.values import Target
from unroll.modules import linears, loops
from unroll.modules.recorder import recorder
from unroll.packed.guard import mark, unmark
from unroll.packed.sequences import PaddedSizes, known_sizes, restore_order, sort_states


class Layer(Protocol):
    """The attributes that a layer needs to be run."""

    @property
    def place(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def limit(self) -> int: ...
    @property
    def training(self) -> bool: ...
    @property
    def recurrence(self) -> Recurrence: ...
    @property
    def frozen(self) -> Frozen | None: ...
    @property
    def flat_weights(self) -> list[Tensor]:
        """The weights in torch's order; not asked of a frozen layer."""
        ...

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and on the device of the weights."""
        ...


def run_rows(
    layer: Layer,
    rows: Tensor,
    state: tuple[Tensor, ...] | None,
    steps: Any,
    batch: Any,
    sizes: list[int] | None = None,
    padded: PaddedSizes | None = None,
    order: Tensor | None = None,
) -> schedule.Result:
    """Run all steps of a layer over `rows`, `[T * B, F]`; over packed or padded ones with their sizes and order."""
    recurrence = layer.recurrence
    promoting = False
    cast = autocast_dtype(rows) if rows.dtype in AUTOCAST else None
    if cast:
        # If only products are cast, what follows them promotes their type to that of the rest.
        promoting = not _casts_all(recurrence, rows, sizes, padded)
        if not promoting:
            rows = rows.to(cast)
            state = state and tuple(s.to(cast) for s in state)
    length, count = (n if has_static_value(n) else None for n in (steps, batch))
    packed, frozen = sizes is not None or padded is not None, layer.frozen is not None
    known = (length, count, packed, rows.device.type)
    at = Situation(recurrence, *known, frozen=frozen, trained=torch.is_grad_enabled())
    plan, loop = layer.plan.resolve(at), None
    recompute = _recomputed(layer, [rows, *(state or ())])
    joined = recompute is None and _joins(layer, rows, promoting=promoting)
    called = linears.are_held(layer)  # modules, at every step, as hooks and observers expect
    if plan.block and loops.is_captured(rows) and not (sizes or recurrence.is_cell):
        if promoting:
            finding = "runs in blocks under autocast, where the type of its state changes after the first step"
            raise UnrollError(Problem(layer.place, finding, "convert the model, or leave Plan(time='explicit')"))
        trained = loops.is_trained(layer.place, given := [rows, *(state or ()), *_trained(layer)])
        loop = None if trained else loops.over_blocks(steps, plan.block, padded.mask if padded else None, given)
    is_written = loops.is_written(rows)
    loops.warn_of_fixed_length(layer.place, steps, plan)
    if loop is not None or (has_static_value(steps) and is_written):
        check_written(layer.place, plan.block if loop is not None else steps, most=layer.limit)
    # At step 0 zeros are left out; but not where their dtype promotes that of the results, where rows join in later
    # steps, or where the only step has to give the weights that meet them a gradient.
    looped = loop is not None  # what Dynamo can tell of a function in every version
    alone = steps == 1 and torch.is_grad_enabled()
    if state is None and (promoting or sizes or padded or looped or called or alone or joined):
        state = tuple(rows.new_zeros(recurrence.passes * batch, size) for size in recurrence.state_sizes)
    drop = layer.training and recurrence.dropout
    target = Target(loop=loop, joined=joined and not looped)
    if torch.compiler.is_dynamo_compiling() and not loops.is_exporting():
        target.compile_for(rows.device.type)
    recording = recorder(layer, split_rows, written=is_written)
    result = schedule.run(
        recurrence,
        lay_out_weights(layer, plan, cast, None if promoting else rows.dtype, None if sizes else batch, target),
        rows,
        state,
        steps=steps,
        sizes=sizes,
        mask=padded.mask if padded else None,
        dropout=partial(functional.dropout, p=drop) if drop else None,
        recompute=recompute,
        target=recording or target,
    )
    if recording is not None:
        recording.close(batch, padded.mask.chunk(steps) if padded else None, order)
    return result


def _trained(layer: Layer) -> list[Tensor]:
    """Return the weights of a layer that gradients may go to."""
    if linears.are_held(layer):
        return linears.parameters(layer)
    return [] if layer.frozen is not None else layer.flat_weights


def _recomputed(layer: Layer, given: list[Tensor]) -> int | None:
    """Return the steps of a block that is computed anew in the backward pass; None if there is none, or is to be none.

    Raises:
        UnrollError: where gradients are wanted of what cannot compute anew.
    """
    block = layer.plan.recompute
    if not isinstance(block, int) or layer.recurrence.is_cell or not torch.is_grad_enabled():
        return None
    if not any(tensor.requires_grad for tensor in (*given, *_trained(layer))):
        return None
    if torch.compiler.is_dynamo_compiling() and not loops.is_exporting():
        return block
    if loops.is_written(given[0]):
        layer.plan.refuse_training(layer.place)
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # pyright: ignore[reportAttributeAccessIssue]
        finding = f"is given to torch.func's gradients with {layer.plan}, and torch.utils.checkpoint knows none of them"
        raise UnrollError(Problem(layer.place, finding, "leave recompute out: unroll(model, plan=Plan())"))
    return block


def lay_out_weights(
    layer: Layer,
    plan: Plan,
    cast: torch.dtype | None,
    dtype: torch.dtype | None,
    batch: Any,
    target: Target,
) -> Layout:
    """Lay out the weights as the steps want them, for rows of `dtype`, after autocast has made them `cast`.

    Modules that hold weights are given rows by this batch; packed ones have none.
    """
    if layer.frozen is not None:
        return layer.frozen.read(layer, cast, dtype)
    if linears.are_held(layer):
        return linears.lay_out_modules(layer, dtype, batch)
    recurrence, weights = layer.recurrence, layer.flat_weights
    cast_weights = [weight.to(cast) for weight in weights] if cast else weights
    return lay_out(recurrence, recurrence.weights(cast_weights), plan, dtype, target)


def run_packed(layer: Layer, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    """Run a layer on a packed sequence, with its padding or without."""
    recurrence = layer.recurrence
    padded: Any = input.batch_sizes if isinstance(input.batch_sizes, PaddedSizes) else None
    sizes: Any = None if padded else known_sizes(input, layer.place)
    steps, batch = (padded.steps, padded.count) if padded else (len(sizes), sizes[0])
    data = unmark(input.data) if padded else input.data
    check_arguments(recurrence, layer.place, data, hx, weight=layer.like, rows=batch)
    result = run_rows(layer, data, sort_states(input, hx), steps, batch, sizes, padded, input.unsorted_indices)
    states = restore_order(input, schedule.joined_states(recurrence, result))
    rows = schedule.joined_rows(result.outputs)
    if padded:
        # The input was unmarked for the layer alone: other uses of it are watched again.
        rows, _ = mark(padded.filled(rows)), mark(data)
    else:
        rows = own(rows, steps)
    # Not `_replace`, which Dynamo gets wrong after a graph break.
    return PackedSequence(rows, *input[1:]), as_result([own(state) for state in states])


def own(result: Tensor, steps: Any = 1) -> Tensor:
    """Return the result in memory of its own, as torch's: it may be detached or written to in place.

    The output of several steps is so already, as the pieces were joined.
    """
    return result.clone() if has_static_value(steps) and steps == 1 else result


def _joins(layer: Layer, rows: Tensor, *, promoting: bool) -> bool:
    """Tell whether the gradients of the weights are to be joined, see `Plan.gradients`.

    Raises:
        UnrollError: if they cannot be, and were asked for.
    """
    plan = layer.plan
    if plan.gradients == "stepwise" or layer.recurrence.is_cell:
        return False
    written = loops.is_written(rows) and (loops.is_exporting() or not torch.compiler.is_dynamo_compiling())
    if plan.gradients == "joined":
        if written:
            plan.refuse_training(layer.place)
        if promoting:
            finding = "joins gradients under autocast, where the type of its state changes after the first step"
            raise UnrollError(Problem(layer.place, finding, "convert the model, or leave gradients='auto'"))
        return True
    if rows.dtype not in (torch.float16, torch.bfloat16) or layer.frozen is not None or promoting or written:
        return False
    if plan.layers == "wavefront" or plan.products == "linear" or not torch.is_grad_enabled():
        return False
    return rows.requires_grad or any(weight.requires_grad for weight in layer.flat_weights)


def _casts_all(recurrence: Recurrence, rows: Tensor, sizes: list[int] | None, padded: PaddedSizes | None) -> bool:
    """Tell whether torch, under autocast, runs this layer in the lower precision throughout.

    So do cuDNN and, for an LSTM without projection on sequences of one length, oneDNN. Elsewhere only the products are
    cast. In a graph lengths may be any, and count as ragged; before PyTorch 2.13 those of packed sequences always do.
    """
    if rows.device.type == "cpu":
        ragged = padded or (sizes and (sizes[0] != sizes[-1] or not PACKED_LSTM_IS_CAST))
        plain = not (recurrence.is_cell or recurrence.proj_size or ragged)
        return recurrence.mode == "LSTM" and plain and rows.numel() > 0
    return True
