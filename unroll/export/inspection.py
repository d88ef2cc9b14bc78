"""The recurrent layers of a model, and what unrolling would make of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from unroll.core.errors import Problem, UnrollError
from unroll.core.limits import limited
from unroll.core.options import Rules, Steps, Where, read_where
from unroll.core.plan import Plan, Preset
from unroll.core.signatures import no_model, told
from unroll.extras import require
from unroll.reports import align


@dataclass(frozen=True)
class Layer:
    """A recurrent layer of a model.

    Attributes:
        kind: torch's mode (`LSTM`, `RNN_TANH`), with `cell` for a single step.
        steps: time steps, or None if the model leaves them open.
        parameters: numbers in its weights, or None if unknown.
        nodes: that would take its place in an ONNX file, those of a loop's body included; None if unknown.
        size: bytes of those nodes in a file, without weights.
    """

    name: str
    kind: str
    input_size: int
    hidden_size: int
    layers: int
    directions: int
    steps: int | None
    parameters: int | None
    nodes: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Inspection:
    """The recurrent layers of a model, and what stands in the way of unrolling it; printing it shows a table."""

    layers: tuple[Layer, ...]
    problems: tuple[Problem, ...] = ()

    def table(self) -> str:
        """Return the layers as a table, with sums if they are several."""
        names = ("layer", "kind", "sizes", "layers", "directions", "steps", "parameters", "nodes", "added kB")
        lines = [names, *map(_cells, self.layers)]
        if len(self.layers) > 1:
            lines.append(("all", *[""] * 5, *_amounts(*map(_sum, zip(*map(_counts, self.layers), strict=True)))))
        return "\n".join(align(lines)) if self.layers else "no recurrent layers"

    def __str__(self) -> str:
        told = [self.table()] if self.layers or not self.problems else []
        return "\n".join([*told, *(f"in the way: {problem}" for problem in self.problems)])

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "problems": [problem._asdict() for problem in self.problems],
        }


def _counts(layer: Layer) -> tuple[int | None, int | None, int | None]:
    return layer.parameters, layer.nodes, layer.size


def _sum(counts: Iterable[int | None]) -> int | None:
    """Return the sum of all, if all are known."""
    found = list(counts)
    return None if None in found else sum(count or 0 for count in found)


def _amounts(parameters: int | None, nodes: int | None, size: int | None) -> tuple[str, str, str]:
    kilobytes = "?" if size is None else f"{size / 1000:,.1f}"
    return "?" if parameters is None else f"{parameters:,}", "?" if nodes is None else f"{nodes:,}", kilobytes


def _cells(layer: Layer) -> tuple[str, ...]:
    """Return a line of the table."""
    steps = "any" if layer.steps is None else str(layer.steps)
    sizes = f"{layer.input_size} → {layer.hidden_size}"
    return layer.name, layer.kind, sizes, str(layer.layers), str(layer.directions), steps, *_amounts(*_counts(layer))


INSPECTED = ("kwargs", "dynamic_shapes", "where", "rules")
"""The keyword arguments of `export_onnx` that `inspect` takes too"""


@told
def inspect(
    model: Any,
    args: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    where: Where = None,
    rules: Rules | None = None,
    plan: Plan | Preset | None = None,
    steps: Steps = None,
    limit: int | None = None,
) -> Inspection:
    """Tell the recurrent layers of a model, what unrolling makes of each in an ONNX file, and what stands in the way.

    Args:
        model: a module in evaluation mode, an `ExportedProgram`, or an ONNX model: an `onnx.ModelProto`, an
            `onnx_ir.Model`, or the path of a file.
        args: for a module, example inputs; without them only what the modules tell of themselves is known.
        kwargs: for a module, example keyword arguments.
        dynamic_shapes: for a module, as for `export_onnx`.
        where: which layers, as for `unroll`.
        rules: for a module, as for `unroll`.
        plan: how the steps are laid out, `"onnxruntime"` by default.
        steps: for an ONNX model, the number of time steps where it leaves it open.
        limit: the most steps of a layer that are written out, as for `unroll`.

    Returns:
        The layers, one for each call of a cell (`cell`, `cell_2`), and the problems; `print(found)` shows a table.

    Raises:
        UnrollError: for what is no such model, cannot be read, or an argument that means nothing for it.

    Example:
        >>> print(inspect(nn.Sequential(nn.GRU(3, 5)).eval(), torch.zeros(2, 1, 3)))
        layer  kind  sizes  layers  directions  steps  parameters  nodes  added kB
        0      GRU   3 → 5  1       1           2      150         25     1.7
    """
    require("onnx", "onnx_ir", "onnxscript")
    from unroll.export.counting import inspect_model, inspect_module
    from unroll.onnx.reading import read_model

    where, plan = read_where(where), None if plan is None else Plan.of(plan)
    with limited(limit):
        if isinstance(model, (nn.Module, ExportedProgram)):
            if steps is not None:
                fix = "leave it out: the example arguments tell"
                raise UnrollError(Problem(f"steps={steps}", "was given for a PyTorch model", fix))
            options = {"kwargs": kwargs, "dynamic_shapes": dynamic_shapes, "rules": rules}
            return inspect_module(model, args, options, where=where, plan=plan)
        kind = type(model).__module__.partition(".")[0]
        if not (isinstance(model, (str, os.PathLike)) or kind in ("onnx", "onnx_ir")):
            raise UnrollError(no_model("inspect(model)", model, "an nn.Module, an ExportedProgram or an ONNX model"))
        given = {"args": args, "kwargs": kwargs, "dynamic_shapes": dynamic_shapes, "rules": rules}
        if wrong := [name for name, value in given.items() if value is not None]:
            finding = "was given for an ONNX model"
            raise UnrollError(*(Problem(f"inspect({name}=...)", finding, "leave it out") for name in wrong))
        return inspect_model(read_model(model, "inspect(model)"), where=where, plan=plan, steps=steps)
