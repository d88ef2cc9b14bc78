"""Makes a copy of a module tree with replacements in the place of its recurrent layers."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from unroll.core.cells import CELLS
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Rules, Where, check_rules, chooses, unknown_rules
from unroll.core.patching import original
from unroll.core.plan import Plan
from unroll.core.recurrence import cell_mode
from unroll.modules.find import LEAVES, find, is_recurrent, walk_all, walk_objects
from unroll.modules.flat_weights import FlatWeights, take_list
from unroll.modules.freezing import freeze_layers
from unroll.modules.layers import Unrolled, UnrolledCell, UnrolledLayer
from unroll.modules.methods import is_filled, is_known
from unroll.modules.subclasses import assign_class, replacement_class
from unroll.torchscript.rewrite import unroll_script


def replace(
    root: nn.Module,
    plan: Plan | None,
    where: Where = None,
    rules: Rules | None = None,
    others: Iterable[str] = (),
    *,
    freeze: bool = False,
    limit: int | None = None,
    unused: set[type[nn.Module]] | None = None,
) -> nn.Module:
    """Return a copy of the tree with `Unrolled` layers, sharing every tensor with the original.

    References to a layer are followed wherever they are (containers, plain objects, methods, closures). Layers that
    are `Unrolled` already keep their plan, unless `where` picks them or there are no others. With `freeze`, those that
    `where` picks are frozen, and share no weight. All keep to a `limit` of steps that is given. Stand-ins are replaced
    in turn, and take from `unused` the classes whose rules they needed.

    Raises:
        UnrollError: with every layer that cannot be honoured, and every rule for none, before anything is copied.
    """
    rules = check_rules(rules)
    outermost, unused = unused is None, set(rules) if unused is None else unused
    found = find(root, where, rules, others)
    reached = list(walk_objects(root))
    # By `id`, what stands in the copy for an object of the tree, as `copy.deepcopy` takes it. Tensors stand for
    # themselves. Empty shells are filled only when all of them are there, since they may refer to each other.
    memo: dict[int, Any] = {id(value): value for _, value in reached if isinstance(value, torch.Tensor)}
    shells: list[tuple[str, nn.Module, Unrolled]] = []
    problems = Problems()
    for names, layer in found:
        with problems:
            kind = parametrize.type_before_parametrizations(layer)
            if kind in rules:
                unused.discard(kind)
                # A stand-in may hold a layer of the same class, which would be replaced without end.
                others_ruled = {k: rule for k, rule in rules.items() if k is not kind}
                stand_in = _by_rule(names[0], kind, rules[kind], layer)
                memo[id(layer)] = replace(stand_in, plan, rules=others_ruled, freeze=freeze, unused=unused)
            elif isinstance(layer, torch.jit.ScriptModule):
                memo[id(layer)] = _script(names[0], layer, plan, freeze=freeze)
            else:
                new: Any = replacement_class(names[0], layer)
                memo[id(layer)] = shell = new.__new__(new)
                shells.append((names[0], layer, shell))
    problems += _rebind_methods(reached, memo)
    problems += unknown_rules(unused) if outermost else []
    problems.check()
    copied = _copy_tree(root, reached, shells, Plan.of(plan), dict(memo))
    if _left(copied, where):  # code of the model's own makes its layers anew where it is copied
        copied = _copy_tree(root, reached, shells, Plan.of(plan), memo, _copying_themselves(root))
    if plan is not None and (where is not None or not found):
        _give_plan(copied, plan, where)
    _left(copied, where).check()
    if freeze:
        chosen = [v for name, v in walk_objects(copied) if isinstance(v, Unrolled) and chooses(where, [name], v)]
        freeze_layers([*(shell for _, _, shell in shells), *chosen])
    unrolled: list[Any] = [layer for layer in copied.modules() if isinstance(layer, Unrolled)]
    for layer in unrolled if limit is not None else ():
        layer.limit = limit
    return copied


def _by_rule(name: str, kind: type, rule: Callable[[Any], nn.Module], layer: nn.Module) -> nn.Module:
    """Return the module that a rule makes of a layer."""
    stand_in = rule(layer)
    if not isinstance(stand_in, nn.Module):
        finding = f"the rule for {kind.__name__} returned {type(stand_in).__name__}"
        raise UnrollError(Problem(name, finding, "return an nn.Module"))
    if parametrize.type_before_parametrizations(stand_in) is kind:
        finding = f"the rule for {kind.__name__} returned a layer of that class"
        raise UnrollError(Problem(name, finding, "return another module"))
    return stand_in


def _script(name: str, layer: torch.jit.ScriptModule, plan: Plan | None, *, freeze: bool) -> nn.Module:
    """Unroll a scripted layer."""
    if freeze:
        finding = "is a ScriptModule, which unroll does not freeze"
        raise UnrollError(Problem(name, finding, "leave freeze out, and use torch.jit.freeze"))
    return unroll_script(layer, plan=Plan.of(plan))


def _rebind_methods(reached: Iterable[tuple[str, Any]], memo: dict[int, Any]) -> Problems:
    """Let methods of replaced layers that are stored somewhere be those of what stands in for the layers."""
    problems = Problems()
    for name, method in reached:
        if isinstance(method, types.MethodType) and id(method.__self__) in memo:
            memo[id(method)] = _rebound(method, memo[id(method.__self__)])
            if memo[id(method)] is None:
                finding = f"a stored method of a recurrent layer, {method.__name__}, has no counterpart"
                problems.add(name, finding, "store the layer and call it")
    return problems


def _copy_tree(
    root: nn.Module,
    reached: Iterable[tuple[str, Any]],
    shells: Iterable[tuple[str, nn.Module, Unrolled]],
    plan: Plan,
    memo: dict[int, Any],
    by_attributes: Iterable[Any] = (),
) -> nn.Module:
    """Copy what is not in the memo yet, and fill the shells; some objects attribute by attribute, whatever they say."""
    # `copy.deepcopy` takes functions as they are. Those that hold a layer get cells of their own, shared as before.
    functions = [function for _, function in reached if _captures_layer(function)]
    memo |= {id(cell): types.CellType() for function in functions for cell in function.__closure__ or ()}
    memo |= {id(function): _empty_copy(function, memo) for function in functions}
    memo |= {id(value): object.__new__(type(value)) for value in by_attributes}
    listed = [layer.listed for _, layer in reached if isinstance(layer, UnrolledLayer) and layer.listed is not None]
    try:
        memo |= {id(found): FlatWeights(copy.deepcopy(found.weights, memo), found.named) for found in listed}
        for name, layer, shell in shells:
            _copy_attributes(shell, layer, name, plan, memo)
        for value in by_attributes:
            memo[id(value)].__dict__.update(copy.deepcopy(vars(value), memo))
        copied = copy.deepcopy(root, memo)
        # Last, when what the cells hold has its copy in the memo.
        for function in functions:
            _fill(memo[id(function)], function, memo)
    except UnrollError:
        raise
    except Exception as error:
        finding = f"cannot be copied ({type(error).__name__}: {error})"
        fix = "take what cannot be copied out of its attributes"
        raise UnrollError(Problem(type(root).__name__, finding, fix)) from error
    return copied


def _left(copied: nn.Module, where: Where) -> Problems:
    """Return a problem for each layer that was picked and that no stand-in replaces."""
    left = [name for entry in find(copied) if chooses(where, *entry) for name in entry.names]
    return Problems(Problem(name, "is still recurrent in the copy", "report this model") for name in left)


def _copying_themselves(root: nn.Module) -> list[Any]:
    """List what holds recurrent layers, however deep, and has a class of the model's own that says how it is copied."""
    protocol = {"__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__"}

    def says(value: Any) -> bool:
        kinds = () if isinstance(value, (*LEAVES, Unrolled)) else type(value).__mro__
        return hasattr(value, "__dict__") and any(protocol & vars(k).keys() and not is_known(k) for k in kinds)

    def holds(value: Any) -> bool:
        return any(isinstance(part, nn.Module) and is_recurrent(part) for _, part in walk_objects(value))

    found = {id(value): value for _, value in walk_all(root) if says(value)}
    return [value for value in found.values() if holds(value) and not is_recurrent(value)]


def _give_plan(root: nn.Module, plan: Plan, where: Where) -> None:
    """Give a plan to the layers that `where` picks."""
    for name, module in (*root.named_modules(remove_duplicate=False), *walk_objects(root)):
        if isinstance(module, Unrolled) and module.plan != plan and chooses(where, [name], module):
            module.plan = plan


def _captures_layer(value: Any) -> bool:
    """Tell whether this is a function that holds a recurrent layer, however deep."""
    if not isinstance(value, types.FunctionType):
        return False
    return any(isinstance(part, nn.Module) and is_recurrent(part) for _, part in walk_objects(value))


def _empty_copy(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """Return a function with the same code and empty cells; `copy.deepcopy` would go on using the function itself."""
    cells = tuple(memo[id(cell)] for cell in function.__closure__ or ())
    return types.FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)


def _fill(copied: types.FunctionType, function: types.FunctionType, memo: dict[int, Any]) -> None:
    """Give the copy of a function copies of all that the function has captured."""
    for new, old in zip(copied.__closure__ or (), function.__closure__ or (), strict=True):
        if is_filled(old):
            new.cell_contents = copy.deepcopy(old.cell_contents, memo)
    for part in ("__defaults__", "__kwdefaults__", "__dict__"):
        setattr(copied, part, copy.deepcopy(getattr(function, part), memo))
    copied.__doc__, copied.__module__, copied.__qualname__ = (
        function.__doc__,
        function.__module__,
        function.__qualname__,
    )


def _rebound(method: types.MethodType, stand_in: Any) -> Any:
    """Return a stored method of a layer as its stand-in has it; None if it is a method of a base class alone."""
    name, function = method.__name__, method.__func__
    holders = [kind for kind in type(method.__self__).__mro__ if name in vars(kind)]
    # one stored before `packing` is the method of a class that has another meanwhile
    owners = [kind for kind in holders if function in (vars(kind)[name], original(kind, name))]
    if owners and owners[0] is holders[0]:
        return getattr(stand_in, name, None)
    return None if owners else types.MethodType(function, stand_in)


def _copy_attributes(shell: Any, layer: Any, name: str, plan: Plan, memo: dict[int, Any]) -> None:
    """Give the empty replacement everything that the layer has."""
    gone = ("_flat_weights", "_flat_weight_refs", "__overloads__")  # the last is left by torch.jit.script
    if isinstance(layer, nn.RNNBase):
        shell.listed = take_list(layer, memo)
    shell.__dict__.update(copy.deepcopy({key: value for key, value in vars(layer).items() if key not in gone}, memo))
    shell.place = name or type(layer).__name__
    if isinstance(shell, UnrolledCell):
        shell.mode = str(cell_mode(layer))
    if shell.recurrence.mode not in CELLS:
        known = ", ".join(CELLS)
        raise UnrollError(
            Problem(shell.place, f"has the unknown mode {shell.recurrence.mode}", f"the modes are {known}")
        )
    assign_class(shell, type(shell))
    shell.plan = plan
