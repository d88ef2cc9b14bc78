"""How the command line prints text and tables from elsewhere: in full, and as they are."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def console(**options: Any) -> Console:
    """A console that takes no `:boom:` in a name for a picture."""
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
