"""Recurrent layers as single nodes of what `torch.jit.trace` records for torch's older exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unroll.core import schedule
from unroll.core.layout import Frozen, Layout, lay_out
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence
from unroll.onnx.layers import DOMAIN
from unroll.torchscript.kernels import pause_tracing


def traced_node(
    recurrence: Recurrence, place: str, attributes: Mapping[str, Any], operands: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Return the results of a `Recurrence` node, with their values: what comes after may branch on them.

    Args:
        recurrence: the layer without its tensors.
        place: its name, if it has one; the exporter adds the path of the module that calls it.
        attributes: of the node.
        operands: its inputs, as `unroll.onnx.layers.LayerCall` reads them.
    """
    return _Recurrence.apply(recurrence, place, dict(attributes), *operands)


class _Recurrence(torch.autograd.Function):
    """A function that runs the steps, and that the exporter writes as a node."""

    @staticmethod
    def forward(
        ctx: Any, recurrence: Recurrence, place: str, attributes: dict[str, Any], *operands: Tensor | None
    ) -> tuple[Tensor, ...]:
        with pause_tracing():
            return _run(recurrence, attributes, operands)

    @staticmethod
    def symbolic(g: Any, recurrence: Recurrence, place: str, attributes: dict[str, Any], *operands: Any) -> Any:
        from torch.onnx._internal.torchscript_exporter.symbolic_opset9 import unused  # of that exporter alone

        input = operands[0]
        written: dict[str, Any] = {}
        for name, value in attributes.items():
            written[name + {str: "_s", float: "_f", int: "_i"}[type(value)]] = value
        sizes = list(recurrence.state_sizes)
        ranks = [input.type().dim() if recurrence.is_cell else 3 if attributes["batched"] else 2] * len(sizes)
        if not recurrence.is_cell:
            sizes.insert(0, len(recurrence.directions) * recurrence.output_size)
            ranks.insert(0, 2 if attributes["padded"] else input.type().dim())
        given = [unused(g) if operand is None else operand for operand in operands]
        results = g.op(f"{DOMAIN}::Recurrence", *given, outputs=len(sizes), **written)
        results = [results] if len(sizes) == 1 else results
        for value, rank, size in zip(results, ranks, sizes, strict=True):
            value.setType(input.type().with_sizes([None] * (rank - 1) + [size]))
        return tuple(results)


def _run(
    recurrence: Recurrence, attributes: Mapping[str, Any], operands: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Run the steps of a layer or cell, as the node does."""
    count, padded, batched = len(recurrence.state_sizes), attributes["padded"], attributes["batched"]
    input, state, weights = operands[0], operands[1 : 1 + count], operands[1 + count : len(operands) - padded]
    assert input is not None
    _, steps, batch = recurrence.frame(input.shape)
    mask = None
    if padded:
        lengths: Any = operands[-1]
        mask = (torch.arange(steps)[:, None] < lengths).reshape(-1, 1).to(input.device)
    if state[0] is None:
        state = tuple(input.new_zeros(recurrence.passes * (batch or 1), size) for size in recurrence.state_sizes)
    layout = _layout(recurrence, attributes["plan"], weights, input.dtype)
    rows = schedule.flat_rows(recurrence, input, batched=batched)
    result = schedule.run(recurrence, layout, rows, state, steps=steps, mask=mask)  # pyright: ignore[reportArgumentType]
    states = schedule.joined_states(recurrence, result, batched=batched)
    if recurrence.is_cell:
        return tuple(s.clone() for s in states)
    output = (
        schedule.joined_rows(result.outputs)
        if padded
        else schedule.joined_output(recurrence, result.outputs, batched=batched)
    )
    return output.contiguous().clone(), *(s.clone() for s in states)


def _layout(recurrence: Recurrence, plan: str, weights: Sequence[Any], dtype: torch.dtype) -> Layout:
    """Lay out the weights; those of a frozen layer, which has a plan, lie so already, in the order of its buffers."""
    if not plan:
        return lay_out(recurrence, recurrence.weights(list(weights)), Plan(), dtype)
    laid_out = iter(weights)
    return Frozen.form(recurrence, Plan.of(plan), dtype).mapped(lambda name, kind: next(laid_out), dtype)
