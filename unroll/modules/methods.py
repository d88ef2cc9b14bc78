"""Reads the code of classes: what their methods name, and what they can reach when they run."""

from __future__ import annotations

import builtins
import dis
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from unroll.core.patching import original

TORCH_CLASSES: tuple[type[nn.Module], ...] = (nn.RNNBase, nn.LSTM, nn.GRU, nn.RNN)
TORCH_CLASSES += (nn.RNNCellBase, nn.LSTMCell, nn.GRUCell, nn.RNNCell)

# Names that a method can only need to reach the fused kernel past `super()`.
KERNEL_NAMES = {"_VF", "torch_VF", *(kind.__name__ for kind in TORCH_CLASSES)}
KERNEL_NAMES |= {"mkldnn_rnn_layer", "_cudnn_rnn"}

# Names of all functions of torch that run a recurrence, and of what runs a module.
RECURRENT_NAMES = {name for name in dir(torch) if re.search(r"lstm|gru|rnn", name)}
RECURRENT_NAMES |= KERNEL_NAMES | {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward"}

FORWARDS = {kind.forward for kind in TORCH_CLASSES}

# Objects that run no code of a model's.
PLAIN = (int, float, complex, str, bytes, tuple, types.NoneType, types.EllipsisType, torch.dtype, torch.device)


def function_of(method: Any) -> tuple[types.FunctionType | None, str]:
    """Return the function in an entry of a class's namespace, and the name of what wraps it there."""
    inner = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
    wrapped = "" if inner is method else type(method).__name__
    return (inner, wrapped) if isinstance(inner, types.FunctionType) else (None, wrapped)


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a function's code, and that of functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def names(function: types.FunctionType) -> set[str]:
    """Return the names, of anything but arguments and variables of its own, that a function's code has."""
    return {name for code in codes(function.__code__) for name in (*code.co_names, *code.co_freevars)}


def defining(kind: type, name: str) -> type:
    """Return the class from which a class has a method."""
    return next(base for base in kind.__mro__ if name in vars(base))


def names_list(kind: type) -> bool:
    """Tell whether a class that is not of torch's has methods that name `_flat_weights`."""
    functions = (function_of(entry)[0] for entry in vars(kind).values())
    return not is_known(kind) and any("_flat_weights" in names(function) for function in functions if function)


def is_explicit(layer: nn.Module) -> bool:
    """Tell whether a subclass of torch's layers has a `forward` that for certain runs nothing recurrent of torch's.

    What it can reach is read from its code: methods, functions and modules. Anything else stands for a doubt.
    """
    kind = type(layer)
    calls_otherwise = {"forward", "__call__"} & vars(layer).keys() or defining(kind, "__call__") is not nn.Module
    forward = original(kind, "forward")
    if forward in FORWARDS or calls_otherwise:
        return False
    pending, seen = [forward], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        for value in reached(function, layer):
            function = value.__func__ if isinstance(value, (types.MethodType, staticmethod)) else value
            if isinstance(function, types.FunctionType) and not is_known(function):
                pending.append(function)
            elif not _is_harmless(function):
                return False
    return True


class _Doubt:
    """Stands for what cannot be told."""


_SELF, _UNKNOWN = object(), object()


def reached(function: types.FunctionType, layer: nn.Module) -> Iterator[Any]:
    """Yield the global objects, and those that belong to a layer, which a method or function of a layer reads."""
    free = zip(function.__code__.co_freevars, function.__closure__ or ())
    enclosed = {name: cell.cell_contents for name, cell in free if name != "__class__" and is_filled(cell)}
    first = function.__code__.co_varnames[:1]
    local = {name for code in codes(function.__code__) for name in code.co_cellvars}
    for code in codes(function.__code__):
        if RECURRENT_NAMES & {constant for constant in code.co_consts if isinstance(constant, str)}:
            yield _Doubt
        here: Any = _UNKNOWN
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                if here is _SELF:
                    here = _of_layer(layer, name)
                elif here is not _UNKNOWN:
                    here = getattr(here, name, _Doubt)
                elif name in RECURRENT_NAMES:
                    yield _Doubt
            elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                here = function.__globals__.get(name, getattr(builtins, name, _Doubt))
            elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_SUPER_ATTR"):
                here = _SELF if (name,) == first else enclosed.get(name, _UNKNOWN if name in local else _Doubt)
            elif "LOAD_FAST" in instruction.opname:
                # several at once, STORE_FAST_LOAD_FAST too, have a tuple of names, of which the last one lies on top
                last = name[-1] if isinstance(name, tuple) else name
                here = _SELF if (last,) == first and code is function.__code__ else _UNKNOWN
            elif instruction.opname not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG"):
                here = _UNKNOWN
            if here is not _UNKNOWN and here is not _SELF:
                yield here


def _of_layer(layer: nn.Module, name: str) -> Any:
    """Return what a method reads by this name of its layer, without running code of the layer's."""
    if name in layer._parameters or name in layer._buffers or name in layer._modules:
        return _UNKNOWN  # a layer in the tree is found by itself
    for kind in type(layer).__mro__:
        if name in vars(kind):
            entry = vars(kind)[name]
            return vars(layer).get(name, entry.fget if isinstance(entry, property) else entry)
    return vars(layer).get(name, _Doubt)


def is_known(value: Any) -> bool:
    """Tell whether a function or class is of torch, of Python or of this package."""
    module = (getattr(value, "__module__", None) or "builtins").partition(".")[0]
    return module in ("torch", "unroll") or module in sys.stdlib_module_names


def _is_harmless(value: Any) -> bool:
    """Tell whether what a method reads runs nothing recurrent, whatever is done with it."""
    if isinstance(value, type):
        return is_known(value) and not issubclass(value, (*TORCH_CLASSES, _Doubt))
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType)):
        return is_known(value) and value.__name__ not in RECURRENT_NAMES
    return isinstance(value, (*PLAIN, types.ModuleType, list))
