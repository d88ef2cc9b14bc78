"""Which part of a tensor a node of an FX graph reads."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch import fx


def constant_index(user: fx.Node, node: fx.Node, rank: int) -> tuple[Any, ...] | None:
    """The index at which `user` reads `node`, an entry for each dimension, if it does and with constants."""
    if not user.args or user.args[0] is not node or user.kwargs:
        return None
    index: Any
    if user.target is operator.getitem:
        index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        if index.count(...) == 1:
            at = index.index(...)
            index = index[:at] + (slice(None),) * (rank - len(index) + 1) + index[at + 1 :]
    elif user.target in (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor):
        dim, *rest = user.args[1:] or (0,)
        part = (
            rest[0] if user.target is torch.ops.aten.select.int else slice(*(rest if len(rest) != 1 else (*rest, None)))
        )
        if not isinstance(dim, int):
            return None
        index = (slice(None),) * (dim % rank) + (part,)
    else:
        return None
    parts = [
        part
        for entry in index
        for part in ((entry.start, entry.stop, entry.step) if isinstance(entry, slice) else (entry,))
    ]
    if len(index) > rank or not all(part is None or type(part) is int for part in parts) or None in index:
        return None
    index += (slice(None),) * (rank - len(index))
    return tuple(slice(None) if _is_full(entry) else entry for entry in index)


def _is_full(entry: Any) -> bool:
    return (
        isinstance(entry, slice) and (entry.start or 0, entry.step or 1) == (0, 1) and (entry.stop or 0) >= sys.maxsize
    )
