"""The two ways from PyTorch to ONNX: `torch.export`, and a trace for what that cannot follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from torch import nn
from torch.export import ExportedProgram

from unroll.core.errors import Problem, UnrollError
from unroll.core.options import Rules, Where
from unroll.export.capture import NotCaptured, capture, refuse_arguments
from unroll.export.inputs import tensor_leaves
from unroll.export.samples import fresh_inputs, varied_inputs
from unroll.export.tracing import trace_model
from unroll.export.translate import named_dims, translate
from unroll.streams.modules import Streaming

ROUTES = ("export", "trace", "auto")

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a call"""

REPORT = "report this model"
"""The fix of what should not happen, but may where a trace has kept something"""

FEW = 4
"""The inputs on which the file of a trace must have been compared, or it is said that there were fewer"""


class Wanted(NamedTuple):
    """The arguments of `export_onnx` that a capture needs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    where: Where
    rules: Rules | None
    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    opset_version: int | None = None


@dataclass
class Found:
    """A model that was captured, its recurrent layers still single nodes."""

    model: ir.Model
    route: str
    """`export` or `trace`"""
    given: Given
    others: Callable[[], Iterable[Given]]
    """A function that makes the other inputs on which the file is to be compared"""
    weights: Iterable[Any]
    program: ExportedProgram | None = None
    """Of `torch.export`"""
    frozen: list[str] = field(default_factory=list)
    """What a trace has kept, `file:line: what` each"""
    why: UnrollError | None = None
    """The reason why `torch.export` was not used, if it was tried"""

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Add what a trace has kept to what the check says while this lasts."""
        try:
            yield
        except UnrollError as error:
            if not self.frozen:
                raise
            fix = "compute it by operations on tensors, such as torch.where"
            seen = (p._replace(fix="see what the trace has kept") if p.fix == REPORT else p for p in error.problems)
            kept = (Problem(place, f"was kept by the trace: {what}", fix) for place, what in map(_parted, self.frozen))
            raise UnrollError(*seen, *kept) from error

    def told(self, name: str, compared: int) -> str:
        """Say what a trace has kept and how far the file was compared, for a warning."""
        lines = [f"{name}: was traced, and whatever data decides stays as it was in the example"]
        if self.why is not None:
            lines.append(f"torch.export: {self.why.problems[0].finding}")
        lines += self.frozen or ["nothing was seen to be decided"]
        if compared < FEW:
            lines.append(f"the file was compared on {compared} inputs alone: compare it with the model on your own")
        return "\n  ".join(lines)


def captured(
    model: nn.Module | ExportedProgram, wanted: Wanted, route: str, progress: Callable[[str], None] = lambda part: None
) -> Found:
    """Capture a model by `export` or `trace`, or by the second where the first cannot, `auto`.

    Raises:
        UnrollError: for what cannot be honoured; if neither can follow the model, with the reasons of both.
    """
    if route not in ROUTES:
        raise UnrollError(Problem(f"capture={route!r}", "is no way to capture a model", f"choose {', '.join(ROUTES)}"))
    named_dims(wanted.dynamic_shapes)  # refuses, before anything runs, what can be no name
    if route == "trace":
        _refuse_trace(model)
        return _trace(model, wanted, progress)
    try:
        return _export(model, wanted, progress)
    except NotCaptured as error:
        if not _is_traceable(model):
            raise
        reason = error
    try:
        found = _trace(model, wanted, progress)
    except UnrollError as error:
        if route == "export":
            raise reason from reason.__cause__
        raise UnrollError(*reason.problems, *error.problems) from error
    if route == "export":
        raise UnrollError(*map(partial(_with_trace, found), reason.problems)) from reason.__cause__
    found.why = reason
    return found


def _export(model: nn.Module | ExportedProgram, wanted: Wanted, progress: Callable[[str], None]) -> Found:
    progress("capture")
    shapes = named_dims(wanted.dynamic_shapes)
    options: Mapping[str, Any] = {"where": wanted.where, "rules": wanted.rules}
    program = capture(model, wanted.args, wanted.kwargs, dynamic_shapes=shapes, **options)
    progress("translate")
    names = wanted.input_names, wanted.output_names
    try:
        written = translate(program, wanted.dynamic_shapes, *names, wanted.opset_version)
    except NotCaptured:
        if isinstance(model, nn.Module):
            refuse_arguments(model, wanted.args, wanted.kwargs, shapes)
        raise
    given: Given = wanted.args, wanted.kwargs
    if isinstance(model, ExportedProgram):
        given = model.example_inputs or (wanted.args, {})
    others = partial(fresh_inputs, program, *given)
    return Found(written, "export", given, others, program.state_dict.values(), program)


def _trace(model: Any, wanted: Wanted, progress: Callable[[str], None]) -> Found:
    progress("trace")
    traced = trace_model(model, **wanted._asdict())

    def others() -> Iterator[Given]:
        leaves = tensor_leaves(model, wanted.args, wanted.kwargs, wanted.dynamic_shapes)
        return varied_inputs(leaves, wanted.args, wanted.kwargs)

    weights = model.state_dict().values()
    return Found(traced.model, "trace", (wanted.args, wanted.kwargs), others, weights, frozen=traced.frozen)


def _is_traceable(model: Any) -> bool:
    return isinstance(model, nn.Module) and not isinstance(model, (Streaming, torch.jit.ScriptModule))


def _refuse_trace(model: Any) -> None:
    if not _is_traceable(model):
        finding = f"was given for {type(model).__name__}, which keeps its form by torch.export alone"
        raise UnrollError(Problem('capture="trace"', finding, "leave capture out"))


def _with_trace(found: Found, problem: Problem) -> Problem:
    """Add to a problem of `torch.export` what a trace would do."""
    kept = f"would keep as in the example: {'; '.join(found.frozen)}" if found.frozen else "was seen to keep nothing"
    return problem._replace(fix=f"{problem.fix}; or pass capture='trace', which {kept}")


def _parted(kept: str) -> tuple[str, str]:
    """Part `file:line: what` into the place and the rest."""
    place, _, what = kept.partition(": ")
    return place, what
