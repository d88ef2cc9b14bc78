"""Finds the recurrent layers of a module tree, wherever they hide."""

from __future__ import annotations

import collections
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.ao.nn import quantized
from torch.ao.nn.quantized.dynamic.modules import rnn
from torch.nn.utils import parametrize

from unroll.core.errors import Problem, Problems
from unroll.core.options import Rules, Where, chooses, unknown_names
from unroll.modules.layers import Unrolled
from unroll.modules.methods import is_explicit, is_filled
from unroll.torchscript.operators import SCRIPT_KINDS, method_graphs


class FoundLayer(NamedTuple):
    """A recurrent layer in a module tree."""

    names: list[str]
    """All its names there"""
    layer: nn.Module


# Nothing is looked for inside of these.
LEAVES = (torch.Tensor, torch.jit.ScriptModule, type, types.ModuleType, str, bytes, int, float, complex, type(None))


def walk_objects(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield modules, tensors, functions and methods that can be reached from a module, each with every name it has.

    Looks into attributes, containers, plain objects and functions, where layers hide from `named_modules()`.
    What a function has captured is named in angle brackets, `act.<layer>`.
    """
    kinds = (nn.Module, torch.Tensor, types.FunctionType, types.MethodType)
    yield from ((name, value) for name, value in walk_all(root) if isinstance(value, kinds))


def walk_all(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield everything that can be reached from a module in the same way, except in `LEAVES`."""
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        name, value = stack.pop()
        yield name, value
        # An object comes up under each of its names, and is looked into under the first.
        if id(value) not in seen and not isinstance(value, LEAVES):
            seen.add(id(value))
            stack.extend(reversed(list(_parts(name, value))))


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, types.FunctionType):
        yield from ((f"{name}.<{key}>", part) for key, part in _captured(value))
    elif isinstance(value, types.MethodType):
        yield from ((f"{name}.{part}", getattr(value, part)) for part in ("__self__", "__func__"))
    elif isinstance(value, functools.partial):
        yield from ((f"{name}.{part}", getattr(value, part)) for part in ("func", "args", "keywords"))
    elif isinstance(value, dict):
        yield from ((f"{name}.key[{i}]", key) for i, key in enumerate(value) if not isinstance(key, LEAVES))
        yield from ((f"{name}[{key!r}]", part) for key, part in value.items() if not _plain(part))
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(value) if not _plain(part))
    if isinstance(value, nn.Module) or type(value).__module__.split(".")[:2] != ["torch", "fx"]:
        dot = f"{name}." if name else ""
        yield from ((f"{dot}{key}", part) for key, part in _attributes(value))


def _plain(value: Any) -> bool:
    return isinstance(value, LEAVES) and not isinstance(value, (torch.Tensor, nn.Module))


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        tables = ("_modules", "_parameters", "_buffers")
        yield from (entry for table in tables for entry in own[table].items())
        own = {key: part for key, part in own.items() if key not in tables}
    yield from own.items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if isinstance(vars(kind).get(slot), types.MemberDescriptorType) and hasattr(value, slot):
                yield slot, getattr(value, slot)


def _captured(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function holds besides its arguments: enclosed variables and defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if is_filled(cell):
            yield name, cell.cell_contents
    yield from (("default", part) for part in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def find(
    root: nn.Module, where: Where = None, rules: Rules | None = None, others: Iterable[str] = ()
) -> list[FoundLayer]:
    """Find the recurrent layers under `root` that `where` picks: torch's, their subclasses, those `rules` names.

    `others` are names that `where` may pick besides, of layers that are no modules.

    Raises:
        UnrollError: if `where` names nothing, or a layer sits where no copy of the tree can replace it.
    """
    rules = rules or {}
    found: dict[int, FoundLayer] = {}
    done: list[FoundLayer] = []
    problems = Problems(
        Problem(name or type(module).__name__, "is compiled already", "unroll the module, then compile the result")
        for name, module in root.named_modules()
        if is_compiled(module) and _holds_recurrent(module)
    )
    for name, module in root.named_modules():
        if is_sharded(module):
            fix = "unroll the model first, shard the result, and drop the original"
            problems.add(name or type(module).__name__, "is sharded already, by FSDP, and cannot be copied", fix)
    problems.check()
    for name, value in (*_named_modules(root), *walk_objects(root)):
        if not isinstance(value, nn.Module):
            continue
        if isinstance(value, Unrolled):
            done.append(FoundLayer([name], value))
        elif parametrize.type_before_parametrizations(value) in rules or is_recurrent(value):
            names = found.setdefault(id(value), FoundLayer([], value)).names
            if name not in names:
                names.append(name)
        for kind, key in _shared_layers(value):
            finding = f"the class {kind.__qualname__} holds a recurrent layer, out of reach of a copy"
            problems.add(f"{name}.{key}".lstrip("."), finding, "set it in __init__, on the instance")
    problems += unknown_names(
        where, [name for entry in (*found.values(), *done) for name in entry.names] + list(others)
    )
    problems.check()
    return [entry for entry in found.values() if chooses(where, *entry)]


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with all their names, of TorchScript only the outermost."""
    scripted: tuple[str, ...] = ()
    for name, module in root.named_modules(remove_duplicate=False):
        if not name.startswith(scripted):
            yield name, module
            if isinstance(module, torch.jit.ScriptModule):
                scripted += (f"{name}.",)


def _holds_recurrent(module: nn.Module) -> bool:
    return any(map(is_recurrent, module.modules()))


def is_compiled(module: nn.Module) -> bool:
    """Tell whether it is compiled, by `torch.compile(module)` or `module.compile()`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def is_sharded(module: nn.Module) -> bool:
    """Tell whether FSDP has put shards in the place of its parameters, by `fully_shard` or as a wrapper."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and there if it was used
    return fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel))


def _shared_layers(module: nn.Module) -> Iterator[tuple[type, str]]:
    """Yield recurrent layers that are attributes of a module's class."""
    for kind in type(module).__mro__:
        yield from (
            (kind, key) for key, part in vars(kind).items() if isinstance(part, nn.Module) and is_recurrent(part)
        )


def is_recurrent(value: Any) -> bool:
    """Tell whether this is a module that runs a recurrent operator itself."""
    if isinstance(value, torch.jit.ScriptModule):
        return any(graph.findAllNodes(kind) for graph in method_graphs(value) for kind in SCRIPT_KINDS)
    if isinstance(value, (nn.RNNBase, nn.RNNCellBase)):
        return not is_explicit(value)
    return isinstance(value, QUANTIZED)


QUANTIZED = (quantized.LSTM, rnn.RNNBase, rnn.RNNCellBase)
