"""Cuts an example along time into two unequal pieces, and joins what a model gives for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll.comparison import TOLERANCES
from unroll.roundings import differences

TRIES = 100
"""The most ways to cut that are tried"""


class Axis(NamedTuple):
    """A dimension of an argument that may be that of time."""

    leaf: int
    dim: int


def axes_of(leaves: Sequence[Any], steps: int) -> Iterator[tuple[Axis, ...]]:
    """Yield choices of dimensions that may be that of time, one of each argument that has it, the likely ones first.

    Args:
        leaves: the arguments.
        steps: of the layer that has the fewest.
    """
    sizes = {
        Axis(k, dim): size
        for k, leaf in enumerate(leaves)
        if isinstance(leaf, Tensor)
        for dim, size in enumerate(leaf.shape)
        if size > 2 or 0 < steps < 3
    }

    def likelihood(axis: Axis) -> tuple[bool, bool]:
        return sizes[axis] != steps, sizes[axis] % steps != 0

    axes = sorted(sizes, key=likelihood)
    choices = (choice for count in range(1, len(leaves) + 1) for choice in combinations(axes, count))
    different = (choice for choice in choices if len({axis.leaf for axis in choice}) == len(choice))
    return islice(different, TRIES)


def lengthened(leaves: Sequence[Any], axes: Sequence[Axis], times: int) -> list[Any]:
    """Repeat arguments along time so often, with other numbers where steps would be equal, which would show nothing."""
    generator, found = torch.Generator().manual_seed(0), list(leaves)
    for leaf, dim in axes:
        value = leaves[leaf].detach()
        value = value.repeat([times if k == dim else 1 for k in range(value.dim())])
        if times > 1 or bool((value == value.narrow(dim, 0, 1)).all()):
            value = _varied(value, generator)
        found[leaf] = value
    return found


def _varied(value: Tensor, generator: torch.Generator) -> Tensor:
    """Scale floating-point numbers by random factors, or draw them if all are zero; draw integers among themselves.

    Booleans are drawn if all are false: what holds where nothing is masked may be all that a model takes.
    """
    shape = value.shape
    if value.is_floating_point():
        zeros = not value.any()
        drawn = (torch.randn if zeros else torch.rand)(shape, generator=generator, dtype=torch.float64).to(value)
        return drawn if zeros else value * (0.5 + drawn)
    if value.is_complex() or not value.numel() or (value.dtype is torch.bool and bool(value.any())):
        return value
    if bool((value == value.flatten()[0]).all()):
        return torch.randint(0, 2, shape, generator=generator).to(value)
    return value.flatten()[torch.randint(value.numel(), shape, generator=generator).to(value.device)]


def cut(leaves: Sequence[Any], axes: Sequence[Axis], steps: int) -> tuple[list[Any], list[Any]]:
    """Cut arguments into two pieces, of which the first is the longer one, between two of the layer's steps."""
    pieces = list(leaves), list(leaves)
    for leaf, dim in axes:
        size = leaves[leaf].shape[dim]
        first = size // steps * (steps // 2 + 1) if size % steps == 0 else size // 2 + 1
        pieces[0][leaf], pieces[1][leaf] = leaves[leaf].split([first, size - first], dim)
    return pieces


class Joined(NamedTuple):
    """The results of two pieces, in the place of one of the whole."""

    value: Tensor
    dim: int | None = None
    """The dimension of time; None for what has none, of which the last counts"""
    cut: int = 0
    """The size of the first piece in it"""


def joined(whole: Tensor, first: Tensor, second: Tensor) -> Joined | None:
    """Join two results; None if they are no parts of a result of this shape."""
    if whole.shape == first.shape == second.shape:
        return Joined(second)
    for dim, size in enumerate(first.shape):
        rest = [(*t.shape[:dim], *t.shape[dim + 1 :]) for t in (whole, first, second)]
        ranks = whole.dim() == first.dim() == second.dim()
        if ranks and rest[0] == rest[1] == rest[2] and whole.shape[dim] == size + second.shape[dim]:
            return Joined(torch.cat([first, second], dim), dim, size)
    return None


def off(whole: Tensor, other: Tensor) -> Tensor:
    """Tell of each number whether it differs from that of the whole by more than roundings."""
    if whole.is_complex():
        return off(torch.view_as_real(whole), torch.view_as_real(other)).any(-1)
    if whole.dtype not in TOLERANCES:
        return whole != other
    scale = whole.detach().double().abs().nan_to_num(0, 0, 0).max() if whole.numel() else 0.0
    return differences(whole, other) > TOLERANCES[whole.dtype] * scale


def sight(wrong: Tensor, pair: Joined) -> str:
    """Say how far what gives a result looks, by which of its numbers are others in pieces."""
    if pair.dim is None:
        return "gives another result for a piece than for the whole"
    by_step = wrong.movedim(pair.dim, 0).reshape(wrong.shape[pair.dim], -1).any(1)
    steps = by_step.nonzero().flatten().tolist()
    ahead = [pair.cut - step for step in steps if step < pair.cut]
    back = [step - pair.cut + 1 for step in steps if step >= pair.cut]
    sides = ((ahead, "ahead", pair.cut), (back, "back", len(by_step) - pair.cut))
    told = [
        f"{'at least ' * (max(side) == most)}{max(side)} step{'s' * (max(side) > 1)} {where}"
        for side, where, most in sides
        if side
    ]
    return f"looks {' and '.join(told)}"
