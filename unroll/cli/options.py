"""Options of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

from unroll.core.limits import STEPS
from unroll.core.plan import CHOICES, CHOSEN_FROM, PRESETS

FACTORY = """package.module:name, or path/to/file.py:name, of a model or of a function that returns it, or the model and
a tuple of its arguments, or these and a dictionary of keyword arguments for unroll.export_onnx."""

FIELDS = "; ".join(f"{name}={'|'.join(CHOSEN_FROM[name])}" for name in CHOICES)

PLAN = f"""How the steps are laid out. A preset: {", ".join(PRESETS)}. Or fields, separated by commas, as in
gates=paired,time=8: {FIELDS}; time=N, blocks of N steps in a loop."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on the standard output.")]

Where = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Only these layers: a name or shell pattern; may be repeated."),
]

PlanOption = Annotated[str, typer.Option(metavar="PLAN", help=PLAN)]

StepsOption = Annotated[
    int | None, typer.Option(metavar="N", help="Time steps, where an ONNX file leaves them open.", min=1)
]

LimitOption = Annotated[
    int | None, typer.Option(metavar="N", help=f"The most steps of a layer to write out; {STEPS:,} by default.", min=1)
]

DYNAMIC = """Sizes that stay open, for one tensor among the arguments: the names of its dimensions, in order, those that
are fixed left empty, as in batch,time or ,batch. Once for each tensor, in their order; one name is one size."""

DynamicOption = Annotated[list[str] | None, typer.Option("--dynamic", metavar="NAMES", help=DYNAMIC)]
