"""Printing on the command line: texts, tables, JSON and the progress of work, in full and as they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

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


def print_layers(found: Any) -> None:
    out = console()
    if found.layers:
        names = ("layer", "kind", "sizes", "layers", "directions", "steps", "parameters", "nodes", "kB")
        columns = [Column(name, no_wrap=True) for name in names]
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 1, 0, 0))
        for layer in found.layers:
            values = asdict(layer)
            sizes = f"{layer.input_size} → {layer.hidden_size}"
            steps = "any" if layer.steps is None else str(layer.steps)
            counts = ["?" if values[key] is None else f"{values[key]:,}" for key in ("parameters", "nodes")]
            size = "?" if layer.size is None else f"{layer.size / 1000:,.1f}"
            table.add_row(
                escape(layer.name), layer.kind, sizes, str(layer.layers), str(layer.directions), steps, *counts, size
            )
        print_whole(out, table)
    elif not found.problems:
        out.print("no recurrent layers")
    for place, finding, fix in found.problems:
        out.print(f"[red]in the way:[/red] {escape(f'{place}: {finding}; {fix}')}", soft_wrap=True)


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
def show_parts() -> Iterator[Callable[[str], None]]:
    """Show on a terminal, while this lasts, the part of the work being done and its time; yield what sets the part."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    errors = console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=None)
        yield lambda part: progress.update(task, description=part)


def stdout_for(as_json: bool) -> Any:
    """Keep what others print out of the JSON while this lasts."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()
