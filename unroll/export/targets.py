"""A warning where a plan has the name of a target that does not take all that was written by it."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import onnx_ir as ir

from unroll.core.errors import Problem, UnrollWarning
from unroll.onnx.runtime import MANY
from unroll.targets.checking import check
from unroll.targets.tables import NAMES, read_target


def node_names(model: ir.Model) -> set[str]:
    """Return the names of all nodes, those in loops and branches included."""
    return {str(node.name) for node in model.graph.all_nodes()}


def warn_of_target(model: ir.Model, path: Path, plan: Any, before: Collection[str], *, stacklevel: int) -> None:
    """Warn of nodes in the place of recurrent ones that a target does not take, if the plan has a target's name.

    Args:
        model: what was written.
        path: where it was written.
        plan: as the caller gave it; what it means without the name of a target is left alone.
        before: the names of the nodes that were there before, which are the model's own.
        stacklevel: of the warning.
    """
    if plan not in NAMES or read_target(plan).kind == "aten" or sum(1 for _ in model.graph.all_nodes()) > MANY:
        return
    ours = node_names(model).difference(before)
    found = check(model, target=plan).only(ours)
    if not found.ok:
        finding = f"has {len({row.place for row in found.rows})} nodes of unrolled layers that {plan} does not take"
        fix = f"`unroll inspect {path} --target {plan}` shows all"
        lines = [Problem(str(path), finding, fix), *found.problems]
        warnings.warn("\n  ".join(map(str, lines)), UnrollWarning, stacklevel=stacklevel + 1)
