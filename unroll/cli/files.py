"""`unroll onnx` and `unroll export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from unroll.cli.options import FACTORY, DynamicOption, Json, LimitOption, PlanOption, StepsOption, Where
from unroll.cli.path import import_from_here
from unroll.cli.printing import console, plain, print_json, show_parts, stdout_for
from unroll.extras import require

CAPTURE = """export, by torch.export; trace, one run for good, for code that torch.export cannot follow; or auto, which
traces what cannot be exported."""

Capture = Literal["export", "trace", "auto"]


def onnx_command(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An ONNX file.", show_default=False)],
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="Where the unrolled model goes.", show_default=False)
    ],
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

    Example: unroll onnx model.onnx unrolled.onnx --check
    """
    require("onnx", "onnx_ir", *["onnxruntime"] * check)
    from unroll.export.rewriting import rewrite_file

    with show_parts("read", "unroll", "save", "check") as part:
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
        print_json({**done._asdict(), "path": str(done.path), "operators": operators})
    else:
        text = f"{done.path}: {sum(done.operators.values())} nodes, {done.size / 1e6:.1f} MB"
        text += "" if done.replaced else "; no recurrent node was replaced"
        if done.difference is not None:
            text += f"\n  on random numbers: differs by at most {done.difference:.1e}"
        console().print(text, markup=False)


def export_command(
    factory: Annotated[str, typer.Argument(metavar="FACTORY", help=FACTORY, show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The ONNX file to write.", show_default=False)],
    where: Where = None,
    plan: PlanOption = "onnxruntime",
    dynamic: DynamicOption = None,
    input_names: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Names of the file's inputs, separated by commas.")
    ] = None,
    output_names: Annotated[str | None, typer.Option(metavar="NAMES", help="The same for its outputs.")] = None,
    opset: Annotated[int | None, typer.Option(metavar="N", help="Version of the ONNX operators.")] = None,
    capture: Annotated[Capture, typer.Option(metavar="ROUTE", help=CAPTURE)] = "export",
    check: Annotated[bool, typer.Option(help="Compare ONNX Runtime with the original.")] = True,
    limit: LimitOption = None,
    as_json: Json = False,
) -> None:
    """Write a PyTorch model as an ONNX file without recurrent operators, and check it.

    Example: unroll export path/to/model.py:make model.onnx --dynamic time,batch
    """
    from unroll.export.exporting import export_onnx
    from unroll.export.factories import asked_options, load_example

    import_from_here()
    with stdout_for(as_json):
        names = {"input_names": _words(input_names), "output_names": _words(output_names)}
        model, args, given = load_example(factory)
        options = asked_options(factory, args, given, dynamic, opset_version=opset, where=where, **names)
        with show_parts("capture", "translate", "unroll", "save", "check") as part:
            export = export_onnx(
                model,
                args,
                target,
                plan=plan,  # pyright: ignore[reportArgumentType]
                capture=capture,
                check=check,
                limit=limit,
                progress=part,
                **options,
            )
    if as_json:
        print_json(plain(export))
    else:
        console().print(str(export), markup=False)


def _words(text: str | None) -> list[str] | None:
    return None if text is None else [word.strip() for word in text.split(",")]
