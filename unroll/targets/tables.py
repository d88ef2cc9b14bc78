"""The targets as tables, a file each in `facts/`: the operators one offers, for which types, on which conditions.

A file says where its facts come from (`source`, `version`). Operators are listed in groups under `[[offered]]`, and
what one asks beyond the types of its group under `[restrictions.NAME]`, in the words of `Restriction`. A file may name
another as its `base`: it has all that stands there too, unless it says otherwise.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from unroll.core.errors import Problem, UnrollError

TargetName = Literal["npu", "tensorrt", "tensorrt_rtx", "torch_tensorrt", "webnn", "xnnpack"]

NAMES = get_args(TargetName)
"""The names of all targets."""


@dataclass(frozen=True)
class Restriction:
    """The conditions of a target for an operator, with inputs and attributes called as in the operator's own schema."""

    types: tuple[str, ...] = ()
    """Types of tensors that it may take and give, such as `float32`; empty if the source does not say"""
    rank: Mapping[str, list[int]] = field(default_factory=dict)
    """Numbers of dimensions that an input may have"""
    attributes: Mapping[str, list[Any]] = field(default_factory=dict)
    """Values that an attribute, or every element of it, may have"""
    absent: tuple[str, ...] = ()
    """Inputs and attributes that must not be given"""
    constant: tuple[str, ...] = ()
    """Inputs that must be known before the model runs"""
    known: tuple[str, ...] = ()
    """Arguments that must be numbers, not computed sizes"""
    last: tuple[str, ...] = ()
    """Arguments that must name the last dimension of the result"""
    results: int | None = None
    """The number of its results that may be used; None for all"""
    static: bool = False
    """True if all sizes must be fixed"""
    keeps_type: bool = False
    """True if the result must be of the input's type"""
    note: str = ""
    """A condition that is told, but not checked"""


@dataclass(frozen=True)
class Target:
    """A runtime or device that runs a model, and what it offers."""

    name: str
    title: str
    source: tuple[str, ...]
    """Repository, path and commit"""
    version: str
    kind: str
    """The kind of operators in its table: `onnx`, `aten`, or `any` if it has rules alone"""
    operators: Mapping[str, Restriction]
    refused: frozenset[str] = frozenset()
    """Operators that the source says are not offered"""
    decomposed: tuple[str, ...] = ()
    """The operators that PyTorch's decompositions are applied to; the core ones if empty"""
    rewritten: frozenset[str] = frozenset()
    """Operators that it writes in terms of others by itself, in all their overloads"""
    opsets: tuple[int, int] | None = None
    """The oldest and newest version of the ONNX standard"""
    rank: int | None = None
    """The most dimensions of any tensor"""
    tensors: tuple[str, ...] = ()
    """Types of tensors that a model may be given or hold; any if empty, as where the rest of a model runs elsewhere"""
    domains: tuple[str, ...] = ()
    """Origins of operators: domains of ONNX (empty for the standard), namespaces of PyTorch; any if there are none"""
    static: bool = False
    """True if all sizes must be fixed"""
    control_flow: bool = False
    """True if loops and branches are among its operators"""
    boolean: bool = True
    """True if it has boolean tensors"""
    uniform: bool = False
    """True if all inputs of an operator must be of one type"""
    edge: bool = False
    """True if aten operators are called as in ExecuTorch's edge dialect, where views are copies"""

    @property
    def whole(self) -> bool:
        """True if it takes whole models, and not parts, beside what runs the rest"""
        return bool(self.tensors)

    def restriction(self, operator: str) -> Restriction | None:
        """Return what it asks of an operator, or None if it does not offer it."""
        if operator in self.refused or (self.domains and domain(operator) not in self.domains):
            return None
        if self.kind == "any" or (operator.rpartition(".")[0] in self.rewritten and operator not in self.operators):
            return Restriction()
        return next((self.operators[name] for name in self._names(operator) if name in self.operators), None)

    def _names(self, operator: str) -> tuple[str, ...]:
        if not self.edge or operator.count(".") != 2:
            return (operator,)
        namespace, name, overload = operator.split(".")
        name = {"_to_copy": "_to_dim_order_copy"}.get(name, f"{name}_copy")
        return operator, f"{namespace}.{name}.{overload}"


def domain(operator: str) -> str:
    """Return the domain of an operator, such as `com.microsoft` and `aten`; empty for the ONNX standard."""
    return operator.rpartition("::")[0] or (operator.partition(".")[0] if "." in operator else "")


def read_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        UnrollError: if there is none of that name.

    Example:
        >>> table = read_target("tensorrt")
        >>> table.version, table.restriction("Tanh").types
        ('TensorRT 10.15', ('float32', 'float16', 'bfloat16'))
    """
    if name not in NAMES:
        raise UnrollError(Problem(f"target={name!r}", "is not known", f"choose one of {', '.join(NAMES)}"))
    return _read(name)


@cache
def _read(name: str) -> Target:
    table = _load(name)
    types = table.pop("types", "")  # of every group that names none itself
    offered: dict[str, dict[str, Any]] = {}
    for group in table.pop("offered", ()):
        for operator in group.pop("names").split():
            offered[operator] = {"types": types, **group}
    for operator, asked in table.pop("restrictions", {}).items():
        offered[operator] |= asked
    lists = {key: table.pop(key, "").split() for key in ("refused", "rewritten", "decomposed")}
    refused = frozenset(lists["refused"])  # also what a base offers
    operators = {operator: _restriction(**asked) for operator, asked in offered.items() if operator not in refused}
    opsets = tuple(table.pop("opsets")) if "opsets" in table else None
    return Target(
        name=name,
        source=tuple(table.pop("source")),
        operators=operators,
        refused=refused,
        decomposed=tuple(lists["decomposed"]),
        rewritten=frozenset(lists["rewritten"]),
        opsets=opsets,
        tensors=tuple(table.pop("tensors", "").split()),
        domains=tuple(table.pop("domains", ())),
        **table,
    )


def _load(name: str) -> dict[str, Any]:
    text = files("unroll.targets").joinpath("facts", f"{name}.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    if "base" not in table:
        return table
    base = _load(table.pop("base"))
    offered = [*base.get("offered", ()), *table.get("offered", ())]  # the last one that names an operator holds
    return base | table | {"offered": offered, "restrictions": base["restrictions"] | table.get("restrictions", {})}


def _restriction(types: str, **asked: Any) -> Restriction:
    lists = {key: tuple(asked.pop(key)) for key in ("absent", "constant", "known", "last") if key in asked}
    return Restriction(tuple(types.split()), **lists, **asked)
