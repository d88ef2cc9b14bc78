"""Code of graph modules, made when it is first asked for.

Who compiles, exports or rewrites a graph further reads its nodes alone, and code of a hundred thousand lines takes
longer than to write the graph. Torch has a class for that, `_LazyGraphModule`, which scripts, exports and passes treat
as another kind of module; this leaves a module its class.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import fx


class _Awaited:
    """Stands for an attribute that `recompile` sets, which it calls when the attribute is first read."""

    def __init__(self, name: str, module: fx.GraphModule) -> None:
        self.name, self.module = name, weakref.ref(module)

    def __get__(self, module: fx.GraphModule | None, owner: type) -> Any:
        found = self.module() if module is None else module
        if found is None:
            raise AttributeError(f"{owner.__name__}.{self.name}: the module is gone")
        found.recompile()  # shadows this on the instance, or replaces it in its class
        return getattr(owner if module is None else module, self.name)


def recompile_late(module: fx.GraphModule) -> None:
    """Let a graph module have the code of its graph, as `module.recompile()` does, from when that is first asked for.

    Example:
        >>> module = fx.symbolic_trace(torch.nn.Tanh())
        >>> module.graph.output_node().args = tuple(module.graph.find_nodes(op="placeholder"))
        >>> recompile_late(module)
        >>> "forward" in vars(type(module)), module(torch.ones(2))
        (True, tensor([1., 1.]))
    """
    own: Any = type(module)  # each graph module has a class of its own
    own.forward = _Awaited("forward", module)
    for name in ("_code", "_lineno_map", "_prologue_start"):
        vars(module).pop(name, None)
        setattr(own, name, _Awaited(name, module))
    own.__reduce_ex__ = _reduce


def _reduce(module: fx.GraphModule, protocol: Any) -> Any:
    """Pickle a module with its code, which torch takes from its attributes before it makes it anew."""
    if "_code" not in vars(module):
        module.recompile()
    return super(type(module), module).__reduce_ex__(protocol)
