"""From PyTorch to a checked ONNX file."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.export import ExportedProgram

from unroll.core.errors import UnrollError, UnrollWarning
from unroll.core.limits import limited
from unroll.core.options import Rules, Where, read_where
from unroll.core.plan import Plan, Preset
from unroll.core.recurrence import read_module
from unroll.core.signatures import no_model, told
from unroll.extras import require
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled
from unroll.reports import Report

if TYPE_CHECKING:
    from unroll.export.routes import Found

KINDS = "an nn.Module, a GraphModule or an ExportedProgram; unroll() takes ONNX models"


@dataclass(frozen=True)
class Export:
    """The result of `export_onnx`: what it wrote, and what its checks found; printing it shows a table.

    Attributes:
        path: the file.
        size: its bytes, with those of the weights beside it if they are in a file of their own.
        operators: how often each operator is written, also inside loops and branches.
        opset: version of the standard's operators.
        report: the comparison with the original; None without a check.
        refused: how many of the random inputs the original itself could not run, so that they tell nothing.
        seconds: how long each part took.
    """

    path: Path
    size: int
    operators: Counter[str]
    opset: int
    report: Report | None
    refused: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def differences(self) -> dict[str, float]:
        """The largest difference of each output from the original's, over all inputs that were tried."""
        found: dict[str, float] = {}
        for row in self.report.rows if self.report else ():
            name = row.place.rpartition(": ")[2]
            found[name] = max(found.get(name, 0.0), row.difference)
        return found

    def __str__(self) -> str:
        count = sum(self.operators.values())
        head = f"{self.path}: {count} nodes, {self.size / 1e6:.1f} MB, opset {self.opset}"
        head += f", in {sum(self.seconds.values()):.1f} s"
        lines = [f"  {name}: differs by at most {worst:.1e}" for name, worst in self.differences.items()]
        if self.refused:
            lines.append(f"  {self.refused} random inputs left out, which the model itself refuses")
        return "\n".join([head, *(lines or ["  not checked"])])


@told
def export_onnx(
    model: nn.Module | ExportedProgram,
    args: Any,
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    plan: Plan | Preset | None = None,
    where: Where = None,
    rules: Rules | None = None,
    capture: Literal["export", "trace", "auto"] = "export",
    check: bool = True,
    limit: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Export:
    """Write a model as an ONNX file without recurrent operators, and check the file before it is handed over.

    The recurrent layers pass torch's exporter as single nodes, so that its cost does not grow with the steps.
    A dynamic number of steps becomes a `Scan`. The check runs `onnx.checker`, looks at every operator, and
    compares ONNX Runtime with the original on the given and on fresh random inputs, of other sizes too where
    they are dynamic; beyond 10,000 nodes it runs them as they are written, without its fusions. A file
    appears under `path` only if all of it succeeds.

    Args:
        model: a module in evaluation mode, a `GraphModule` or an `ExportedProgram`. It need not be traceable
            by `torch.fx`, but must be by `torch.export`. What `unroll.streaming` returned needs no example of its
            states, and has a state `lstm.h` as the input `lstm.h` and the output `lstm.h.next`.
        args: example inputs, a tuple or a single tensor. For an `ExportedProgram` those it was made with
            are taken if this is None.
        path: where the file goes. Weights of more than 1.8 GB go beside it, to the same name and `.data`.
        kwargs: example keyword arguments.
        dynamic_shapes: as for `torch.export.export`; a string in place of a `Dim` names it.
        input_names: names of the file's inputs, for the first ones at least.
        output_names: names of its outputs. Those of a layer by itself are `output`, `h_n` and `c_n` by default, of a
            cell `h_1` and `c_1`.
        opset_version: version of the standard's operators, 14 or newer; what torch writes by default. Versions
            before 18 are had by conversion, and refused if that fails.
        plan: how the steps are laid out, `"onnxruntime"` by default. Layers that are frozen keep theirs.
        where: which layers, as for `unroll`; others are left to torch's exporter, at its own risk.
        rules: for layers of classes of your own, as for `unroll`.
        capture: `"export"` by `torch.export`; `"trace"` by `torch.jit.trace` and torch's older exporter, for code that
            `torch.export` cannot follow. A trace sees one run, and keeps for good what data decided in it: branches,
            the length of loops, numbers read from tensors. The check then runs more inputs: other values, signs and
            masks flipped, other open sizes; where the file differs on one, it is refused. `"auto"` traces what
            `torch.export` cannot capture.
        check: whether to run the checks.
        limit: the most steps of a layer that are written out, 20,000 if not given; more are refused.
        progress: called with the name of each part of the work as it begins.

    Returns:
        What was written, with the largest difference of each output.

    Raises:
        UnrollError: for everything that cannot be honoured, and if a check fails.

    Warns:
        UnrollWarning: of a model that was traced, with the places, file and line, where the run decided something; and
            where the plan has a target's name, as `"npu"` and `"tensorrt"`, of what was written for the layers and that
            the target does not take, as `unroll.check` has it: a check that files beyond 10,000 nodes are spared.

    The file says in its metadata how it was made: `unroll.version`, `unroll.plan`, `unroll.capture`, `unroll.opset` as
    it was asked for, and `unroll.frozen`, what a trace has kept.

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.onnx")
        >>> export = export_onnx(nn.GRU(3, 5).eval(), torch.randn(7, 2, 3), path, output_names=["y", "h"])
        >>> export.opset, list(export.differences), "GRU" in export.operators
        (20, ['y', 'h'], False)
    """
    require("onnx", "onnx_ir", "onnxscript", *["onnxruntime"] * check)
    from unroll.core.arguments import as_args
    from unroll.core.patching import without_gc
    from unroll.export import verify as checks
    from unroll.export.inputs import in_order
    from unroll.export.routes import Wanted, captured
    from unroll.export.states import add_state_inputs, name_states
    from unroll.export.targets import node_names, warn_of_target
    from unroll.export.translate import quiet
    from unroll.onnx import files
    from unroll.onnx.rewrite import PLAN, from_torch, unroll_ir

    path, layout, where = files.check_path(path), None if plan is None else Plan.of(plan), read_where(where)
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise UnrollError(no_model("export_onnx(model)", model, KINDS))
    args, kwargs, dynamic_shapes = add_state_inputs(model, as_args(args), in_order(model, kwargs), dynamic_shapes)
    clock = _Clock(progress)
    names = input_names, output_names or _results_of(model)
    wanted = Wanted(args, kwargs, dynamic_shapes, where, rules, *names, opset_version)
    with quiet():
        found = captured(model, wanted, capture, clock)
    written, report, compared, refused = found.model, None, 0, 0
    if found.program is not None:
        name_states(model, found.program, written, *(given or () for given in names))
    clock("unroll")
    others = node_names(written)
    with limited(limit), without_gc():
        unroll_ir(written, where=None if where is None else from_torch, plan=layout)
        counted = checks.operators(written)
    files.sign(written, plan=layout or PLAN, capture=found.route, opset=opset_version or "default", frozen=found.frozen)
    clock("save")
    # The file is moved to `path` when this block ends without an error.
    with files.write_then_move(written, path) as draft:
        size = files.size(draft)
        if check:
            clock("check")
            checks.check_operators(written, recurrent=where is not None)
            checks.check_file(draft, path)
            report, compared, refused = _compared(model, found, draft, path, counted.total())
            warn_of_target(written, path, plan, others, stacklevel=3)
    if found.route == "trace":
        warnings.warn(found.told(type(model).__name__, compared), UnrollWarning, stacklevel=3)
    return Export(path, size, counted, written.opset_imports[""], report, refused, clock.done())


def _compared(model: Any, found: Found, draft: Path, path: Path, nodes: int) -> tuple[Report, int, int]:
    """Compare a file with the model that it was made of, as `check_values` does."""
    from unroll.core.patching import seeded
    from unroll.export import verify as checks
    from unroll.export.translate import quiet

    original = model.module() if isinstance(model, ExportedProgram) else model
    with quiet(), seeded(), found.explaining():
        outputs = [str(value.name) for value in found.model.graph.outputs]
        inputs = checks.Inputs(*found.given, found.others(), found.weights)
        return checks.check_values(draft, path, original, inputs, outputs, nodes)


def _results_of(model: Any) -> list[str] | None:
    """Return the names that PyTorch's documentation gives to the results of a layer, if the model is one itself."""
    if not (is_recurrent(model) or isinstance(model, Unrolled)):
        return None
    recurrence = model.recurrence if isinstance(model, Unrolled) else read_module(model)
    states = recurrence.cell.states
    return [f"{s}_1" for s in states] if recurrence.is_cell else ["output", *(f"{s}_n" for s in states)]


class _Clock:
    """Times the parts of the work."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.part, self.began = "", 0.0

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        if self.part:
            self.seconds[self.part] = now - self.began
        self.part, self.began = part, now
        if self.progress and part:
            self.progress(part)

    def done(self) -> dict[str, float]:
        self("")
        return self.seconds
