"""The tensors that a module holds: buffers, which a run may change, results in attributes, weights not finite."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@contextmanager
def buffers_restored(model: Any) -> Iterator[None]:
    """Give a module its buffers and their values back when this ends; nothing is done for what is no module."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tables = [(module._buffers, dict(module._buffers)) for module in modules]
    saved = [(b, b.detach().clone()) for _, table in tables for b in table.values() if b is not None and not b.is_meta]
    try:
        yield
    finally:
        for current, before in tables:
            for name, buffer in before.items():  # of TorchScript it is a table that can do no more
                current[name] = buffer
        with torch.no_grad():
            for buffer, value in saved:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def copied(original: nn.Module) -> nn.Module:
    """Return a deep copy, without the histories of results that are kept in attributes."""
    # Such as the weight that weight_norm computes anew in each call.
    kept = (value for module in original.modules() for value in pytree.tree_leaves(vars(module)))
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and not t.is_leaf}
    return copy.deepcopy(original, memo)


def not_finite(model: Any) -> list[str]:
    """Return the names of a module's recurrent weights that hold NaN or infinity.

    Their product with the zeros of the first step is NaN in torch, and left out of unrolled layers.

    Example:
        >>> layer = nn.GRU(3, 5)
        >>> _ = layer.weight_hh_l0.data.fill_(torch.inf)
        >>> not_finite(nn.Sequential(layer))
        ['0.weight_hh_l0']
    """
    if not isinstance(model, nn.Module):
        return []
    names = [(name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if "weight_hh" in name]
    return [name for name, tensor in names if not tensor.isfinite().all()]
