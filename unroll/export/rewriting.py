"""From an ONNX file to an unrolled one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from unroll.core.errors import Problem, UnrollError
from unroll.core.limits import limited
from unroll.core.options import Steps, Where
from unroll.core.plan import Plan
from unroll.export import verify
from unroll.onnx import files
from unroll.onnx.reading import read_model
from unroll.onnx.rewrite import recurrent_nodes, unroll_ir


class Rewritten(NamedTuple):
    """A file that `rewrite_file` wrote."""

    path: Path
    size: int
    """Bytes, with those of the weights beside it"""
    replaced: int
    """Recurrent nodes that are gone"""
    operators: Counter[str]
    """How often each operator is written"""
    difference: float | None
    """The largest one from the file it was made of, if both were run"""


def rewrite_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    where: Where = None,
    plan: Plan | str | None = None,
    steps: Steps = None,
    limit: int | None = None,
    force: bool = False,
    check: bool = False,
    progress: Callable[[str], None] = lambda part: None,
) -> Rewritten:
    """Unroll an ONNX file into another, which appears only if `onnx.checker` takes it.

    Args:
        source: the file to read.
        target: the file to write.
        where: which nodes, by name.
        plan: how the steps are laid out.
        steps: the number of time steps where the file leaves it open.
        limit: the most steps of a layer that are written out, as for `unroll`.
        check: whether to compare both in ONNX Runtime, on random inputs.
        force: whether the target may be the source, which is lost then.
        progress: called with the name of each part of the work as it begins.

    Raises:
        UnrollError: for what cannot be read, honoured or written.
    """
    path = files.check_path(target)
    if not force and path.exists() and os.path.exists(source) and os.path.samefile(source, path):
        fix = "give another name, or pass --force, force=True, to lose what it holds"
        raise UnrollError(Problem(str(path), "is the file to be read", fix))
    progress("read")
    model = read_model(source)
    progress("unroll")
    before = sum(1 for _ in recurrent_nodes(model))
    with limited(limit):
        unroll_ir(model, where=where, plan=plan, steps=steps)
    replaced = before - sum(1 for _ in recurrent_nodes(model))
    progress("save")
    difference = None
    with files.write_then_move(model, path) as draft:
        progress("check")
        size = files.size(draft)
        verify.check_file(draft, path, source)
        if check:
            report = verify.check_same(source, draft, path, steps if isinstance(steps, int) else None)
            difference = max(row.difference for row in report.rows)
    return Rewritten(path, size, replaced, verify.operators(model), difference)
