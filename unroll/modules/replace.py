"""Finds the recurrent layers of a module tree and makes a copy of the tree with replacements in their place."""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.ao.nn import quantized
from torch.ao.nn.quantized.dynamic.modules import rnn
from torch.nn.utils import parametrize

from unroll.core.cells import CELLS
from unroll.core.layout import freeze_layer
from unroll.core.options import Rules, Where, check_rules, chooses, unknown_names, unknown_rules
from unroll.core.plan import Plan
from unroll.core.recurrence import CELL_MODES, Problem, UnrollError
from unroll.modules.layers import Unrolled, UnrolledCell
from unroll.modules.subclasses import assign_class, counterpart


class Found(NamedTuple):
    """A recurrent layer in a module tree."""

    names: list[str]
    """Everything it is called there"""
    layer: nn.Module


# Nothing is looked for inside of these.
LEAVES = (torch.Tensor, torch.jit.ScriptModule, type, types.ModuleType, str, bytes, int, float, complex, type(None))


def reach(root: Any) -> Iterator[tuple[str, Any]]:
    """Modules, tensors, functions and methods that can be reached from a module, each with every name it has.

    Looks into attributes, containers, plain objects and functions, where layers hide from `named_modules()`.
    What a function has captured is named in angle brackets, `act.<layer>`.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, (nn.Module, torch.Tensor, types.FunctionType, types.MethodType)):
            yield name, value
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
    """What a function holds besides its arguments: enclosed variables and defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if _filled(cell):
            yield name, cell.cell_contents
    yield from (("default", part) for part in function.__defaults__ or ())
    yield from (function.__kwdefaults__ or {}).items()


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def find(root: nn.Module, where: Where = None, rules: Rules | None = None, others: Iterable[str] = ()) -> list[Found]:
    """The recurrent layers under `root` that `where` picks: torch's, their subclasses, those `rules` names.

    `others` are names that `where` may pick besides, of layers that are no modules.

    Raises:
        UnrollError: if `where` names nothing, or a layer sits where no copy of the tree can replace it.
    """
    rules = rules or {}
    found: dict[int, Found] = {}
    done: list[Found] = []
    problems = [
        Problem(name or type(module).__name__, "is compiled already", "unroll the module, then compile the result")
        for name, module in root.named_modules()
        if _is_compiled(module) and _holds_recurrent(module)
    ]
    if problems:
        raise UnrollError(*problems)
    for name, value in (*_named_modules(root), *reach(root)):
        if not isinstance(value, nn.Module):
            continue
        if isinstance(value, Unrolled):
            done.append(Found([name], value))
        elif parametrize.type_before_parametrizations(value) in rules or is_recurrent(value):
            names = found.setdefault(id(value), Found([], value)).names
            if name not in names:
                names.append(name)
        for kind, key in _shared_layers(value):
            finding = f"the class {kind.__qualname__} holds a recurrent layer, out of reach of a copy"
            problems.append(Problem(f"{name}.{key}".lstrip("."), finding, "set it in __init__, on the instance"))
    problems += unknown_names(
        where, [name for entry in (*found.values(), *done) for name in entry.names] + list(others)
    )
    if problems:
        raise UnrollError(*dict.fromkeys(problems))
    return [entry for entry in found.values() if chooses(where, *entry)]


def _named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules with all their names, of TorchScript only the outermost."""
    scripted: tuple[str, ...] = ()
    for name, module in root.named_modules(remove_duplicate=False):
        if not name.startswith(scripted):
            yield name, module
            if isinstance(module, torch.jit.ScriptModule):
                scripted += (f"{name}.",)


def _holds_recurrent(module: nn.Module) -> bool:
    return any(map(is_recurrent, module.modules()))


def _is_compiled(module: nn.Module) -> bool:
    """By `torch.compile(module)` or `module.compile()`."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def _shared_layers(module: nn.Module) -> Iterator[tuple[type, str]]:
    """Recurrent layers that are attributes of a module's class."""
    for kind in type(module).__mro__:
        yield from (
            (kind, key) for key, part in vars(kind).items() if isinstance(part, nn.Module) and is_recurrent(part)
        )


def is_recurrent(value: Any) -> bool:
    """Whether this is a module that runs a recurrent operator itself."""
    if isinstance(value, torch.jit.ScriptModule):
        return any(graph.findAllNodes(kind) for graph in _script_graphs(value) for kind in SCRIPT_KINDS)
    return isinstance(value, (nn.RNNBase, nn.RNNCellBase, *QUANTIZED))


def _script_graphs(module: torch.jit.ScriptModule) -> Iterator[Any]:
    """The graph of each method, with what it calls written out. A scripted layer has no single `forward`."""
    for name in module._c._method_names():
        graph = module._c._get_method(name).graph.copy()
        torch._C._jit_pass_inline(graph)
        yield graph


SCRIPT_KINDS = tuple(f"aten::{kind}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")) + tuple(
    f"aten::{kind}_cell" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
)

QUANTIZED = (quantized.LSTM, rnn.RNNBase, rnn.RNNCellBase)


def replace(
    root: nn.Module,
    plan: Plan | None,
    where: Where = None,
    rules: Rules | None = None,
    others: Iterable[str] = (),
    *,
    freeze: bool = False,
    unused: set[type[nn.Module]] | None = None,
) -> nn.Module:
    """A copy of the tree with `Unrolled` layers, sharing every tensor with the original.

    References to a layer are followed wherever they are (containers, plain objects, methods, closures). Layers that
    are `Unrolled` already keep their plan, unless `where` picks them or there are no others. With `freeze`, those that
    `where` picks are frozen, and share no weight. Stand-ins are replaced in turn, and take from `unused` the classes
    whose rules they needed.

    Raises:
        UnrollError: with every layer that cannot be honoured, and every rule for none, before anything is copied.
    """
    rules = check_rules(rules)
    outermost, unused = unused is None, set(rules) if unused is None else unused
    found = find(root, where, rules, others)
    reached = list(reach(root))
    memo: dict[int, Any] = {id(value): value for _, value in reached if isinstance(value, torch.Tensor)}
    problems, shells = [], []
    for names, layer in found:
        kind = parametrize.type_before_parametrizations(layer)
        try:
            if kind in rules:
                unused.discard(kind)
                stand_in = rules[kind](layer)
                if not isinstance(stand_in, nn.Module):
                    finding = f"the rule for {kind.__name__} returned {type(stand_in).__name__}"
                    raise UnrollError(Problem(names[0], finding, "return an nn.Module"))
                others_ruled = {k: rule for k, rule in rules.items() if k is not kind}
                memo[id(layer)] = replace(stand_in, plan, rules=others_ruled, freeze=freeze, unused=unused)
            elif isinstance(layer, torch.jit.ScriptModule):
                if freeze:
                    finding = "is a ScriptModule, which unroll does not freeze"
                    raise UnrollError(Problem(names[0], finding, "leave freeze out, and use torch.jit.freeze"))
                from unroll.torchscript.rewrite import unroll_script

                memo[id(layer)] = unroll_script(layer, plan=Plan.of(plan))
            else:
                kind = counterpart(names[0], layer)
                memo[id(layer)] = shell = kind.__new__(kind)
                shells.append((names[0], layer, shell))
        except UnrollError as error:
            problems += error.problems
    for name, method in reached:
        if isinstance(method, types.MethodType) and id(method.__self__) in memo:
            memo[id(method)] = _rebound(method, memo[id(method.__self__)])
            if memo[id(method)] is None:
                finding = f"a stored method of a recurrent layer, {method.__name__}, has no counterpart"
                problems.append(Problem(name, finding, "store the layer and call it"))
    problems += unknown_rules(unused) if outermost else []
    if problems:
        raise UnrollError(*problems)
    functions = [function for _, function in reached if _captures_layer(function)]
    memo |= {id(cell): types.CellType() for function in functions for cell in function.__closure__ or ()}
    memo |= {id(function): _empty_copy(function, memo) for function in functions}
    try:
        for name, layer, shell in shells:
            _furnish(shell, layer, name, Plan.of(plan), memo)
        copied = copy.deepcopy(root, memo)
        for function in functions:
            _fill(memo[id(function)], function, memo)
    except UnrollError:
        raise
    except Exception as error:
        finding = f"cannot be copied ({type(error).__name__}: {error})"
        raise UnrollError(
            Problem(type(root).__name__, finding, "take what cannot be copied out of its attributes")
        ) from error
    for name, module in (*copied.named_modules(remove_duplicate=False), *reach(copied)):
        asked = where is not None or not found
        if plan is None or not asked or not isinstance(module, Unrolled) or module.plan == plan:
            continue
        if chooses(where, [name], module):
            module.plan = plan
    left = [name for entry in find(copied, rules=rules) if chooses(where, *entry) for name in entry.names]
    if left:
        raise UnrollError(*(Problem(name, "is still recurrent in the copy", "report this model") for name in left))
    if freeze:
        unrolled = [
            value for name, value in reach(copied) if isinstance(value, Unrolled) and chooses(where, [name], value)
        ]
        _freeze([*(shell for _, _, shell in shells), *unrolled])
    return copied


def _freeze(layers: Iterable[Unrolled]) -> None:
    problems: list[Problem] = []
    for layer in layers:
        try:
            freeze_layer(layer)
        except UnrollError as error:
            problems += error.problems
    if problems:
        raise UnrollError(*dict.fromkeys(problems))


def _captures_layer(value: Any) -> bool:
    """Whether this is a function that holds a recurrent layer, however deep."""
    if not isinstance(value, types.FunctionType):
        return False
    return any(isinstance(part, nn.Module) and is_recurrent(part) for _, part in reach(value))


def _empty_copy(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function with the same code and empty cells; `copy.deepcopy` would go on using the function itself."""
    cells = tuple(memo[id(cell)] for cell in function.__closure__ or ())
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)


def _fill(copied: types.FunctionType, function: types.FunctionType, memo: dict[int, Any]) -> None:
    """Give the copy of a function copies of all that the function has captured."""
    for new, old in zip(copied.__closure__ or (), function.__closure__ or (), strict=True):
        if _filled(old):
            new.cell_contents = copy.deepcopy(old.cell_contents, memo)
    for part in ("__defaults__", "__kwdefaults__", "__dict__"):
        setattr(copied, part, copy.deepcopy(getattr(function, part), memo))
    copied.__doc__, copied.__module__, copied.__qualname__ = (
        function.__doc__,
        function.__module__,
        function.__qualname__,
    )


def _rebound(method: types.MethodType, stand_in: Any) -> Any:
    """What a stored method of a layer is for its stand-in; None if it is a method of a base class alone."""
    name, kinds = method.__name__, type(method.__self__).__mro__
    if getattr(kinds[0], name, None) is method.__func__:
        return getattr(stand_in, name, None)
    inherited = any(vars(kind).get(name) is method.__func__ for kind in kinds)
    return None if inherited else types.MethodType(method.__func__, stand_in)


def _furnish(shell: Any, layer: Any, name: str, plan: Plan, memo: dict[int, Any]) -> None:
    """Give the empty replacement everything that the layer has."""
    gone = ("_flat_weights", "_flat_weight_refs", "__overloads__")  # the last is left by torch.jit.script
    shell.__dict__.update(copy.deepcopy({key: value for key, value in vars(layer).items() if key not in gone}, memo))
    shell.place, shell.plan = name or type(layer).__name__, plan
    if isinstance(shell, UnrolledCell):
        shell.mode = next(mode for kind, mode in CELL_MODES.items() if isinstance(layer, kind))
    if shell.recurrence.mode not in CELLS:
        known = ", ".join(CELLS)
        raise UnrollError(
            Problem(shell.place, f"has the unknown mode {shell.recurrence.mode}", f"the modes are {known}")
        )
    assign_class(shell, type(shell))
