"""The translation of the rest of a model by torch's exporter."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch.export import Dim, ExportedProgram, _trace
from torch.utils import _pytree as pytree

from unroll.core.alone import alone
from unroll.core.errors import Problem, Problems, UnrollError, innermost
from unroll.core.patching import Local, original, patched, without_warnings
from unroll.export.capture import NotCaptured
from unroll.export.names import name_apart, name_back
from unroll.export.squeezes import drop_idle_squeezes
from unroll.onnx.runtime import first_line

# What torch says of its own workings while it exports.
NOISE = (
    r"ONNX Preprocess",
    r"You are using the legacy TorchScript",
    r"The feature will be removed",
    r"The tensor attributes? .*_flat_weights",
    r".*isinstance\(treespec, LeafSpec\)",
    r"# The axis name",
    r".*with projections is not supported with oneDNN",
    r"Exporting aten::index operator of advanced indexing",  # of negative ones, which CountedIndices counts
)

# That torchvision is missing; that a version is converted, which is checked afterwards; what is not made smaller.
LOGGERS = (
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx._internal.exporter._registration",
    "torch.onnx._internal.exporter._compat",
    "onnxscript.version_converter",
    "onnx_ir.passes.common.initializer_deduplication",
)

OLDEST = 14
"""The oldest version of the standard's operators to which torch's exporter converts its 18"""


QUIET = Local[bool]("quiet")
"""True in a thread in which `quiet` lasts: what other threads print and log is shown as ever"""


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what torch says of its own workings while this lasts."""

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not QUIET.value

    shown: Any = original(torch._C, "_jit_onnx_log")

    def log(*values: Any) -> None:
        if not QUIET.value:
            shown(*values)

    def show(*values: Any, **options: Any) -> None:
        if not QUIET.value:
            print(*values, **options)

    with ExitStack() as stack:
        stack.enter_context(QUIET.set(True))
        # by which they show the graph as far as it came, before an error
        stack.enter_context(patched(_trace, print=show))
        stack.enter_context(patched(torch._C, _jit_onnx_log=log))
        for logger in map(logging.getLogger, LOGGERS):
            stack.enter_context(patched(logger, filters=[*logger.filters, is_shown]))
        stack.enter_context(without_warnings(*NOISE))
        yield


def named_dims(dynamic_shapes: Any) -> Any:
    """Return dynamic shapes with a `Dim` for each string, the same for the same string.

    Raises:
        UnrollError: for a string that cannot be a name.
    """
    dims: dict[str, Any] = {}
    names = {entry for entry in pytree.tree_leaves(dynamic_shapes) if isinstance(entry, str)}
    Problems(
        Problem(f"dynamic_shapes: {name!r}", "is no name of a size", "give letters, numbers and underscores")
        for name in sorted(names)
        if not name.isidentifier()
    ).check()
    return pytree.tree_map(lambda d: dims.setdefault(d, Dim(d)) if isinstance(d, str) else d, dynamic_shapes)


def check_asked(
    input_names: Sequence[str] | None, output_names: Sequence[str] | None, opset_version: int | None, newest: int
) -> None:
    """Refuse names, and a version of the standard's operators, that no file of torch's exporter can have."""
    named = (("input_names", input_names), ("output_names", output_names))
    if texts := [(kind, names) for kind, names in named if isinstance(names, str)]:
        raise UnrollError(
            *(Problem(f"{k}={names!r}", "is a single string", "give a list of names") for k, names in texts)
        )
    if opset_version is not None and not OLDEST <= opset_version <= newest:
        finding, fix = "is none that torch's exporter can write", f"ask for {OLDEST} to {newest}"
        raise UnrollError(Problem(f"opset_version={opset_version}", finding, fix))
    _refuse_twice([*(input_names or ()), *(output_names or ())])


def check_given(model: ir.Model, input_names: Sequence[str] | None, output_names: Sequence[str] | None) -> Problems:
    """Return a problem for names that were asked for and that a model does not have; refuse any that it has twice."""
    _refuse_twice([value.name for value in {*model.graph.inputs, *model.graph.outputs}])
    problems = Problems()
    for kind, names, values in (
        ("input_names", input_names, model.graph.inputs),
        ("output_names", output_names, model.graph.outputs),
    ):
        found = [value.name for value in values]
        if names and (len(names) > len(found) or list(names) != found[: len(names)]):
            problems.add(f"{kind}={list(names)}", f"does not fit {found}", "give a name for each, in order")
    return problems


def translate(
    program: ExportedProgram,
    dynamic_shapes: Any,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset_version: int | None,
) -> ir.Model:
    """Translate the program by torch's exporter; its recurrent layers are still single nodes."""
    check_asked(input_names, output_names, opset_version, onnx.defs.onnx_opset_version())
    if numbers := [str(n) for n in program.graph_signature.user_outputs if isinstance(n, (int, float))]:
        finding = f"returns {', '.join(numbers)}, which torch's exporter cannot write"
        raise NotCaptured(Problem("model", finding, "return torch.tensor(number), or leave it out"))
    drop_idle_squeezes(program)
    program = name_apart(program)
    try:
        with alone(exports=True):
            translated = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(input_names or ()) or None,
                output_names=list(output_names or ()) or None,
                opset_version=opset_version,
                dynamic_shapes=pytree.tree_map(lambda d: getattr(d, "__name__", d), dynamic_shapes),  # for their names
            )
    except Exception as error:
        cause = innermost(error)
        finding = f"cannot be translated by torch.onnx.export ({type(cause).__name__}: {first_line(cause)})"
        raise NotCaptured(Problem("model", finding, "replace the operator that it names")) from error
    assert translated is not None
    model: ir.Model = translated.model
    name_back(model)
    _fix_sizes(model)
    problems = check_given(model, input_names, output_names)
    if opset_version is not None and model.opset_imports.get("") != opset_version:
        finding = f"torch's exporter wrote {model.opset_imports.get('')}, and could not convert it"
        problems.add(f"opset_version={opset_version}", finding, "ask for 18 or newer")
    problems.check()
    return model


def _fix_sizes(model: ir.Model) -> None:
    """Write sizes that were to be open, and that `torch.export` found to be fixed, as numbers: torch names them "2"."""
    for value in model.graph.inputs:
        if value.shape is not None:
            sizes = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([int(n) if isinstance(n, str) and n.isdecimal() else n for n in sizes])


def _refuse_twice(names: Sequence[str | None]) -> None:
    """Refuse names of inputs and outputs of which two are the same."""
    finding, fix = "is the name of two inputs or outputs", "give each another, by input_names and output_names"
    twice = [name for name, count in Counter(names).items() if count > 1]
    Problems(Problem(repr(name), finding, fix) for name in twice).check()
