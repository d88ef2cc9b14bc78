"""The products of a layer as modules, `nn.Linear` with the layer's own parameters, for `Plan(products="linear")`.

A layer holds its parameters in them, and calls them at every step: what a quantizer or an adapter puts in the place
of one, or of its weight, is what runs. The layer and its `state_dict` have torch's names for them still.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unroll.core.errors import Problems
from unroll.core.layout import Layout, precision_of
from unroll.core.recurrence import Recurrence
from unroll.core.weights import Affine, StepWeights
from unroll.modules.loops import is_written
from unroll.modules.methods import names_list


def place_of(name: str) -> tuple[str, str]:
    """Return the name of the module that holds a parameter, and that of the parameter in it.

    Example:
        >>> place_of("weight_hh_l0_reverse")
        ('hh_l0_reverse', 'weight')
    """
    kind, _, place = name.partition("_")
    return place, kind


def are_held(layer: Any) -> bool:
    """Tell whether a layer holds its parameters in modules."""
    if layer.plan.products != "linear" or layer.frozen is not None:
        return False
    return place_of(layer.recurrence.flat_names[0])[0] in getattr(layer, "_modules", ())


def holder_of(layer: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """Return the module that holds a parameter of this name, and its name there; None if none does."""
    place, kind = place_of(name)
    held = kind in ("weight", "bias") and layer.__dict__.get("_modules", {}).get(place)
    return (held, kind) if held else None


def hold(layer: Any) -> None:
    """Move the parameters of a layer into modules.

    Raises:
        UnrollError: where something else has the weights, or makes them at every call.
    """
    names, problems = layer.recurrence.flat_names, Problems()
    fix = "make it a parameter of the layer first (remove_parametrizations, remove_weight_norm), or leave products out"
    foreign = [name for name in names if name not in layer._parameters]
    if foreign:
        problems.add(layer.place, f"computes {', '.join(foreign)} at every call, which no nn.Linear can hold", fix)
    listed = getattr(layer, "listed", None)
    if any(map(names_list, type(layer).__mro__)) or (listed is not None and listed.differs()):
        finding = "runs with a list of weights, _flat_weights, which no nn.Linear can hold"
        problems.add(layer.place, finding, "set the weights by their names, or choose other products")
    if taken := [place for place in {place_of(name)[0] for name in names} if hasattr(layer, place)]:
        problems.add(layer.place, f"has attributes called {', '.join(sorted(taken))}", "rename them")
    problems.check()
    if listed is not None:
        layer.listed = None
    parameters = {name: layer._parameters.pop(name) for name in names}
    for name, weight in parameters.items():
        place, kind = place_of(name)
        if kind == "weight":
            bias = parameters.get(f"bias_{place}")
            # on meta nothing is drawn or stored
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = weight
            linear.register_parameter("bias", bias)
            layer.add_module(place, linear.train(layer.training))


def release(layer: Any) -> None:
    """Move the parameters back from the modules into the layer.

    Raises:
        UnrollError: if other modules stand there by now.
    """
    check_plain(layer)
    parameters = {name: getattr(layer, name) for name in layer.recurrence.flat_names}
    for name in parameters:
        layer._modules.pop(place_of(name)[0], None)
    for name, parameter in parameters.items():
        layer.register_parameter(name, parameter)


def check_plain(layer: Any) -> None:
    """Refuse a layer in which anything but plain `nn.Linear` modules makes the products."""
    problems = Problems()
    for place in sorted({place_of(name)[0] for name in layer.recurrence.flat_names}):
        module = getattr(layer, place)
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            finding = f"is a {type(module).__name__}" + " with hooks" * (type(module) is nn.Linear)
            fix = "make it an nn.Linear again (merge adapters, remove hooks and parametrizations), or use torch.export"
            problems.add(f"{layer.place}.{place}", f"{finding}, which this would leave out", fix)
    problems.check()


def parameters(layer: Any) -> list[Tensor]:
    """Return all that gradients may go to."""
    return list(layer.parameters())


def weight_like(layer: Any) -> Any:
    """Return a weight whose dtype and device inputs must have; None where modules of another kind decide."""
    module = getattr(layer, place_of(layer.recurrence.flat_names[0])[0])
    return module.weight if parametrize.type_before_parametrizations(module) is nn.Linear else None


def lay_out_modules(layer: Any, dtype: torch.dtype | None, batch: Any = None) -> Layout:
    """Lay out the modules of a layer for the steps, on rows of `dtype`.

    Each is given a batch first: the input `[B, T, F]`, and `h` `[B, P]`, as hooks that take the gradient of each sample
    apart expect. Packed rows, without a `batch`, stay as they are, and so do those that a graph is made of.
    """
    recurrence: Recurrence = layer.recurrence

    def of(place: str) -> Affine:
        module = getattr(layer, place)

        def by_batch(x: Tensor, *weight_and_bias: None) -> Tensor:
            if is_written(x) or not batch:
                return module(x)
            rows = x.unflatten(0, (x.shape[0] // batch, batch)).transpose(0, 1)
            return module(rows).transpose(0, 1).flatten(0, 1)

        called = by_batch if place.startswith("ih") else lambda x, weight, bias: module(x)
        return Affine(None, form="linear", linear=called)

    passes = []
    for names in recurrence.weight_names:
        ih, hh, *rest = (of(place_of(name)[0]) for name in names if name.startswith("weight"))
        projection = rest[0] if rest else None
        passes.append(StepWeights((ih,), (hh,), projection, recurrence.hidden_size, precision_of(dtype)))
    return Layout(passes, [], ())


def name_as_torch(layer: Any, state: dict[str, Tensor], prefix: str) -> None:
    """Give what the modules put into a `state_dict` torch's names, in torch's order."""
    for name in layer.recurrence.flat_names:
        place, kind = place_of(name)
        if (value := state.pop(f"{prefix}{place}.{kind}", None)) is not None:
            state[prefix + name] = value


def name_by_module(layer: Any, state: dict[str, Tensor], prefix: str) -> None:
    """Give weights in a `state_dict` of torch's names those that the modules read."""
    for name in layer.recurrence.flat_names:
        place, kind = place_of(name)
        if prefix + name in state:
            state[f"{prefix}{place}.{kind}"] = state.pop(prefix + name)
