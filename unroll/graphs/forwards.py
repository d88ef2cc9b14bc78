"""Functions that run a recurrence in the code of modules, where no layer stands for them."""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from unroll.graphs.functions import FUNCTIONS
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled


def functional_calls(root: nn.Module) -> dict[str, str]:
    """Return, by the path of each module, a function that its `forward` calls to run a recurrence, such as `torch.gru`.

    Its code is read, and that of the user's functions and methods that it names; nothing is run.

    Example:
        >>> class Functional(nn.Module):
        ...     def forward(self, x, h, *weights):
        ...         return torch.gru_cell(x, h, *weights)
        >>> functional_calls(nn.Sequential(Functional()))
        {'0': 'gru_cell'}
    """
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        if isinstance(module, (Unrolled, torch.jit.ScriptModule)) or is_recurrent(module) or _is_torchs(type(module)):
            continue
        called = next(_called(inspect.unwrap(type(module).forward), type(module)), None)
        if called is not None:
            found[name] = called
    return found


def _called(function: Any, kind: type) -> Iterator[str]:
    """Yield the names of the functions of torch that run a recurrence in a function or method of a class."""
    seen: set[Any] = set()
    left = [function]
    while left:
        function = left.pop()
        if not isinstance(function, types.FunctionType) or function in seen or _is_torchs(function):
            continue
        seen.add(function)
        names = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
        for value in _named(function.__code__, names, kind):
            if isinstance(value, types.FunctionType):
                left.append(value)
            elif _runs_a_recurrence(value):
                yield str(getattr(value, "__name__", value))


def _named(code: types.CodeType, names: dict[str, Any], kind: type) -> Iterator[Any]:
    """Yield what code names: variables from outside, attributes of modules, and methods of its class."""
    value: Any = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            value = names.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            within = isinstance(value, (types.ModuleType, torch._ops.OpOverloadPacket))
            value = getattr(value if within else kind, instruction.argval, None)
        elif isinstance(instruction.argval, types.CodeType):  # a function within
            yield from _named(instruction.argval, names, kind)
            continue
        elif instruction.opname not in ("PRECALL", "CACHE", "PUSH_NULL"):
            value = None
        yield value


def _runs_a_recurrence(value: Any) -> bool:
    known = (type(torch.gru), torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    if not isinstance(value, known):
        return False
    overloads = [getattr(value, name) for name in value.overloads()] if hasattr(value, "overloads") else [value]
    return any(overload in FUNCTIONS for overload in overloads)


def _is_torchs(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] == "torch"
