"""The options of a rewriting: which layers, `where=`; what stands in for some, `rules=`; how many steps, `steps=`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.signatures import takes

Where = str | Iterable[str] | Callable[[str, nn.Module], bool] | None
"""A choice of layers: name or shell pattern (`encoder.*`), several of them, a predicate of name and layer, or all."""

Rules = Mapping[type[nn.Module], Callable[[Any], nn.Module]]
"""For each class of the user's own, a function from the layer to a module that stands in for it."""


def read_where(where: Any) -> Any:
    """Return an argument `where=`, several names in a list.

    Raises:
        UnrollError: for anything else; a class could be called like a function, but makes layers.
    """
    if where is None or isinstance(where, str):
        return where
    if callable(where) and not isinstance(where, type):
        if takes(where, "", None):
            return where
        fix = "give a function of name and layer: lambda name, layer: ..."
        raise UnrollError(Problem("where=...", "is a function that does not take two arguments", fix))
    names: list[Any] = [where] if isinstance(where, type) or not isinstance(where, Iterable) else list(where)
    problems = Problems()
    for name in names:
        if isinstance(name, type):
            fix = f"give names, or for modules a function: lambda name, layer: isinstance(layer, {name.__name__})"
            problems.add(f"where={name.__name__}", "is a class", fix)
        elif not isinstance(name, str):
            fix = "give a name or shell pattern, several of them, or a function of name and layer"
            problems.add(f"where={name!r}", f"is of type {type(name).__name__}", fix)
    problems.check()
    return names


def chooses(where: Where, names: Iterable[str], layer: nn.Module) -> bool:
    """Tell whether `where` picks a layer with these names."""
    if where is None:
        return True
    if callable(where):
        return any(where(name, layer) for name in names)
    patterns = [where] if isinstance(where, str) else list(where)
    return any(_fits(name, pattern) for name in names for pattern in patterns)


def unknown_names(where: Where, names: Sequence[str], what: str = "layer", argument: str = "where") -> Problems:
    """Return a problem for each pattern in an argument that picks none of these names."""
    if where is None or callable(where):
        return Problems()
    known = ", ".join(dict.fromkeys(names)) or "none"  # a layer may be called several times
    return Problems(
        Problem(f"{argument}={pattern!r}", f"names no recurrent {what}", f"the recurrent {what}s are: {known}")
        for pattern in ([where] if isinstance(where, str) else where)
        if not any(_fits(name, pattern) for name in names)
    )


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def check_rules(rules: Any) -> Rules:
    """Return an argument `rules=`, None as no rules.

    Raises:
        UnrollError: for what is no rule in any model.
    """
    fix = "give a dictionary from classes of modules to functions"
    if not isinstance(rules, Mapping | None):
        raise UnrollError(Problem("rules=...", f"is of type {type(rules).__name__}", fix))
    rules = rules or {}
    problems = Problems(
        Problem(f"rules={{{_named(kind)}: ...}}", "is no function for a class of modules", fix)
        for kind, rule in rules.items()
        if not (isinstance(kind, type) and issubclass(kind, nn.Module) and callable(rule))
    )
    problems.check()
    return rules


def unknown_rules(unused: Iterable[type]) -> Problems:
    """Return a problem for each class of a rule that is the class of no layer."""
    fix = "leave it out, or name the very class of the layer; base classes do not count"
    finding = "is the class of no layer to unroll"
    return Problems(Problem(f"rules={{{_named(kind)}: ...}}", finding, fix) for kind in unused)


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else repr(kind)


Steps = int | Mapping[str, int] | None
"""The number of time steps, for all layers or by the layer's name."""

TOLD = "told"
"""The value of `steps` by which what the graph tells of itself is all that there is: none can be given."""

FIXED = "fixed"
"""The value of `steps` by which a symbolic length is that of the example, where whoever traces guards it."""


def unknown_steps(steps: Any, names: Iterable[str]) -> Problems:
    """Return a problem for each layer in `steps`, if it is by name, that is not among these."""
    if not isinstance(steps, Mapping):
        return Problems()
    names = list(dict.fromkeys(names))
    fix = f"the layers with steps are: {', '.join(names) or 'none'}"
    unknown = [name for name in steps if name not in names]
    return Problems(Problem(f"steps[{name!r}]", "names no recurrent layer", fix) for name in unknown)


def choose_steps(place: str, known: Any, asked: Any) -> int | None:
    """Choose a layer's number of steps; None if nothing tells it.

    Args:
        place: the layer.
        known: the number that its model tells.
        asked: the number that was asked for it.

    Raises:
        UnrollError: if the two differ, or it is no number of steps.
    """
    found = known if asked is None else asked
    if known is not None and found != known:
        raise UnrollError(Problem(place, f"has {known} time steps", f"leave out steps={asked} or make it {known}"))
    if found is not None and (type(found) is not int or found < 1):
        raise UnrollError(Problem(place, f"steps={found!r}", "give a whole number from 1 upwards"))
    return found
