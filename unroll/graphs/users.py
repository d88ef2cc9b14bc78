"""Users of a node: the parts that they read of it, and writes into it in place."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload


def constant_index(user: fx.Node, node: fx.Node, rank: int) -> tuple[Any, ...] | None:
    """Return the index at which `user` reads `node`, an entry for each dimension, if it does and with constants."""
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
        # aten's slice(dim, start) has a start, where Python's slice of one argument has an end.
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
    # Entries that are None or bool add dimensions; nodes and tensors are no constants.
    if len(index) > rank or not all(part is None or type(part) is int for part in parts) or None in index:
        return None
    index += (slice(None),) * (rank - len(index))
    return tuple(slice(None) if _is_full(entry) else entry for entry in index)


def _is_full(entry: Any) -> bool:
    return (
        isinstance(entry, slice) and (entry.start or 0, entry.step or 1) == (0, 1) and (entry.stop or 0) >= sys.maxsize
    )


VIEWS = {
    *("chunk", "contiguous", "data", "detach", "expand", "flatten", "getattr", "getitem", "narrow", "permute", "ravel"),
    *("reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    *("mT", "swapaxes", "view_as"),
}
"""Operations whose results may share the memory of their operand"""

WRITES = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"}
"""Functions of `operator` that write into their first operand"""


def is_written(node: fx.Node) -> bool:
    """Tell whether something writes into a result of `node` in place, or into a view of one.

    Example:
        >>> graph = torch.fx.symbolic_trace(lambda x: (x + 1)[0].mul_(2)).graph
        >>> [is_written(node) for node in graph.nodes]
        [False, True, True, False, False]
    """
    return next(writers(node), None) is not None


def writers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that write into a result of `node` in place, or into a view of one."""
    stack, seen = [node], {node}
    while stack:
        for user in stack.pop().users:
            if _writes(user):
                yield user
            if _name(user) in VIEWS and user not in seen:
                seen.add(user)
                stack.append(user)


def _name(node: fx.Node) -> str:
    if isinstance(node.target, OpOverload):
        return node.target._opname
    return node.target if isinstance(node.target, str) else node.target.__name__


def _writes(node: fx.Node) -> bool:
    module = node.graph.owning_module
    if node.op == "call_module" and module is not None:
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    name = _name(node)
    by_name = name in WRITES or (name.endswith("_") and not name.startswith("_"))
    return by_name or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
