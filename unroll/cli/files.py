"""`unroll onnx`, `unroll export` and `unroll inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from torch import fx, nn
from torch.export import ExportedProgram

from unroll.cli.path import import_from_here
from unroll.cli.printing import console, plain, print_json, print_layers, show_parts, stdout_for
from unroll.core.errors import Problem, UnrollError
from unroll.core.limits import STEPS, limited
from unroll.core.plan import PRESETS, Plan
from unroll.export.exporting import export_onnx
from unroll.export.factories import load_factory, options_of
from unroll.extras import require
from unroll.targets import checking
from unroll.targets.tables import NAMES, read_target

FACTORY = """package.module:name of a function that returns the model, or the model and a tuple of its arguments, or
these and a dictionary of keyword arguments for unroll.export_onnx."""

CAPTURE = """export, by torch.export; trace, one run for good, for code that torch.export cannot follow; or auto, which
traces what cannot be exported."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on the standard output.")]

Where = Annotated[list[str] | None, typer.Option(help="Only these layers: a name or shell pattern; may be repeated.")]

PlanOption = Annotated[
    str, typer.Option(help=f"{', '.join(PRESETS)}, or fields as in gates=paired,time=8. See unroll.Plan.")
]

TARGET_HELP = f"""Show what the model uses that one of {", ".join(NAMES)} does not offer: a file or an exported program
as it is, a model and its arguments as they are after unrolling and export, with the plan of the target's name if there
is one and --plan does not say."""

TargetOption = Annotated[str | None, typer.Option(help=TARGET_HELP)]

BuildOption = Annotated[
    bool, typer.Option("--build", help="With --target tensorrt_rtx: build an engine too, which needs no GPU.")
]

StepsOption = Annotated[int | None, typer.Option(help="Time steps, where the model leaves them open.", min=1)]

LimitOption = Annotated[int | None, typer.Option(help=f"The most steps of a layer to write out; {STEPS:,} by default.")]

JUDGING = ("model", "target", "build", "as_json")
"""What goes with --target"""

UNROLLING = ("where", "plan")
"""What else goes with it if the model is to be unrolled"""


def onnx_command(
    source: Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Where the unrolled model goes.", show_default=False)],
    where: Where = None,
    steps: StepsOption = None,
    plan: PlanOption = "onnxruntime",
    limit: LimitOption = None,
    check: Annotated[bool, typer.Option("--check", help="Compare both in ONNX Runtime on random numbers.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write over the file that is read.")] = False,
    as_json: Json = False,
) -> None:
    """Replace the LSTM, GRU and RNN nodes of an ONNX file by plain operators.

    Where the file leaves the number of time steps open, they run in a Scan; with --steps they are written out, or with
    --plan gates=paired,time=8 run in a Scan all the same, 8 in a turn.
    """
    require("onnx", "onnx_ir", *["onnxruntime"] * check)
    from unroll.export.rewriting import rewrite_file

    with show_parts() as part:
        done = rewrite_file(
            source,
            target,
            where=where,
            plan=plan,
            steps=steps,
            limit=limit,
            check=check,
            force=force,
            progress=part,
        )
    if as_json:
        operators = dict(done.operators)
        print_json({"path": str(done.path), "size": done.size, "replaced": done.replaced, "operators": operators})
    else:
        text = f"{done.path}: {sum(done.operators.values())} nodes, {done.size / 1e6:.1f} MB"
        text += "" if done.replaced else "; no recurrent node was replaced"
        console().print(text, markup=False)


def export_command(
    factory: Annotated[str, typer.Argument(help=FACTORY, show_default=False)],
    target: Annotated[Path, typer.Argument(help="The ONNX file to write.", show_default=False)],
    where: Where = None,
    plan: PlanOption = "onnxruntime",
    opset: Annotated[int | None, typer.Option(help="Version of the ONNX operators.")] = None,
    capture: Annotated[str, typer.Option(help=CAPTURE)] = "export",
    check: Annotated[bool, typer.Option(help="Compare ONNX Runtime with the original.")] = True,
    limit: LimitOption = None,
    as_json: Json = False,
) -> None:
    """Write a PyTorch model as an ONNX file without recurrent operators, and check it."""
    import_from_here()
    with stdout_for(as_json):
        model, args, given = load_factory(factory)
        if args is None and not isinstance(model, ExportedProgram):
            raise UnrollError(_alone(factory))
        options = options_of(factory, given, opset_version=opset, where=where)
        with show_parts() as part:
            export = export_onnx(
                model,
                args,
                target,
                plan=Plan.of(plan),
                capture=capture,  # pyright: ignore[reportArgumentType]
                check=check,
                limit=limit,
                progress=part,
                **options,
            )
    if as_json:
        print_json(plain(export))
    else:
        console().print(str(export), markup=False)


def inspect_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help=f"An ONNX file, or {FACTORY}", show_default=False)],
    where: Where = None,
    steps: StepsOption = None,
    plan: PlanOption = "onnxruntime",
    limit: LimitOption = None,
    target: TargetOption = None,
    build: BuildOption = False,
    as_json: Json = False,
) -> None:
    """Show the recurrent layers of a model, what unrolling makes of each, and what stands in the way.

    Ends with exit code 1 if something does, or if the model uses what a --target does not offer.
    """
    if target is not None:
        _judge(context, model, target, where, plan, build, as_json)
        return
    if build:
        raise UnrollError(Problem("--build", "was given without a target", "give --target tensorrt_rtx"))
    require("onnx", "onnx_ir", "onnxscript")
    from unroll.export.inspection import Inspection, inspect_model, inspect_module
    from unroll.onnx.reading import read_model

    layout = Plan.of(plan)
    with stdout_for(as_json), show_parts() as part, limited(limit):
        part("read")
        try:
            if _is_factory(model):
                if steps is not None:
                    fix = "leave it out: the example arguments tell"
                    raise UnrollError(Problem(f"--steps {steps}", "was given for a PyTorch model", fix))
                import_from_here()
                made, args, given = load_factory(model)
                options = options_of(model, given, where=where)
                part("unroll")
                found = inspect_module(made, args, options, where=options.get("where"), plan=layout)
            else:
                ir_model = read_model(model)
                part("unroll")
                found = inspect_model(ir_model, where=where, plan=layout, steps=steps)
        except UnrollError as error:
            found = Inspection((), error.problems)
    if as_json:
        print_json(found.as_dict())
    else:
        print_layers(found)
    if found.problems:
        raise typer.Exit(1)


def _is_factory(model: str) -> bool:
    return ":" in model and not Path(model).exists()


def _judge(
    context: typer.Context,
    model: str,
    target: Any,
    where: list[str] | None,
    plan: str,
    build: bool,
    as_json: bool,
) -> None:
    """Show what a target has against a model."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    read_target(target)  # an unknown name is told first
    keeping: list[str] | None = None
    with stdout_for(as_json), show_parts() as part:
        part("read")
        if is_factory := _is_factory(model):
            import_from_here()
        made, args, options = load_factory(model) if is_factory else (model, None, {})
        if isinstance(made, nn.Module) and not isinstance(made, fx.GraphModule) and args is None:
            raise UnrollError(_alone(model))
        as_it_is = args is None or isinstance(made, ExportedProgram)
        if wrong := given.difference(JUDGING, () if as_it_is else UNROLLING):
            finding = "was given with --target"
            fix = "leave it out" + (": the model is judged as it is" if as_it_is else "")
            raise UnrollError(*(Problem(f"--{name}", finding, fix) for name in sorted(wrong)))
        part(("check" if as_it_is else "unroll, export and check") + " and build" * build)
        if as_it_is:
            verdict = checking.check(made, target=target, build=build)
        else:
            require("onnx", "onnx_ir", "onnxscript")
            from unroll.export.judging import judge_model, keeping_plans

            layout = target if target in PRESETS and "plan" not in given else plan
            options = options_of(model, options, where=where)
            verdict = judge_model(made, args, target, plan=layout, options=options, build=build)  # pyright: ignore[reportArgumentType]
            if not verdict.ok:
                part("try plans")
                keeping = keeping_plans(made, args, target, options)  # pyright: ignore[reportArgumentType]
    if as_json:
        print_json(verdict.as_dict() | ({} if keeping is None else {"plans": keeping}))
    else:
        console(soft_wrap=True).print(str(verdict), markup=False)
        if keeping is not None:
            told = " or ".join(f"--plan {name}" for name in keeping) or "none of the plans that were tried"
            console(soft_wrap=True).print(f"What keeps to {target}: {told}", markup=False)
    if not verdict.ok:
        raise typer.Exit(1)


def _alone(factory: str) -> Problem:
    return Problem(factory, "returns a model alone", "let it return the model and a tuple of example arguments")
