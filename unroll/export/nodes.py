"""Recurrent layers as single nodes of what `torch.export` captures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from unroll.core.arguments import as_result, as_states, check_arguments
from unroll.core.errors import Problem, UnrollError
from unroll.core.recurrence import Recurrence, read_layer
from unroll.export.traced import traced_node
from unroll.graphs.functions import FUNCTIONS, form_of_call, read_on_tensors
from unroll.modules.layers import Unrolled, UnrolledLayer
from unroll.onnx.layers import DOMAIN, LAYER
from unroll.packed.guard import mark, unmark
from unroll.packed.sequences import PaddedSizes, restore_order, sort_states
from unroll.torchscript.kernels import pause_tracing


class CallsAsNodes(TorchFunctionMode):
    """Writes a node for every call of a recurrent function, whoever makes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return call_node(func, *args, **kwargs) if func in FUNCTIONS else func(*args, **kwargs)


def call_node(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what `torch.lstm`, `aten.gru_cell` and their kin return, from a node."""
    kind, form = form_of_call(func, args, kwargs)
    if form == "packed":
        fix = "export the module itself, whose calls of pack_padded_sequence are understood"
        raise UnrollError(Problem(kind, "is called on packed rows, whose sizes are not in the graph", fix))
    with pause_tracing():
        given, weights, recurrence = read_on_tensors(kind, form, args, kwargs)
    return as_result(_node(recurrence, kind, given["input"], given["hx"], weights, training=bool(given["train"])))


def layer_node(self: Any, input: Tensor, hx: Any = None) -> Any:
    """Stand in for `Unrolled.forward`."""
    if isinstance(input, PackedSequence):
        return packed_node(self, input, hx)
    recurrence, weights = self.recurrence, _weights(self)
    results = _node(recurrence, self.place, input, hx, weights, training=self.training, named=True, plan=_plan(self))
    return as_result(results) if recurrence.is_cell else (results[0], as_result(results[1:]))


def _weights(layer: Any) -> list[Tensor]:
    """Return the weights in torch's order, those of a frozen layer as they were laid out."""
    if not isinstance(layer, Unrolled):
        layer._update_flat_weights()  # as its own `forward` does
        return layer._flat_weights
    frozen = layer.frozen
    if frozen is None:
        return layer.flat_weights
    frozen.read(layer, None, layer.like.dtype)  # refuses another type than it was frozen in
    return [getattr(layer, name) for name in frozen.names]


def _plan(layer: Any) -> str:
    """Return the plan that a frozen layer was laid out for; empty for others."""
    return str(layer.plan) if getattr(layer, "frozen", None) else ""


def packed_node(layer: Any, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    """Return what a layer, torch's or an `Unrolled` one, gives for a packed sequence, from a node given lengths."""
    place = getattr(layer, "place", type(layer).__name__)
    sizes = packed.batch_sizes
    if not isinstance(sizes, PaddedSizes):
        fix = "pack by pack_padded_sequence or pack_sequence, inside of the model"
        raise UnrollError(Problem(place, "is given a sequence that was packed elsewhere", fix))
    recurrence = replace(read_layer(layer), batch_first=False)
    weights = _weights(layer)
    data = unmark(packed.data)
    traced = torch.jit.is_tracing()  # where sizes are tensors
    with pause_tracing():
        count: Any = data.shape[0] // int(sizes.steps) if traced else sizes.count
        check_arguments(recurrence, place, data, hx, weight=weights[0], rows=count)
    state: Any = sort_states(packed, hx)
    state = state and as_result(state)
    # [T, B, F], of data that is not watched here; it may have other uses, and is marked again.
    rows = data.unflatten(0, (sizes.steps, sizes.count))
    mark(data)
    named = isinstance(layer, UnrolledLayer)
    options = {"training": layer.training, "named": named, "plan": _plan(layer)}
    output, *states = _node(recurrence, place, rows, state, weights, lengths=sizes.lengths, **options)
    states = restore_order(packed, states)
    return PackedSequence(mark(output), *packed[1:]), as_result(states)


def refuse_packed(layer: nn.Module, packed: PackedSequence, hx: Any) -> Any:
    """Stand in for torch's own layers where `where` chooses among layers: it has left them as they are."""
    finding = "is given a packed sequence and is not chosen by where=; in a file it cannot stay as it is"
    raise UnrollError(Problem(type(layer).__name__, finding, "let where= choose it too"))


def _node(
    recurrence: Recurrence,
    place: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    training: bool,
    named: bool = False,
    plan: str = "",
    lengths: Tensor | None = None,
) -> Sequence[Tensor]:
    """Return the output of a layer and its last states, or the next states of a cell, from one node.

    With a `plan`, the weights are laid out for it already.
    With `lengths`, `[B]`, the input is padded, and the output all its rows, `[T * B, features]`; those that have ended
    hold no values in particular.
    """
    if training and recurrence.dropout and recurrence.num_layers > 1:
        raise UnrollError(Problem(place, "drops out between layers in training mode", "call eval() on it"))
    if torch.is_autocast_enabled(input.device.type):
        fix = "convert the model by .to(dtype), or export it without autocast"
        raise UnrollError(Problem(place, "is called under autocast", fix))
    with pause_tracing():
        check_arguments(recurrence, place, input, hx if not isinstance(hx, list) else tuple(hx), weight=weights[0])
        frame = recurrence.frame(input.shape)
        shapes = recurrence.state_shapes(frame)
        if not recurrence.is_cell:
            *lead, features = recurrence.output_shape(frame)
            # A layer's output comes first among the results.
            rows = lead if lengths is None else [frame.steps * frame.batch]
            shapes.insert(0, (*rows, features))
    state = as_states(hx) or (None,) * len(recurrence.state_sizes)
    options = {**asdict(recurrence), "batched": frame.batched, "padded": lengths is not None, "plan": plan}
    attributes = {name: int(value) if isinstance(value, bool) else value for name, value in options.items()}
    operands = (input, *state, *weights, *([] if lengths is None else [lengths]))
    if torch.jit.is_tracing():
        return traced_node(recurrence, place if named else "", attributes, operands)
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Recurrence",
        operands,
        attributes,
        dtypes=[input.dtype] * len(shapes),
        shapes=shapes,
        version=1,
        metadata_props={LAYER: place} if named else None,
    )
