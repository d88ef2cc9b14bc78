"""Printing on the command line: texts, tables, JSON and the progress of work, in full and as they are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from unroll.cli.verbosity import SHOWN

if TYPE_CHECKING:
    from unroll.export.exporting import Export


def console(**options: Any) -> Console:
    """Make a console that takes no `:boom:` in a name for a picture."""
    return Console(highlight=False, emoji=False, **options)


def print_whole(console: Console, *parts: str | Table) -> None:
    """Print texts, and tables in full: what is too wide goes past the edge, where a terminal breaks its lines."""
    width = console.width
    for part in parts:
        if isinstance(part, Table):
            wide = console.options.update(max_width=10**6)
            console.width = max(width, Measurement.get(console, wide, part).maximum)
        console.print(part)
        console.width = width


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def plain(export: Export) -> dict[str, Any]:
    return {
        "path": str(export.path),
        "size": export.size,
        "opset": export.opset,
        "operators": dict(export.operators),
        "differences": export.differences if export.report else None,
        "refused": export.refused,
        "seconds": dict(export.seconds),
    }


@contextmanager
def show_parts(*parts: str) -> Iterator[Callable[[str], None]]:
    """Show on a terminal, while this lasts, which of these parts of the work is being done and for how long.

    Yields:
        A function that is told the part that begins; one that is none of them is shown in the place of the next.
    """
    columns = SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    errors = console(stderr=True)
    began = time.perf_counter()
    with Progress(
        *columns, console=errors, transient=True, disable=not (errors.is_terminal and SHOWN.progress)
    ) as shown:
        task = shown.add_task("", total=len(parts))

        def begin(part: str) -> None:
            if SHOWN.parts:
                errors.print(f"{time.perf_counter() - began:7.1f} s  {part}", markup=False)
            shown.update(task, description=part, completed=parts.index(part) + 1 if part in parts else None)

        yield begin


def stdout_for(as_json: bool) -> Any:
    """Keep what others print out of the JSON while this lasts."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()
