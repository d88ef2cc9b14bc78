"""The public function: tells the recurrent layers of a model of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from unroll.core.errors import Problem, UnrollError
from unroll.core.limits import limited
from unroll.core.options import Rules, Steps, Where, read_where
from unroll.core.plan import Plan, Preset
from unroll.core.signatures import no_model, told
from unroll.export.inspection import Inspection
from unroll.extras import is_onnx, require

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
        The layers, one for each call (`lstm`, `lstm_2`, where `where="lstm"` picks both), and the problems;
        `print(found)` shows a table.

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
        if not is_onnx(model):
            raise UnrollError(no_model("inspect(model)", model, "an nn.Module, an ExportedProgram or an ONNX model"))
        given = {"args": args, "kwargs": kwargs, "dynamic_shapes": dynamic_shapes, "rules": rules}
        if wrong := [name for name, value in given.items() if value is not None]:
            finding = "was given for an ONNX model"
            raise UnrollError(*(Problem(f"inspect({name}=...)", finding, "leave it out") for name in wrong))
        return inspect_model(read_model(model, "inspect(model)"), where=where, plan=plan, steps=steps)
