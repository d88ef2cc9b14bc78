"""What a target has against a PyTorch model: unrolled and exported as the target takes it, and then looked at."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from unroll.core.arguments import as_args
from unroll.core.errors import Problem, UnrollError
from unroll.core.plan import PRESETS, Plan
from unroll.export.exporting import export_onnx
from unroll.export.translate import named_dims, quiet
from unroll.packed.contexts import packing
from unroll.targets.checking import Verdict, check
from unroll.targets.products import is_product
from unroll.targets.tables import TargetName, read_target
from unroll.unrolling import unroll


def judge_model(
    model: nn.Module,
    args: Any,
    target: TargetName,
    *,
    plan: Plan | str,
    options: Mapping[str, Any] | None = None,
    build: bool = False,
) -> Verdict:
    """Hold a model against a target, as it is after unrolling and export.

    Args:
        model: a module in evaluation mode.
        args: its example inputs.
        target: the name of a target.
        plan: how the steps are laid out.
        options: keyword arguments of `export_onnx`.
        build: whether to build an engine, as for `check`.

    Raises:
        UnrollError: for a model that cannot be unrolled or exported, and as `check`.
    """
    given, plan = dict(options or {}), Plan.of(plan)
    if read_target(target).kind == "aten":
        return check(_program(model, args, plan, given), target=target, build=build)
    with TemporaryDirectory() as folder:
        path = export_onnx(model, args, Path(folder) / "model.onnx", plan=plan, check=False, **given).path
        return check(path, target=target, build=build)


TRIED = (
    *PRESETS,
    "gates=split",
    "directions=stacked",
    "layers=wavefront",
    "products=linear",
    "products=sums",
    "time=8",
)
"""Plans that are tried for a target"""


def try_plans(
    model: nn.Module, args: Any, target: TargetName, options: Mapping[str, Any] | None = None
) -> dict[str, Verdict]:
    """Hold a model against a target by one plan after the other, and return what was found of each that can be had.

    Of several names of one plan it is the target's own, or the first.

    Args:
        model: a module in evaluation mode.
        args: its example inputs.
        target: the name of a target.
        options: keyword arguments of `export_onnx`.

    Example:
        >>> tried = try_plans(nn.LSTM(3, 4).eval(), torch.zeros(3, 1, 3), "webnn")
        >>> [name for name, verdict in tried.items() if verdict.ok]
        ['npu', 'quantize', 'ncnn', 'webnn', 'products=sums']
    """
    names = sorted(TRIED, key=lambda name: name == target, reverse=True)
    plans = {Plan.of(name): name for name in reversed(names)}
    found = {}
    for name in sorted(plans.values(), key=TRIED.index):
        with suppress(UnrollError):
            found[name] = judge_model(model, args, target, plan=name, options=options)
    return found


def most_taken(tried: Mapping[str, Verdict]) -> tuple[str, int, int]:
    """Return the plan of which a target for programs takes most, with the products that it leaves, and all findings.

    Products come first: a loop has few findings, of which each is run again and again.
    """
    left = {name: {row.place for row in found.rows if is_product(row.operator)} for name, found in tried.items()}
    return min(((name, len(left[name]), len(found.rows)) for name, found in tried.items()), key=lambda plan: plan[1:])


def _program(model: nn.Module, args: Any, plan: Plan, options: dict[str, Any]) -> ExportedProgram:
    unrolled = unroll(model, plan=plan, where=options.get("where"), rules=options.get("rules"))
    shapes, kwargs = named_dims(options.get("dynamic_shapes")), dict(options.get("kwargs") or {})
    try:
        with quiet(), packing():
            return torch.export.export(unrolled, as_args(args), kwargs, dynamic_shapes=shapes, strict=False)
    except UnrollError:
        raise
    except Exception as error:
        finding = f"cannot be exported ({type(error).__name__}: {error})"
        raise UnrollError(Problem(type(model).__name__, finding, "make torch.export.export work first")) from error
