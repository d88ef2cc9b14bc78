"""Functions that run a recurrence in the code of modules, where no layer stands for them."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from unroll.graphs.functions import FUNCTIONS
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled
from unroll.modules.methods import is_known, reached


def functional_calls(root: nn.Module) -> dict[str, str]:
    """Return, by the path of each module, a function that its `forward` calls to run a recurrence, such as `torch.gru`.

    Its code is read, and that of the user's functions and methods that it names; nothing is run.
    """
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        if isinstance(module, (Unrolled, torch.jit.ScriptModule)) or is_recurrent(module) or is_known(type(module)):
            continue
        called = next(_called(inspect.unwrap(type(module).forward), module), None)
        if called is not None:
            found[name] = called
    return found


def _called(function: Any, module: nn.Module) -> Iterator[str]:
    """Yield the names of the functions of torch that run a recurrence in a function or method of a module."""
    seen: set[Any] = set()
    left = [function]
    while left:
        function = left.pop()
        if not isinstance(function, types.FunctionType) or function in seen or is_known(function):
            continue
        seen.add(function)
        for value in reached(function, module):
            if isinstance(value, types.FunctionType):
                left.append(value)
            elif _runs_a_recurrence(value):
                yield str(getattr(value, "__name__", value))


def _runs_a_recurrence(value: Any) -> bool:
    known = (type(torch.gru), torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    if not isinstance(value, known):
        return False
    overloads = [getattr(value, name) for name in value.overloads()] if hasattr(value, "overloads") else [value]
    return any(overload in FUNCTIONS for overload in overloads)
