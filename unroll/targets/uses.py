"""Uses of operators, whatever kind of model they are in, and what a target has against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from unroll.targets.tables import Restriction, Target, domain

RECURRENT = ("LSTM", "GRU", "RNN", "aten.lstm", "aten.gru", "aten.rnn")
"""Beginnings of the names of recurrent operators"""

INPUT, CONSTANT = "input", "constant"
"""Stand-ins for the operator where a value is given to the model, or held by it"""


class Row(NamedTuple):
    """One thing that a model uses and a target does not offer."""

    place: str
    """The node's name, or the input's"""
    operator: str
    """`Gemm` or `aten.addmm.default`, say; `input` and `constant` for values of the model, `model` for all of it"""
    finding: str
    fix: str


class Operand(NamedTuple):
    """A tensor that an operator takes or gives."""

    dtype: str | None
    """Its name, such as `float32`, or None if unknown"""
    shape: tuple[int | None, ...] | None
    """Its sizes, with None for one that is left open; None alone for a rank that is"""
    constant: bool = False

    @property
    def open(self) -> bool:
        return self.shape is None or None in self.shape


class Unknown:
    """The value of an argument that is computed when the model runs."""

    def __repr__(self) -> str:
        return "a computed size"


@dataclass(frozen=True)
class Use:
    """A node, as far as a target asks."""

    place: str
    operator: str
    inputs: Mapping[str, Operand] = field(default_factory=dict)
    """Its inputs, by the names of the operator's schema; `name.1` is the second of a list"""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: Sequence[Operand] = ()
    """Its results, all up to the last one that is used"""
    typed: Mapping[str, Operand] = field(default_factory=dict)
    """The inputs and results that the types of a table are about"""
    control_flow: bool = False
    origin: str = ""
    """The operator of the model that this one is a part of, where that one is decomposed"""


def judged(use: Use, target: Target) -> list[Row]:
    """List what a target has against a use."""
    name, became = use.operator, ""
    if use.origin:
        name, became = use.origin, f"becomes {use.operator}, which "
    return [Row(use.place, name, became + finding, fix) for finding, fix in _findings(use, target)]


def _findings(use: Use, target: Target) -> Iterator[tuple[str, str]]:
    yield from _general(use, target)
    if use.operator in (INPUT, CONSTANT):
        return
    restriction = target.restriction(use.operator)
    if use.control_flow and not target.control_flow:
        yield "is control flow", "give a fixed number of time steps, so that they are written out"
    elif restriction is None and use.operator.startswith(RECURRENT):
        yield "is recurrent, and not offered", "unroll the model first"
    elif restriction is None:
        why = "is not in the table" if target.operators else f"is of {domain(use.operator)}, which is not known"
        why = "is not offered" if use.operator in target.refused else why
        yield why, "replace it by operators that are offered, or let another runtime compute it"
    else:
        yield from _types(use, target, restriction)
        yield from _shapes(use, restriction)
        yield from _arguments(use, restriction)


def _general(use: Use, target: Target) -> Iterator[tuple[str, str]]:
    """Yield what a target has against any tensor of a model, whatever its operator."""
    for output in use.outputs:
        # told where sizes become open, and not again of all that follows
        if target.static and output.open and not any(given.open for given in use.inputs.values()):
            yield f"leaves sizes open, {_shown(output.shape)}", "fix them when you export the model"
        if target.rank is not None and output.shape is not None and len(output.shape) > target.rank:
            yield f"has {len(output.shape)} dimensions, more than {target.rank}", "reshape it to fewer"
        if not target.boolean and output.dtype == "bool":
            yield "is boolean", "compute with numbers instead: leave out masks and lengths"
        elif use.operator in (INPUT, CONSTANT) or not target.operators:  # else its restriction tells of types
            yield from _type(output.dtype, target.tensors)


def _type(dtype: str | None, offered: Sequence[str], name: str = "") -> Iterator[tuple[str, str]]:
    if offered and dtype is None:
        yield f"is of unknown type{name}", "run shape inference, or export the model again"
    elif offered and dtype not in offered:
        yield f"is for {dtype}{name}, offered are {', '.join(offered)}", "convert the model to one of these"


def _types(use: Use, target: Target, restriction: Restriction) -> Iterator[tuple[str, str]]:
    for name, operand in use.typed.items():
        yield from _type(operand.dtype, restriction.types, f" ({name})")
    kinds = {operand.dtype for operand in use.inputs.values()}
    if target.uniform and len(kinds) > 1:
        yield f"mixes {' and '.join(sorted(map(str, kinds)))}", "convert them to one type first"
    if restriction.keeps_type and kinds and {output.dtype for output in use.outputs} != kinds:
        yield "changes the type", "keep the model in one type"


def _shapes(use: Use, restriction: Restriction) -> Iterator[tuple[str, str]]:
    for name, ranks in restriction.rank.items():
        operand = use.inputs.get(name)
        if operand is not None and (operand.shape is None or len(operand.shape) not in ranks):
            has = "an unknown number of" if operand.shape is None else len(operand.shape)
            yield f"has {has} dimensions in {name}, offered are {' or '.join(map(str, ranks))}", "reshape it"
    operands = (*use.inputs.values(), *use.outputs)
    if restriction.static and any(operand.open for operand in operands):
        yield "leaves sizes open", "fix them when you export the model"


def _arguments(use: Use, restriction: Restriction) -> Iterator[tuple[str, str]]:
    for name in restriction.constant:
        if name in use.inputs and not use.inputs[name].constant:
            yield f"computes {name}, which must be constant", "compute it before, or let another runtime do it"
    for name in restriction.absent:
        if name in use.inputs or use.attributes.get(name) is not None:
            yield f"has {name}, which is not offered", "leave it out"
    for name, allowed in restriction.attributes.items():
        value = use.attributes.get(name)
        values = value if isinstance(value, (list, tuple)) else [value]
        if value is not None and not all(v in allowed for v in values):
            yield f"has {name}={_value(value)}, offered is {' or '.join(map(_value, allowed))}", "choose one of these"
    for name in restriction.known:
        value = use.attributes.get(name)
        if any(isinstance(v, Unknown) for v in (value if isinstance(value, (list, tuple)) else [value])):
            yield f"computes {name}", "fix the sizes when you export the model"
    for name in restriction.last:
        # a negative dimension counts from the end
        shape, dim = use.outputs[0].shape, use.attributes[name]
        if shape and dim % len(shape) != len(shape) - 1:
            yield f"is along dimension {dim}, offered is the last", "transpose around it"
    if restriction.results is not None and len(use.outputs) > restriction.results:
        yield f"uses result {len(use.outputs)}, offered are {restriction.results}", "compute the others apart"


def _shown(shape: tuple[int | None, ...] | None) -> str:
    return "of any rank" if shape is None else f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
