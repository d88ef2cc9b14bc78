"""Negative indices of a trace: torch's older exporter does not count them from the end where several tensors index."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class CountedIndices(TorchFunctionMode):
    """While this lasts, negative indices in `x[i, j]` are counted from the end by operations that a trace records.

    Example:
        >>> x, rows = torch.arange(6).reshape(2, 3), torch.tensor([0, 1])
        >>> with CountedIndices():
        ...     x[rows, torch.tensor([-1, 0])]
        tensor([2, 3])
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            args = (args[0], _counted(args[0], args[1]))
        return func(*args, **(kwargs or {}))


def _counted(tensor: Tensor, index: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return an index whose whole numbers in tensors and lists are not negative, if it has several of them."""
    axes = list(_axes(index, tensor.dim()))
    if sum(isinstance(part, (Tensor, list)) for part in index) < 2:
        return index
    return tuple(
        _from_start(part, tensor.shape[axis]) if isinstance(part, (Tensor, list)) else part
        for part, axis in zip(index, axes, strict=True)
    )


def _axes(index: tuple[Any, ...], count: int) -> Iterator[int]:
    """Yield for each part of an index the axis that it is of."""
    taken = [_taken(part) for part in index]
    axis = 0
    for part, width in zip(index, taken, strict=True):
        yield axis
        axis += count - sum(taken) if part is Ellipsis else width


def _taken(part: Any) -> int:
    """Return how many axes a part of an index takes; a mask one for each of its own."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _from_start(part: Any, size: Any) -> Tensor:
    part = torch.as_tensor(part)
    return part if part.dtype in (torch.bool, torch.uint8) else torch.where(part < 0, part + size, part)
