"""The list of weights with which torch's layers run, `_flat_weights`, for models that reach for it.

As in torch, a layer runs with the list for as long as each weight is the object under its name that it was when the
list was made of the names, and makes the list anew of the names when one is not. A layer whose list nobody has reached
for has none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn.utils import parametrize

from unroll.core.errors import Problem, UnrollError
from unroll.core.recurrence import LAYERS
from unroll.modules.methods import names_list

FIX = "set the weights by their names, layer.weight_hh_l0 = ..., or unroll with freeze=True"


class FlatWeights:
    """A list of weights, and the weights under their names when it was last made of them."""

    def __init__(self, weights: list[Any], named: Iterable[Any]) -> None:
        self.weights = weights
        """The model's own list, which it may change"""
        self.named = tuple(named)
        """None where a name had no weight"""

    def holds(self, named: Sequence[Any]) -> bool:
        """Tell whether the list is run with while these are the weights under their names."""
        return all(old is None or new is None or new is old for old, new in zip(self.named, named))

    def differs(self, later: Sequence[Any] = ()) -> bool:
        """Tell whether the list has other weights than the names had, and than those that they were given since."""
        return len(self.weights) != len(self.named) or any(
            weight is not old and weight is not new
            for weight, old, new in zip(self.weights, self.named, later or self.named)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a layer of torch's runs with the list only where it has no weight under the name.
        return FlatWeights, (self.weights, self.weights)


def named_weights(layer: Any) -> list[Any]:
    """Return the weights under their names, in torch's order; None where there is none."""
    return [getattr(layer, name, None) for name in layer.recurrence.flat_names]


def reach_list(layer: Any) -> list[Any]:
    """Return the list, which the model may change, and make it where there is none."""
    named = named_weights(layer)
    slot = _slot(named)
    found = getattr(layer, slot)
    if found is None or (slot == "traced" and not found.holds(named)):
        found = FlatWeights(list(named), named)
        setattr(layer, slot, found)
    return found.weights


def set_list(layer: Any, weights: list[Any]) -> None:
    """Give the layer another list."""
    named = named_weights(layer)
    slot = _slot(named)
    found = getattr(layer, slot)
    setattr(layer, slot, FlatWeights(weights, named if found is None or slot == "traced" else found.named))


def make_list(layer: Any) -> None:
    """Make the list anew of the names, if there is one."""
    if layer.listed is not None:
        named = named_weights(layer)
        layer.listed = FlatWeights(list(named), named)


def listed_weights(layer: Any) -> list[Tensor] | None:
    """Return the weights that a layer runs with; None where it has no list, or not all of them.

    Raises:
        UnrollError: for a list that fits the layer not, and where one cannot be followed into a graph.
    """
    if layer.listed is None and layer.traced is None:
        return None
    named = named_weights(layer)
    slot = _slot(named)
    found = getattr(layer, slot)
    if found is not None and found.holds(named):
        _check(layer, found.weights)
        return found.weights
    if slot == "traced" and layer.listed is not None and layer.listed.differs(named):
        finding = "runs with a list of other weights, _flat_weights, which torch.export, exchanging all weights, drops"
        raise UnrollError(Problem(layer.place, finding, FIX))
    if found is not None and not torch.compiler.is_compiling():
        setattr(layer, slot, FlatWeights(list(named), named))
    return None if any(weight is None for weight in named) else named


def list_of(layer: nn.RNNBase) -> FlatWeights | None:
    """Return the list of a layer of torch's; None if it will make it anew at the next call."""
    # Parametrized weights are other objects whenever they are read, and reading may change them.
    if parametrize.is_parametrized(layer) or layer._weights_have_changed():
        return None
    return FlatWeights(layer._flat_weights, [getattr(layer, name, None) for name in layer._flat_weights_names])


def take_list(layer: nn.RNNBase, memo: dict[int, Any]) -> FlatWeights | None:
    """Return a copy of the list of a layer of torch's, by a memo in which tensors stand for themselves.

    None if it has only what the names have, and no code of the user's own may give it others.
    """
    found = list_of(layer)
    if found is None or (type(layer) in LAYERS and not found.differs()):
        return None
    return FlatWeights(copy.deepcopy(found.weights, memo), found.named)


def reaches_lists(root: nn.Module) -> bool:
    """Tell whether layers of torch's in a tree run with lists of other weights, or code in it reaches for lists."""
    found = [list_of(layer) for layer in root.modules() if isinstance(layer, nn.RNNBase)]
    kinds = {kind for module in root.modules() for kind in type(module).__mro__}
    return any(listed is not None and listed.differs() for listed in found) or any(map(names_list, kinds))


def is_substituted(layer: Any) -> bool:
    """Tell whether a layer, by itself, runs with other weights than those under its names."""
    weights = listed_weights(layer)
    return weights is not None and any(w is not named for w, named in zip(weights, named_weights(layer)))


def _slot(named: Sequence[Any]) -> str:
    """Return the attribute that holds the list: while weights are exchanged for fake ones, one for that time alone."""
    traced = not torch.compiler.is_dynamo_compiling() and any(isinstance(w, Tensor) and is_fake(w) for w in named)
    return "traced" if traced else "listed"


def _check(layer: Any, weights: Sequence[Any]) -> None:
    if torch.jit.is_tracing():  # shapes would be traced
        return
    shapes = [tuple(weight.shape) if isinstance(weight, Tensor) else None for weight in weights]
    wanted = layer.recurrence.weight_shapes
    if shapes != wanted:
        place = f"{layer.place}: _flat_weights"
        raise UnrollError(Problem(place, f"holds tensors of shapes {shapes}", f"they must be {wanted}"))
