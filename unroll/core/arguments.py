"""Checks of what a layer is given, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value

from unroll.core.errors import Problem, UnrollError
from unroll.core.recurrence import Recurrence

AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}
"""The dtypes that autocast casts; it leaves float64 and integers alone."""


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """Return the dtype in which autocast computes on the tensor's device, or None where it is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_arguments(
    recurrence: Recurrence,
    place: str,
    input: Any,
    state: Any,
    *,
    weight: Any = None,
    rows: int | None = None,
) -> None:
    """Refuse what torch refuses, before anything is computed.

    Args:
        recurrence: the layer without its tensors.
        place: its name, for the message.
        input: anything with `shape` (and `dtype` and `device`, if `weight` is given).
        state: None, a tensor, or for an LSTM the pair `(h_0, c_0)`.
        weight: a weight that dtype and device must match; None where they cannot be told.
        rows: of a packed input, its largest batch size.

    Raises:
        UnrollError: with every mismatch found.
    """
    _check_kind(f"{place}: input", input)
    problems: list[Problem] = []
    shape = tuple(input.shape)

    def expect(good: bool, argument: str, finding: str, fix: str) -> bool:
        if not good:
            problems.append(Problem(f"{place}: {argument}", finding, fix))
        return good

    features = recurrence.input_size
    # packed [rows, F]; a cell [F] or [B, F]; a layer [T, F] or [T, B, F], with batch_first [B, T, F]
    ranks = (2,) if rows is not None else (1, 2) if recurrence.is_cell else (2, 3)
    wanted = " or ".join(f"{rank}-D" for rank in ranks)
    known = expect(len(shape) in ranks, "input", f"is {len(shape)}-D, {list(shape)}", f"give a {wanted} tensor")
    if known:
        fix = f"its last size must be input_size={features}"
        known = expect(shape[-1] == features, "input", f"has shape {list(shape)}", fix)
    batched = rows is not None or len(shape) == ranks[-1]
    # axes where there is a batch; without one the steps are axis 0
    time, batch = (1, 0) if recurrence.batch_first else (0, 1)
    if known and rows is None and not recurrence.is_cell:
        length = shape[time if batched else 0]
        some = not has_static_value(length) or length > 0  # Dynamo cannot branch on a symbolic length everywhere
        expect(some, "input", f"has no time steps, {list(shape)}", "give a sequence of at least one step")

    checked = [("input", input)]
    if state is not None:
        names = tuple(f"{name}_0" for name in recurrence.cell.states)
        if len(names) == 1:
            tensors = (state,)
            whole = hasattr(state, "shape")
        else:
            whole = isinstance(state, (tuple, list)) and len(state) == len(names)
            tensors = tuple(state) if whole else ()
            whole = whole and all(hasattr(s, "shape") for s in tensors)
        form = "a tensor" if len(names) == 1 else f"a pair ({', '.join(names)})"
        if expect(whole, "state", f"is {type(state).__name__}", f"give {form}, or None for zeros"):
            for name, tensor, size in zip(names, tensors, recurrence.state_sizes, strict=True):
                checked.append((name, tensor))
                if known:
                    # a layer's [passes, B, size], a cell's [B, size]; without a batch there is no B
                    lead = () if recurrence.is_cell else (recurrence.passes,)
                    count = shape[0 if recurrence.is_cell else batch] if rows is None and batched else rows
                    form = (*lead, count, size) if batched else (*lead, size)
                    good = tuple(tensor.shape) == form
                    expect(good, name, f"has shape {list(tensor.shape)}", f"it must be {list(form)}")

    if weight is not None:
        on = weight.device  # its is_meta is unknown to weights of Opacus' `ew`
        casts = autocast_dtype(weight) is not None
        for name, tensor in checked:
            fix = "load the weights first" if on.type == "meta" else f"give {on}, or move the module"
            expect(tensor.device == on, name, f"is on {tensor.device}, the weights on {on}", fix)
            # dtypes may differ where autocast makes one of both
            good = tensor.dtype == weight.dtype or (casts and {tensor.dtype, weight.dtype} <= AUTOCAST)
            fix = f"convert it with .to({weight.dtype}), or the module with .to({tensor.dtype})"
            expect(good, name, f"has dtype {tensor.dtype}, the weights {weight.dtype}", fix)
    if problems:
        raise UnrollError(*_arrays(place, checked) or problems)


def _arrays(place: str, given: Sequence[tuple[str, Any]]) -> list[Problem]:
    fix = "give a tensor: torch.from_numpy(array)"
    names = [name for name, tensor in given if hasattr(tensor, "__array_interface__")]
    return [Problem(f"{place}: {name}", "is a NumPy array", fix) for name in names]


def _check_kind(place: str, input: Any) -> None:
    """Refuse what has no shape, or not one for all rows."""
    refuse_nested(place, input)
    if not hasattr(input, "shape"):
        raise UnrollError(Problem(place, f"is {type(input).__name__}", "give a tensor"))


def refuse_nested(place: str, tensor: Any) -> None:
    """Refuse what has not one shape for all rows.

    Raises:
        UnrollError: for a nested tensor, jagged or strided.
    """
    if getattr(tensor, "is_nested", False):
        fix = "pad it (torch.nested.to_padded_tensor) and pack that with its lengths (pack_padded_sequence)"
        raise UnrollError(Problem(place, "is a nested tensor, of rows of several lengths", fix))


def as_args(args: Any) -> tuple[Any, ...]:
    """Return example arguments as a tuple: a single one need not be in one."""
    return () if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,)


def as_states(hx: Any) -> tuple[Any, ...] | None:
    """Return a layer's state as a tuple: torch takes a single one bare; None stands for zeros."""
    return None if hx is None else tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def as_result(states: Sequence[Any]) -> Any:
    """Return states as torch's layers do: a single one bare, several in a tuple."""
    return states[0] if len(states) == 1 else tuple(states)
