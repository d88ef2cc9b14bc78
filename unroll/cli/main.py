"""The command line: its commands, each of which is imported when it runs."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from unroll.cli.printing import console
from unroll.cli.verbosity import SHOWN, with_verbosity
from unroll.core.errors import UnrollError, UnrollWarning
from unroll.core.version import VERSION

COMMANDS = {
    "bench": ("unroll.cli.bench", "Measure a layer or a model in every form."),
    "onnx": ("unroll.cli.files", "Unroll an ONNX file."),
    "export": ("unroll.cli.files", "Write a PyTorch model as an unrolled ONNX file."),
    "inspect": ("unroll.cli.inspecting", "Show the recurrent layers of a model."),
}
"""For each command the module with its function, such as `bench_command`, and a short help"""


class Commands(TyperGroup):
    """A group that knows no more of a command than its short help until it runs: what commands import takes seconds."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if name in COMMANDS:
            module, help = COMMANDS[name]
            alone = typer.Typer(add_completion=False, rich_markup_mode=None)
            function = with_verbosity(getattr(import_module(module), f"{name}_command"))
            alone.command(name, short_help=help)(function)
            command = self.commands[name] = typer.main.get_command(alone)
            for argument in command.params:
                if argument.param_type_name == "argument":  # its name and help tell more than a `<str>` between them
                    vars(argument)["display_type_rich"] = lambda ctx: ""
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Replace recurrent layers by explicit unrolled operations.",
    epilog="Exit codes: 0 done, 1 refused or failed with the reason, 2 used wrongly.",
)

for _name, (_, _help) in COMMANDS.items():
    app.command(_name, short_help=_help)(lambda: None)  # until it runs


def _print_version(asked: bool) -> None:
    if asked:
        print(f"unroll {VERSION}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors are printed with their fix and end it with exit code 1."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            app(arguments)
        except UnrollError as error:
            _tell("red", "error", *(f"{place}: {finding}\n       {fix}" for place, finding, fix in error.problems))
            if SHOWN.traceback:
                traceback.print_exc()
            raise SystemExit(1) from None


def _tell(color: str, kind: str, *texts: str) -> None:
    errors = console(stderr=True, soft_wrap=True)
    for text in texts:
        errors.print(f"[{color}]{kind}:[/{color}] {escape(text)}")


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    """Show the library's own as errors are shown, and others as Python does."""
    if issubclass(category, UnrollWarning):
        _tell("yellow", "warning", str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
