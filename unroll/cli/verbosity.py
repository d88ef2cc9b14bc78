"""How much a command tells: options of every command."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from unroll.core.errors import UnrollWarning


@dataclass
class Shown:
    """The things that are told beside results and errors."""

    progress: bool = True
    parts: bool = False
    traceback: bool = False


SHOWN = Shown()
"""Those of the command that runs"""

VERBOSITY = {
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Results and errors alone: no progress, no warnings.")],
    "verbose": Annotated[bool, typer.Option("--verbose", "-v", help="Tell each part of the work as it begins.")],
    "debug": Annotated[bool, typer.Option("--debug", help="Print the traceback of an error too.")],
}


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with the options that say how much it tells."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool, verbose: bool, debug: bool, **kwargs: Any) -> None:
        SHOWN.progress, SHOWN.parts, SHOWN.traceback = not (quiet or verbose), verbose, debug
        with warnings.catch_warnings():
            if quiet:
                warnings.simplefilter("ignore", UnrollWarning)
            command(*args, **kwargs)

    signature = inspect.signature(command, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in VERBOSITY.items()
    ]
    vars(run)["__signature__"] = signature.replace(parameters=[*signature.parameters.values(), *more])
    run.__annotations__ = {p.name: p.annotation for p in vars(run)["__signature__"].parameters.values()}
    return run
