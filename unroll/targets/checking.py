"""A check that a model keeps to what a target offers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.signatures import told
from unroll.extras import is_onnx, require
from unroll.targets.aten_uses import read_aten
from unroll.targets.building import Engine, build_engine, require_bindings
from unroll.targets.products import read_products
from unroll.targets.tables import Target, TargetName, read_target
from unroll.targets.uses import CONSTANT, INPUT, Row, Use, judged

KINDS = {
    "onnx": "an onnx.ModelProto, an onnx_ir.Model or the path of a file",
    "aten": "an ExportedProgram or a GraphModule of aten operators",
}

WAYS = {
    "onnx": "write one with unroll.export_onnx(model, args, path)",
    "aten": "make one with torch.export.export(model, args)",
}

PT2E = "pt2e"
"""The target that is no table: what `convert_pt2e` of torchao's PT2E returned, with or without products in float"""


@dataclass(frozen=True)
class Verdict:
    """The findings of `check`; printing them shows a table.

    Attributes:
        target: the target's name.
        nodes: the number of nodes judged.
        rows: one for each thing that the target does not offer.
        notes: conditions of operators in the model that were not checked.
        engine: the one that the target's library built, if it was asked to and did.
        products: for `pt2e`, how many of all products are float, in words.
    """

    target: str
    nodes: int
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    engine: Engine | None = None
    products: str = ""

    @property
    def ok(self) -> bool:
        return not self.rows

    def __bool__(self) -> bool:
        return self.ok

    @property
    def groups(self) -> dict[tuple[str, str, str], list[str]]:
        """The places of each operator, finding and fix."""
        groups: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            places = groups.setdefault(row[1:], [])
            places.append(row.place)
        return groups

    def check(self) -> Verdict:
        """Return the verdict if the target offers all of it.

        Raises:
            UnrollError: naming each operator with what is missing, and where it is used.
        """
        self.problems.check()
        return self

    @property
    def problems(self) -> Problems:
        """Each operator with what is missing, and where it is used."""
        return Problems(
            Problem(_places(places), f"{operator} {finding}", fix)
            for (operator, finding, fix), places in self.groups.items()
        )

    def only(self, places: Collection[str]) -> Verdict:
        """Return what was found in some places."""
        return replace(self, rows=tuple(row for row in self.rows if row.place in places))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        engine = self.engine and self.engine.as_dict()
        rows = [row._asdict() for row in self.rows]
        return asdict(replace(self, engine=None)) | {"ok": self.ok, "rows": rows, "engine": engine}

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes"
        if self.ok:
            lines = [f"{self.target}: {self.products or f'{nodes}, all offered'}"]
        else:
            findings = f"{nodes}, {len(self.rows)} finding{'s' * (len(self.rows) > 1)}"
            lines = [f"{self.target}: {f'{self.products}:' if self.products else findings}"]
            groups = self.groups
            width = max(len(operator) for operator, _, _ in groups)
            for (operator, finding, _), places in groups.items():
                lines.append(f"  {operator.ljust(width)}  {finding}: {_places(places)}")
        lines += [f"  not checked: {note}" for note in self.notes]
        lines += [f"  {self.engine}"] if self.engine else []
        return "\n".join(lines)


def _places(places: list[str]) -> str:
    places = [*dict.fromkeys(places)]  # a node of several results may be in it for each
    shown = ", ".join(places[:3])
    return shown if len(places) <= 3 else f"{shown} and {len(places) - 3} more"


@told
def check(model: Any, *, target: TargetName | Literal["pt2e"], build: bool = False) -> Verdict:
    """List what a model uses that a target does not offer.

    The targets are tables of facts, published or measured, with their sources and versions, in `unroll/targets/facts`.
    Unless `build=True`, nothing is compiled or run, so a model that passes may still be refused by a target's tools,
    and what is outside of a table may run elsewhere. The model is judged as it is; `unroll inspect package.module:name
    --target NAME`, on the command line, unrolls one first, and tries other plans where something is not offered.

    Args:
        model: for `tensorrt`, `tensorrt_rtx` and `webnn` an ONNX model (an `onnx.ModelProto`, an `onnx_ir.Model` or the
            path of a file); for `torch_tensorrt`, `xnnpack` and `pt2e` an `ExportedProgram` or a `GraphModule` of aten
            operators; for `npu` either.
        target: `tensorrt` (the library for data centers), `tensorrt_rtx` (TensorRT for RTX), `torch_tensorrt`,
            `webnn`, `xnnpack`, or `npu` for the rules of an accelerator that runs fixed graphs; or `pt2e`, for a model
            that `convert_pt2e` returned, whose products that are still computed in float are counted.
        build: for `tensorrt_rtx`, whether to have the library build an engine too, which needs no GPU. If it does not,
            the node and the library's own words are among the findings. Sizes that are open are from 1 to 16 in it.

    Returns:
        What was found, with the names of the nodes; `print(verdict)` shows it, `verdict.check()` raises unless all is
        offered.

    Raises:
        UnrollError: for a target that is not known, a model of a kind that it cannot be asked about, and `build=True`
            where no library is there to build.

    Example:
        >>> program = torch.export.export(nn.Sequential(nn.RNN(3, 5)), (torch.zeros(2, 1, 3),))
        >>> print(check(program, target="npu"))
        npu: 2 nodes, 1 finding
          aten.rnn_tanh.input  is recurrent, and not offered: rnn_tanh
        >>> check(unroll(program), target="npu").ok
        True
    """
    asked = "aten" if target == PT2E else read_target(target).kind
    if build:
        _require_builder(target)
    kind = _kind(model)
    if kind is None or asked not in (kind, "any"):
        wanted = [k for k in KINDS if asked in (k, "any")]
        fix = f"give {', or '.join(KINDS[k] for k in wanted)}: {', or '.join(WAYS[k] for k in wanted)}"
        raise UnrollError(Problem(f"check(model, target={target!r})", f"got {_described(model)}", fix))
    if target == PT2E:
        products = read_products(model)
        return Verdict(target, products.total, products.floats, products=str(products))
    table, rows = read_target(target), list[Row]()
    if kind == "onnx":
        uses, opset = _read_onnx(model)
        if table.opsets and not table.opsets[0] <= opset <= table.opsets[1]:
            finding = f"is of version {opset} of the standard, offered are {table.opsets[0]} to {table.opsets[1]}"
            rows.append(Row("opset", "model", finding, "export it in another version (opset_version=...)"))
    else:
        uses = read_aten(model, table)
    rows += _rows(uses, table)
    engine = None
    if build:
        try:
            engine = build_engine(model)
        except UnrollError as error:
            rows += [Row(place, "engine", finding, fix) for place, finding, fix in error.problems]
    nodes = [use for use in uses if use.operator not in (INPUT, CONSTANT)]
    # The parts of a decomposed operator have its place in common and count as one node.
    count = sum(1 for use in nodes if not use.origin) + len({use.place for use in nodes if use.origin})
    return Verdict(target, count, tuple(rows), _notes(nodes, table), engine)


def _require_builder(target: str) -> None:
    if target != "tensorrt_rtx":
        fix = "leave it out, or ask TensorRT for RTX: target='tensorrt_rtx'"
        raise UnrollError(Problem("build=True", f"was given for {target}, of which nothing is built here", fix))
    require_bindings()


def _rows(uses: list[Use], table: Target) -> Iterator[Row]:
    """Yield what the target has against each use, once for all parts of a decomposed operator."""
    told = set[Row]()
    for use in uses:
        for row in judged(use, table):
            if not use.origin or row not in told:
                told.add(row)
                yield row


def _kind(model: Any) -> str | None:
    if is_onnx(model):
        return "onnx"
    return "aten" if isinstance(model, (ExportedProgram, fx.GraphModule)) else None


def _described(model: Any) -> str:
    if _kind(model) == "onnx":
        return "an ONNX model"
    if isinstance(model, torch.jit.ScriptModule):
        return "a ScriptModule"
    name = type(model).__name__
    return (
        f"{name}, a module that is not exported yet" if isinstance(model, nn.Module) and name != "GraphModule" else name
    )


def _read_onnx(model: Any) -> tuple[list[Use], int]:
    require("onnx", "onnx_ir")
    from unroll.onnx.reading import read_model
    from unroll.targets.onnx_uses import read_onnx

    return read_onnx(read_model(model, "check(model)"))


def _notes(uses: list[Use], table: Target) -> tuple[str, ...]:
    """Return the conditions that the tables tell of operators in the model, and that cannot be checked on it."""
    asked = ((operator, table.restriction(operator)) for operator in dict.fromkeys(use.operator for use in uses))
    return tuple(f"{operator}: {found.note}" for operator, found in asked if found is not None and found.note)
