"""Finds the recurrent layers of a module tree and makes a copy of the tree with replacements in their place."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.ao.nn import quantized
from torch.ao.nn.quantized.dynamic.modules import rnn
from torch.nn.utils import parametrize

from unroll.cells import CELLS
from unroll.modules import Unrolled, UnrolledCell
from unroll.plan import Plan
from unroll.recurrence import CELL_MODES, Problem, UnrollError
from unroll.subclasses import counterpart


class Found(NamedTuple):
    """A recurrent layer in a module tree."""

    names: list[str]
    """Everything it is called there"""
    layer: nn.Module


Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
"""Which layers: a name or shell pattern (`encoder.*`), several of them, a predicate of name and layer, or all."""

Rules = Mapping[type[nn.Module], Callable[[Any], nn.Module]]
"""For classes of the user's own: a function from the layer to a module that stands in for it."""


def chooses(where: Where, names: Iterable[str], layer: nn.Module) -> bool:
    """Whether `where` picks a layer with these names."""
    if where is None:
        return True
    if callable(where):
        return any(where(name, layer) for name in names)
    patterns = [where] if isinstance(where, str) else list(where)
    return any(name == pattern or fnmatchcase(name, pattern) for name in names for pattern in patterns)


def reach(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules, tensors and functions that can be reached from a module, each with every name it has.

    Looks into attributes, containers and plain objects, where layers hide from `named_modules()`.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, (nn.Module, torch.Tensor, types.FunctionType, types.MethodType)):
            yield name, value
        if id(value) in seen or isinstance(value, (torch.Tensor, type, types.ModuleType, str, bytes, int, float)):
            continue
        seen.add(id(value))
        stack.extend(reversed(list(_parts(name, value))))


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    dot = f"{name}." if name else ""
    if isinstance(value, nn.Module):
        tables = ("_modules", "_parameters", "_buffers")
        for table in tables:
            yield from ((f"{dot}{key}", part) for key, part in vars(value)[table].items())
        yield from ((f"{dot}{key}", part) for key, part in vars(value).items() if key not in tables)
    elif isinstance(value, Mapping):
        yield from ((f"{name}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"{name}[{i}]", part) for i, part in enumerate(value))
    elif isinstance(value, types.FunctionType):
        free = value.__code__.co_freevars
        yield from (
            (f"{name}.<{key}>", cell.cell_contents) for key, cell in zip(free, value.__closure__ or ()) if _filled(cell)
        )
    elif isinstance(value, types.MethodType):
        yield f"{name}.__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((f"{name}.{part}", getattr(value, part)) for part in ("func", "args", "keywords"))
    elif hasattr(value, "__dict__") and type(value).__module__.split(".")[:2] != ["torch", "fx"]:
        yield from ((f"{dot}{key}", part) for key, part in vars(value).items())


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def find(root: nn.Module, where: Where = None, rules: Rules | None = None) -> list[Found]:
    """The recurrent layers under `root` that `where` picks: torch's, their subclasses, those `rules` names.

    Raises:
        UnrollError: if `where` names nothing, or a layer sits where no copy of the tree can replace it.
    """
    found: dict[int, Found] = {}
    problems = []
    done: list[Found] = []
    for name, value in (*root.named_modules(remove_duplicate=False), *reach(root)):
        if isinstance(value, Unrolled):
            done.append(Found([name], value))
        elif isinstance(value, nn.Module) and (type(value) in (rules or ()) or is_recurrent(value)):
            names = found.setdefault(id(value), Found([], value)).names
            if name not in names:
                names.append(name)
        if isinstance(value, nn.Module) and ".<" in name and any(map(is_recurrent, value.modules())):
            mend = "hold it in an attribute, a bound method or a functools.partial"
            problems.append(Problem(name, "a function has captured a recurrent layer, out of reach of a copy", mend))
        if (
            isinstance(value, types.MethodType)
            and is_recurrent(value.__self__)
            and not hasattr(nn.Module, value.__name__)
        ):
            finding = f"a stored method of a recurrent layer, {value.__name__}, would go on running the fused kernel"
            problems.append(Problem(name, finding, "store the layer and call it"))
    if where is not None and not callable(where):
        for pattern in [where] if isinstance(where, str) else where:
            if not any(chooses(pattern, *entry) for entry in (*found.values(), *done)):
                names = ", ".join(name for entry in found.values() for name in entry.names) or "none"
                problems.append(
                    Problem(f"where={pattern!r}", "names no recurrent layer", f"the recurrent layers are: {names}")
                )
    if problems:
        raise UnrollError(*problems)
    return [entry for entry in found.values() if chooses(where, *entry)]


def is_recurrent(value: Any) -> bool:
    """Whether this is a module that runs a recurrent operator itself."""
    if isinstance(value, torch.jit.ScriptModule):
        graph = getattr(value, "inlined_graph", None)
        return graph is not None and any(graph.findAllNodes(kind) for kind in SCRIPT_KINDS)
    return isinstance(value, (nn.RNNBase, nn.RNNCellBase, *QUANTIZED))


SCRIPT_KINDS = tuple(f"aten::{kind}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")) + tuple(
    f"aten::{kind}_cell" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
)

QUANTIZED = (quantized.LSTM, rnn.RNNBase, rnn.RNNCellBase)


def replace(root: nn.Module, plan: Plan, where: Where = None, rules: Rules | None = None) -> nn.Module:
    """A copy of the tree with `Unrolled` layers, sharing every tensor with the original.

    References to a layer are followed wherever they are (containers, plain objects, bound methods).

    Raises:
        UnrollError: with every layer that cannot be honoured, before anything is copied.
    """
    rules = rules or {}
    found = find(root, where, rules)
    memo: dict[int, Any] = {id(value): value for _, value in reach(root) if isinstance(value, torch.Tensor)}
    problems, shells = [], []
    for names, layer in found:
        kind = type(layer)
        try:
            if kind in rules:
                stand_in = rules[kind](layer)
                if not isinstance(stand_in, nn.Module):
                    finding = f"the rule for {kind.__name__} returned {type(stand_in).__name__}"
                    raise UnrollError(Problem(names[0], finding, "return an nn.Module"))
                memo[id(layer)] = replace(stand_in, plan, rules={k: rule for k, rule in rules.items() if k is not kind})
            else:
                kind = counterpart(names[0], layer)
                memo[id(layer)] = shell = kind.__new__(kind)
                shells.append((names[0], layer, shell))
        except UnrollError as error:
            problems += error.problems
    if problems:
        raise UnrollError(*problems)
    try:
        for name, layer, shell in shells:
            _furnish(shell, layer, name, plan, memo)
        copied = copy.deepcopy(root, memo)
    except UnrollError:
        raise
    except Exception as error:
        finding = f"cannot be copied ({type(error).__name__}: {error})"
        raise UnrollError(
            Problem(type(root).__name__, finding, "take what cannot be copied out of its attributes")
        ) from error
    left = [name for entry in find(copied, rules=rules) if chooses(where, *entry) for name in entry.names]
    if left:
        raise UnrollError(*(Problem(name, "is still recurrent in the copy", "report this model") for name in left))
    return copied


def _furnish(shell: Any, layer: Any, name: str, plan: Plan, memo: dict[int, Any]) -> None:
    """Give the empty replacement everything that the layer has."""
    gone = ("_flat_weights", "_flat_weight_refs")
    shell.__dict__.update(copy.deepcopy({key: value for key, value in vars(layer).items() if key not in gone}, memo))
    shell.place, shell.plan = name or type(layer).__name__, plan
    if isinstance(shell, UnrolledCell):
        shell.mode = next(mode for kind, mode in CELL_MODES.items() if isinstance(layer, kind))
    if shell.recurrence.mode not in CELLS:
        known = ", ".join(CELLS)
        raise UnrollError(
            Problem(shell.place, f"has the unknown mode {shell.recurrence.mode}", f"the modes are {known}")
        )
    if parametrize.is_parametrized(layer):
        parametrize._inject_new_class(shell)
        for parameter in vars(layer)["_modules"]["parametrizations"]:
            parametrize._inject_property(shell, parameter)
