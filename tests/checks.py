"""How tests compare results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from tests.cases import Case, flat
from unroll import UnrollError, unroll


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
        state = function.state_dict(keep_vars=True)  # in which layers have torch's names for what modules hold
        wanted |= {name: t for name, t in state.items() if isinstance(t, nn.Parameter)}
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


def check_vmap_over_inputs(case: Case, device: torch.device | str = "cpu") -> None:
    """Three inputs of a layer in one call are as three calls."""
    layer = case.layer(torch.float64).to(device)
    inputs = torch.stack([case.args(torch.float64, seed=seed)[0] for seed in range(3)]).to(device)
    apart = zip(*(flat(layer(x)) for x in inputs), strict=True)
    assert_same(list(flat(vmap(unroll(layer))(inputs))), [torch.stack(parts) for parts in apart])


def check_vmap_over_weights(case: Case, device: torch.device | str = "cpu") -> None:
    """Three layers, an ensemble, in one call are as three calls."""
    layers = [case.layer(torch.float64, seed=seed).to(device) for seed in range(3)]
    unrolled = [unroll(layer) for layer in layers]
    parameters, buffers = stack_module_state(unrolled)
    x = case.args(torch.float64)[0].to(device)
    together = vmap(lambda p, b: functional_call(unrolled[0], (p, b), (x,)))(parameters, buffers)
    apart = zip(*(flat(layer(x)) for layer in layers), strict=True)
    assert_same(list(flat(together)), [torch.stack(parts) for parts in apart])
