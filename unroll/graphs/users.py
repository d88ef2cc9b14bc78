"""Whether a graph writes into a value in place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx
from torch._ops import OpOverload

VIEWS = {
    *("chunk", "contiguous", "data", "detach", "expand", "flatten", "getattr", "getitem", "narrow", "permute", "ravel"),
    *("reshape", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    *("mT", "swapaxes", "view_as"),
}
"""Operations whose results may share the memory of their operand"""

WRITES = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"}
"""Functions of `operator` that write into their first operand"""


def is_written(node: fx.Node) -> bool:
    """Whether something writes into a result of `node` in place, or into a view of one.

    Example:
        >>> graph = torch.fx.symbolic_trace(lambda x: (x + 1)[0].mul_(2)).graph
        >>> [is_written(node) for node in graph.nodes]
        [False, True, True, False, False]
    """
    return next(writers(node), None) is not None


def writers(node: fx.Node) -> Iterator[fx.Node]:
    """What writes into a result of `node` in place, or into a view of one."""
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
