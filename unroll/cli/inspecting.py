"""`unroll inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unroll.cli.options import FACTORY, DynamicOption, Json, LimitOption, PlanOption, StepsOption, Where
from unroll.cli.path import import_from_here
from unroll.cli.printing import console, print_json, show_parts, stdout_for
from unroll.cli.verbosity import VERBOSITY
from unroll.core.errors import Problem, UnrollError
from unroll.core.plan import PRESETS
from unroll.extras import require
from unroll.targets.tables import NAMES, read_target

if TYPE_CHECKING:
    from unroll.targets.checking import Verdict

TARGET = f"""Show what the model uses that one of {", ".join(NAMES)} does not offer: a file or an exported program as it
is, a model and its arguments as they are after unrolling and export, with the plan of the target's name if there is one
and --plan does not say. pt2e: the products that are float in what a factory has from convert_pt2e."""

TargetOption = Annotated[str | None, typer.Option(metavar="NAME", help=TARGET)]

BuildOption = Annotated[
    bool, typer.Option("--build", help="With --target tensorrt_rtx: build an engine too, which needs no GPU.")
]

JUDGING = ("model", "target", "build", "as_json", *VERBOSITY)
"""What goes with --target"""

UNROLLING = ("where", "plan", "dynamic")
"""What else goes with it if the model is to be unrolled"""


def inspect_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"An ONNX file, or {FACTORY}", show_default=False)],
    where: Where = None,
    steps: StepsOption = None,
    plan: PlanOption = "onnxruntime",
    dynamic: DynamicOption = None,
    limit: LimitOption = None,
    target: TargetOption = None,
    build: BuildOption = False,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An SVG file for a picture of the steps that unrolling makes.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the recurrent layers of a model, what unrolling makes of each, and what stands in the way.

    Ends with exit code 1 if something does, or if the model uses what a --target does not offer.

    Example: unroll inspect model.onnx --target webnn
    """
    require("onnx", "onnx_ir", "onnxscript")
    if target is not None:
        _judge(context, model, target, where, plan, dynamic, build, as_json)
        return
    if build:
        raise UnrollError(Problem("--build", "was given without a target", "give --target tensorrt_rtx"))
    from unroll.export.factories import asked_options
    from unroll.export.inspecting import INSPECTED, inspect
    from unroll.export.inspection import Inspection

    options: dict[str, Any] = {}
    with stdout_for(as_json), show_parts("read", "unroll") as part:
        part("read")
        made, args, given = _read(model)
        try:
            options = asked_options(model, args, given, dynamic, where=where)
            part("unroll")
            options = {name: value for name, value in options.items() if name in INSPECTED}
            found = inspect(made, args, steps=steps, plan=plan, limit=limit, **options)  # pyright: ignore[reportArgumentType]
        except UnrollError as error:
            found = Inspection((), error.problems)
    if as_json:
        print_json(found.as_dict())
    elif found.layers or not found.problems:
        console(soft_wrap=True).print(found.table(), markup=False)
    if found.problems and as_json:
        raise typer.Exit(1)
    if found.problems:
        raise UnrollError(*found.problems)
    if draw is not None:
        from unroll.drawing.pictures import draw as draw_steps

        told = {layer.steps for layer in found.layers if layer.steps}  # those of the example, if it tells one number
        steps = steps or (told.pop() if len(told) == 1 else None)
        draw_steps(made, draw, plan=plan, where=options.get("where"), steps=steps)  # pyright: ignore[reportArgumentType]


def _read(model: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return what a factory gives, or the path of a file by itself."""
    if ":" not in model or Path(model).exists():
        return model, None, {}
    from unroll.export.factories import load_factory

    import_from_here()
    return load_factory(model)


def _judge(
    context: typer.Context,
    model: str,
    target: Any,
    where: list[str] | None,
    plan: str,
    dynamic: list[str] | None,
    build: bool,
    as_json: bool,
) -> None:
    """Show what a target has against a model."""
    from torch import fx, nn
    from torch.export import ExportedProgram

    from unroll.export.factories import asked_options, without_example
    from unroll.targets.checking import PT2E, check

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    converted = target == PT2E
    if not converted:
        read_target(target)  # an unknown name is told first
    plans: dict[str, Any] = {}
    with stdout_for(as_json), show_parts("read", "unroll, export and check", "try plans") as part:
        part("read")
        made, args, options = _read(model)
        if isinstance(made, nn.Module) and not isinstance(made, fx.GraphModule) and args is None and not converted:
            raise UnrollError(without_example(model))
        as_it_is = args is None or isinstance(made, ExportedProgram) or converted
        if wrong := given.difference(JUDGING, () if as_it_is else UNROLLING):
            finding = "was given with --target"
            fix = "leave it out" + (": the model is judged as it is" if as_it_is else "")
            raise UnrollError(*(Problem(f"--{name}", finding, fix) for name in sorted(wrong)))
        part(("check" if as_it_is else "unroll, export and check") + " and build" * build)
        if as_it_is:
            verdict = check(made, target=target, build=build)
        else:
            from unroll.export.judging import judge_model, try_plans

            layout = target if target in PRESETS and "plan" not in given else plan
            options = asked_options(model, args, options, dynamic, where=where)
            assert isinstance(made, nn.Module) and not converted
            verdict = judge_model(made, args, target, plan=layout, options=options, build=build)
            if not verdict.ok:
                part("try plans")
                plans = _plans(target, try_plans(made, args, target, options))
    if as_json:
        print_json(verdict.as_dict() | plans)
    else:
        console(soft_wrap=True).print(str(verdict), markup=False)
        if plans:
            console(soft_wrap=True).print(f"What keeps to {target}: {_told(plans)}", markup=False)
    if not verdict.ok:
        raise typer.Exit(1)


def _plans(target: Any, tried: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return the plans that keep to a target; if none does, that of which a target for parts of models takes most."""
    from unroll.export.judging import most_taken

    keeping = [name for name, verdict in tried.items() if verdict.ok]
    if keeping or not tried or read_target(target).whole:
        return {"plans": keeping}
    name, products, findings = most_taken(tried)
    return {"plans": keeping, "most": {"plan": name, "products_left": products, "findings": findings}}


def _told(plans: dict[str, Any]) -> str:
    if "most" not in plans:
        return " or ".join(f"--plan {name}" for name in plans["plans"]) or "none of the plans that were tried"
    most = plans["most"]
    products = f"all products but {most['products_left']}" if most["products_left"] else "all products"
    return (
        f"none as a whole, but it takes parts, and most with --plan {most['plan']}: "
        f"{products}, and {most['findings']} findings are left to what runs the rest"
    )
