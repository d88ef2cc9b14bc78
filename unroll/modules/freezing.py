"""Weights of a layer, laid out once in buffers in place of its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.utils import parametrize

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.layout import Frozen
from unroll.modules import linears
from unroll.modules.layers import Unrolled
from unroll.modules.methods import names_list
from unroll.modules.subclasses import assign_class


def freeze_layer(layer: Any) -> None:
    """Lay out the weights of an `Unrolled` layer once for all, in buffers, and take its parameters away.

    Parametrizations of the weights are computed as they are after `eval()`, and taken away too.

    Raises:
        UnrollError: if something else than the layer holds the weights, or if the plan is about their gradients.
    """
    if layer.frozen is not None:
        return
    if layer.plan.gradients == "joined":
        finding = "runs with gradients='joined', and frozen weights have no gradients"
        raise UnrollError(Problem(layer.place, finding, "leave gradients or freeze out"))
    if linears.are_held(layer):
        linears.release(layer)
    recurrence = layer.recurrence
    names = [name for group in recurrence.weight_names for name in group]
    parametrizations = layer.parametrizations if parametrize.is_parametrized(layer) else {}
    foreign = [n for n in names if n not in layer._parameters and n not in layer._buffers and n not in parametrizations]
    if foreign:
        fix = "make it a parameter (remove_weight_norm, prune.remove), or leave the layer out by where="
        raise UnrollError(Problem(layer.place, f"{', '.join(foreign)} is set from outside before each call", fix))
    if any(map(names_list, type(layer).__mro__)):
        fix = "leave the layer out by where="
        raise UnrollError(
            Problem(layer.place, f"{type(layer).__name__} reaches for _flat_weights in its own code", fix)
        )

    for name in parametrizations:
        layer.parametrizations[name].eval()  # power iterations would go on, in tensors that the original shares
    weights = layer.flat_weights
    kept: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> str:
        kept[name] = tensor
        return name

    frozen = Frozen.of(recurrence, weights, layer.plan, keep)
    for name in names:
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
        if name in parametrizations:
            del layer.parametrizations[name]
    if parametrizations:
        assign_class(layer, parametrize.type_before_parametrizations(layer))
    for name, tensor in kept.items():
        layer.register_buffer(name, tensor)
    for name in ("listed", "traced"):
        layer.__dict__.pop(name, None)
    layer.frozen = frozen


def freeze_layers(layers: Iterable[Unrolled]) -> None:
    """Freeze each of the layers, and raise all their problems at once."""
    problems = Problems()
    for layer in layers:
        with problems:
            freeze_layer(layer)
    problems.check()
