"""`unroll bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unroll.bench.options import DTYPES, FORMS, LAYER, SWEPT
from unroll.cli.options import Json
from unroll.cli.path import import_from_here
from unroll.cli.printing import console, print_whole, stdout_for
from unroll.cli.verbosity import SHOWN, VERBOSITY
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.extras import require

if TYPE_CHECKING:
    from unroll.bench.results import Measurements

FACTORY = """package.module:name, or path/to/file.py:name, of a function that returns the model and a tuple of its
arguments, or these and {"kwargs": ...}; measured is at the sizes of these arguments. Or, with --plots alone, files of
--save to draw."""

SIZES = "one or several, as in 8,32,128"


OTHER = ("subject", "plots", "as_json", *VERBOSITY)
"""What is not told to `benchmark`"""


def _default(name: str) -> str:
    return f"[default: {LAYER[name]}]"


def bench_command(
    context: typer.Context,
    subject: Annotated[list[str] | None, typer.Argument(metavar="FACTORY", help=FACTORY)] = None,
    kind: Annotated[str | None, typer.Option(metavar="KIND", help="lstm, gru or rnn. [default: lstm]")] = None,
    input_size: Annotated[int | None, typer.Option(metavar="N", help=_default("input_size"))] = None,
    hidden_size: Annotated[
        str | None, typer.Option(metavar="SIZES", help=f"Hidden features: {SIZES} {_default('hidden_size')}")
    ] = None,
    num_layers: Annotated[int | None, typer.Option(metavar="N", help=_default("num_layers"))] = None,
    bidirectional: Annotated[bool | None, typer.Option("--bidirectional", help="Both directions.")] = None,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Without biases.")] = False,
    proj_size: Annotated[int | None, typer.Option(metavar="N", help="Of an LSTM with projection.")] = None,
    nonlinearity: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of an RNN: tanh or relu. [default: tanh]")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="SIZES", help=f"Time steps: {SIZES} {_default('steps')}")] = None,
    batch: Annotated[
        str | None, typer.Option(metavar="SIZES", help=f"Sequences at a time: {SIZES} {_default('batch')}")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TYPE", help=f"{', '.join(DTYPES)} {_default('dtype')}")] = None,
    contenders: Annotated[
        str | None,
        typer.Option(metavar="FORMS", help=f"Which forms, separated by commas: {', '.join(FORMS)}. [default: all]"),
    ] = None,
    plan: Annotated[
        list[str] | None,
        typer.Option(metavar="PLAN", help="How to unroll: a preset, or as in gates=paired; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(metavar="N", help="Of each process, on a CPU.", min=1)] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="Training: forward and backward.")] = False,
    rounds: Annotated[int, typer.Option(metavar="N", help="Turns of each form.", min=1)] = 10,
    seconds: Annotated[float, typer.Option(metavar="S", help="Length of a turn.")] = 0.1,
    limit: Annotated[float, typer.Option(metavar="S", help="Seconds after which a build is stopped.")] = 120.0,
    jobs: Annotated[
        int, typer.Option(metavar="N", help="Builds at a time; more than one disturbs their times.", min=1)
    ] = 1,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="A JSON file for all figures.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A directory for pictures.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a layer, or a model of your own, in every form side by side, and say which to use.

    A layer is given by its options, a model by a function. Each form runs in a process of its own; the processes have
    their turns one after the other.

    Example: unroll bench --kind gru --steps 8,32 --plots pictures
    """
    given = {name: value for name, value in context.params.items() if name not in OTHER}
    if plots is not None:
        require("matplotlib", extra="bench")
    files = [name for name in subject or () if name.endswith(".json")]
    found = _load(context, files, plots) if files else _measure(subject or [], given, as_json=as_json)
    drawn = []
    if plots is not None:
        from unroll.bench.plots import draw

        drawn = draw(found, plots)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2, allow_nan=False))
        return
    out = console()
    if not files:
        print_whole(out, *as_tables(found))
    for path in [*[save] * bool(save), *drawn]:
        out.print(str(path), markup=False)


def _load(context: typer.Context, files: list[str], plots: Path | None) -> Measurements:
    """Read what was measured before.

    Raises:
        UnrollError: if it is not to be drawn, or something else is asked.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    other = [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    problems = Problems()
    for name in other:
        if name not in OTHER:
            problems.add(f"--{name.replace('_', '-')}", f"was given for {', '.join(files)}", "leave it out")
    if plots is None:
        problems.add(files[0], "is a file of measurements", "say where its pictures go, --plots DIRECTORY")
    problems += [
        Problem(name, "is no file of measurements", "give files of --save alone")
        for name in context.params["subject"]
        if name not in files
    ]
    problems.check()
    from unroll.bench.results import Measurements

    return Measurements.joined(map(Measurements.load, files))


def _measure(subject: list[str], given: dict[str, Any], *, as_json: bool) -> Measurements:
    """Measure what the options say, which are those of `benchmark` but for a few."""
    kind, factory = given.pop("kind"), subject[0] if subject else None
    problems = Problems()
    if len(subject) > 1:
        problems.add(" ".join(subject), "are several functions", "give one")
    if factory is not None and kind is not None:
        problems.add(f"--kind {kind}", f"was given beside {factory}", "give one of them")
    problems.check()
    contenders, without_bias = given.pop("contenders"), given.pop("no_bias")
    options = {
        **{name: _sizes(f"--{name.replace('_', '-')}", given.pop(name)) for name in SWEPT},
        "contenders": None if contenders is None else _words(contenders),
        "plans": given.pop("plan") or None,  # typer has an empty list for none
        "bias": False if without_bias else None,
        **given,
    }
    if factory is not None:
        import_from_here()
    from unroll.bench.run import benchmark

    with stdout_for(as_json):
        return benchmark(factory or kind or "lstm", progress=None if SHOWN.progress else _progress, **options)


def _progress(done: int, total: int, what: str) -> None:
    """Tell each step, if that is asked for, where no bar is shown."""
    if SHOWN.parts:
        console(stderr=True).print(f"{done} of {total}  {what}", markup=False)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _sizes(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UnrollError(Problem(f"{option} {text}", "is no list of sizes", "give it as in 8,32,128")) from None


def as_tables(found: Measurements) -> list[Any]:
    """Return the parts that rich prints: for each subject a table, why contenders failed, and the advice."""
    from rich.markup import escape
    from rich.table import Table

    from unroll.bench.results import COLUMNS, advice, by_subject, cells, in_order

    printed: list[Any] = []
    for subject, rows in by_subject(found.rows).items():
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=escape(str(subject)), title_justify="left")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
        for row in in_order(rows):
            if not row.failure:
                table.add_row(*map(escape, cells(row, rows)))
        failed = [f"{escape(row.name)}: [dim]{escape(row.failure)}[/dim]" for row in rows if row.failure]
        printed += [table, *failed, f"[bold]{escape(advice(rows))}[/bold]", ""]
    return printed
