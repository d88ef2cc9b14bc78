"""How tests compare results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll import UnrollError


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Same structure, shapes, dtypes and values, to `rtol` of the largest value of each tensor. NaN is a difference."""
    ours, theirs = pytree.tree_structure(actual), pytree.tree_structure(expected)
    assert ours == theirs, f"{ours} is not {theirs}"
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        if not isinstance(e, Tensor):
            assert a == e
            continue
        scale = e.detach().abs().max().item() if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=rtol, atol=rtol * scale)


def assert_equal(actual: Any, expected: Any) -> None:
    """The same, bit for bit."""
    assert_same(actual, expected, rtol=0)


def gradients(function: Callable[..., Any], args: tuple[Any, ...], seed: int = 0) -> dict[str, Tensor]:
    """Gradients of a random projection of the results by each float input and each parameter, by name."""
    leaves, spec = pytree.tree_flatten(args)
    inputs = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in leaves
    ]
    results = pytree.tree_leaves(function(*pytree.tree_unflatten(inputs, spec)))
    generator = torch.Generator().manual_seed(seed)
    wanted = {f"input {k}": t for k, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad}
    if isinstance(function, nn.Module):
        wanted |= dict(function.named_parameters())
    total = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
        for t in results
        if isinstance(t, Tensor) and t.is_floating_point()
    )
    found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(wanted.items(), found, strict=True)}


def problems(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:
    """What the UnrollError of a call says, problem by problem."""
    with pytest.raises(UnrollError) as caught:
        function(*args, **kwargs)
    return [str(problem) for problem in caught.value.problems]


def repacked(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """The same packing around other data."""
    return packed._replace(data=data)
