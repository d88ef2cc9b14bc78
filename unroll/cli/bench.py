"""`unroll bench`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unroll.bench.contenders import CONTENDERS
from unroll.bench.plots import draw
from unroll.bench.results import COLUMNS, Measurements, advice, by_subject, cells, in_order
from unroll.bench.run import benchmark
from unroll.bench.subjects import DTYPES, LAYER, SWEPT
from unroll.cli.path import import_from_here
from unroll.cli.printing import console, print_whole
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.extras import require

FACTORY = """package.module:name of a function that returns the model and a tuple of its arguments, or these and
{"kwargs": ...}; measured is at the sizes of these arguments. Or, with --plots alone, files of --save to draw."""

SIZES = "one or several, as in 8,32,128"


def _default(name: str) -> str:
    return f"[default: {LAYER[name]}]"


def bench_command(
    context: typer.Context,
    subject: Annotated[list[str] | None, typer.Argument(help=FACTORY)] = None,
    kind: Annotated[str | None, typer.Option(help="lstm, gru or rnn. [default: lstm]")] = None,
    input_size: Annotated[int | None, typer.Option(help=_default("input_size"))] = None,
    hidden_size: Annotated[str | None, typer.Option(help=f"Hidden features: {SIZES} {_default('hidden_size')}")] = None,
    num_layers: Annotated[int | None, typer.Option(help=_default("num_layers"))] = None,
    bidirectional: Annotated[bool | None, typer.Option("--bidirectional", help="Both directions.")] = None,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Without biases.")] = False,
    proj_size: Annotated[int | None, typer.Option(help="Of an LSTM with projection.")] = None,
    nonlinearity: Annotated[str | None, typer.Option(help="Of an RNN: tanh or relu. [default: tanh]")] = None,
    steps: Annotated[str | None, typer.Option(help=f"Time steps: {SIZES} {_default('steps')}")] = None,
    batch: Annotated[str | None, typer.Option(help=f"Sequences at a time: {SIZES} {_default('batch')}")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"{', '.join(DTYPES)} {_default('dtype')}")] = None,
    contenders: Annotated[
        str | None, typer.Option(help=f"Which forms, separated by commas: {', '.join(CONTENDERS)}. [default: all]")
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option(help="How to unroll: a preset, or as in gates=paired; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Of each process, on a CPU.", min=1)] = 1,
    backward: Annotated[bool, typer.Option("--backward", help="Training: forward and backward.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each form.", min=1)] = 10,
    seconds: Annotated[float, typer.Option(help="Length of a turn.")] = 0.1,
    limit: Annotated[float, typer.Option(help="Seconds after which a build is stopped.")] = 120.0,
    jobs: Annotated[int, typer.Option(help="Builds at a time; more than one disturbs their times.", min=1)] = 1,
    save: Annotated[Path | None, typer.Option(help="A JSON file for all figures.")] = None,
    plots: Annotated[Path | None, typer.Option(help="A directory for pictures.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")] = False,
) -> None:
    """Measure a layer, or a model of your own, in every form side by side, and say which to use.

    A layer is given by its options, a model by a function. Each form runs in a process of its own; the processes have
    their turns one after the other.
    """
    given = {name: value for name, value in context.params.items() if name not in ("subject", "plots", "as_json")}
    if plots is not None:
        require("matplotlib", extra="bench")
    files = [name for name in subject or () if name.endswith(".json")]
    found = _load(context, files, plots) if files else _measure(subject or [], given, as_json=as_json)
    drawn = [] if plots is None else draw(found, plots)
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
        if name not in ("subject", "plots", "as_json"):
            problems.add(f"--{name.replace('_', '-')}", f"was given for {', '.join(files)}", "leave it out")
    if plots is None:
        problems.add(files[0], "is a file of measurements", "say where its pictures go, --plots DIRECTORY")
    problems += [
        Problem(name, "is no file of measurements", "give files of --save alone")
        for name in context.params["subject"]
        if name not in files
    ]
    problems.check()
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
    with _bar() as progress, redirect_stdout(sys.stderr) if as_json else nullcontext():
        return benchmark(factory or kind or "lstm", progress=progress, **options)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _sizes(option: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UnrollError(Problem(f"{option} {text}", "is no list of sizes", "give it as in 8,32,128")) from None


@contextmanager
def _bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time that is left, on a terminal."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    errors = console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


def as_tables(found: Measurements) -> list[Any]:
    """Return the parts that rich prints: for each subject a table, why contenders failed, and the advice."""
    from rich.markup import escape
    from rich.table import Table

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
