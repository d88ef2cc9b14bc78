"""The progress of a measurement, shown on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the number of all steps, and what is being done."""


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """Yield what is called at every step: what was given, or else a bar with the time that is left.

    There is a bar where standard errors go to a terminal, and `rich` is installed.
    """
    if progress is not None or not sys.stderr.isatty() or find_spec("rich") is None:
        yield progress or (lambda done, total, what: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True, highlight=False, emoji=False), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)
