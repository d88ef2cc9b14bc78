"""The functions that run a recurrence, as Dynamo, `make_fx` and `torch.export` leave them in a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from unroll.core.recurrence import KINDS, Recurrence, read_call

OPTIONS = ("has_biases", "num_layers", "dropout", "bidirectional", "batch_first")


def _functions() -> dict[Any, tuple[str, str]]:
    """Map functions that run a recurrence to its kind and the form of their arguments: `layer`, `packed` or `cell`."""
    found: dict[Any, tuple[str, str]] = {}
    for kind in KINDS:
        packet, cell = getattr(torch.ops.aten, kind), getattr(torch.ops.aten, f"{kind}_cell")
        found |= {packet.input: (kind, "layer"), packet.data: (kind, "packed"), cell.default: (kind, "cell")}
        for home in (torch, torch._VF):
            # `packed` too, told apart by its arguments
            found |= {getattr(home, kind): (kind, "layer"), getattr(home, f"{kind}_cell"): (kind, "cell")}
    return found


FUNCTIONS = _functions()

ARGUMENTS = {
    "layer": ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"],
    "packed": ["input", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional"],
    "cell": ["input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"],
}


def bind(form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a functional call by name; those of a cell as if it were a layer."""
    given = dict.fromkeys(ARGUMENTS[form]) | dict(zip(ARGUMENTS[form], args)) | dict(kwargs)
    if form == "cell":
        given["params"] = [given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        given |= {"has_biases": given["b_ih"] is not None, "num_layers": 1, "dropout": 0.0}
        given |= {"train": False, "bidirectional": False}
    return {"batch_first": False, **given}


def form_of_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """Return the kind of recurrence that a call of one of `FUNCTIONS` runs, and the form of its arguments."""
    kind, form = FUNCTIONS[function]
    # The fourth argument is `params` in the packed form, `has_biases` in the other.
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    return kind, "packed" if form == "layer" and packed else form


def read_given(kind: str, form: str, given: Mapping[str, Any], shapes: Sequence[Any]) -> Recurrence:
    """Read the recurrence of a call from its bound arguments and the shapes of its weights."""
    return read_call(kind, shapes, **{key: given[key] for key in OPTIONS}, is_cell=form == "cell")


def read_on_tensors(
    kind: str, form: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Any], Recurrence]:
    """Read a call on tensors: its arguments by name, its weights in torch's order, and the recurrence that it runs."""
    given = bind(form, args, kwargs)
    weights = [weight for weight in given["params"] if weight is not None]
    return given, weights, read_given(kind, form, given, [tuple(weight.shape) for weight in weights[:2]])
