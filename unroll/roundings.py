"""Monte Carlo arithmetic: a model run with other roundings, to see how much its results depend on them.

The method is that of D. S. Parker, Monte Carlo Arithmetic (1997).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SHAKES = 8
"""How often a model is run with other roundings"""


class Shaken(TorchDispatchMode):
    """While this lasts, results of operators are up to one rounding off, by chance; whole numbers are left alone.

    So counts, masks and zeros stay as they are.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        in_place_or_view = any(value.alias_info is not None for value in func._schema.returns)
        return results if in_place_or_view else pytree.tree_map_only(Tensor, self._off, results)

    def _off(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        part = torch.rand(value.shape, generator=self.generator).to(value) - 0.5
        return torch.where(value == value.round(), value, value + value * part * torch.finfo(value.dtype).eps)


def differences(a: Tensor, b: Tensor) -> Tensor:
    """Return the difference of each number; infinite where one is NaN or infinite and the other is not the same.

    Example:
        >>> differences(torch.tensor([1.0, math.inf]), torch.tensor([3.0, math.inf])).tolist()
        [2.0, 0.0]
    """
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0, (a - b).abs().nan_to_num(math.inf, math.inf))


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference."""
    return differences(a, b).max().item()
