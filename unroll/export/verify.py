"""Checks that an ONNX file is valid and computes what the original does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll.comparison import ACROSS_RUNTIMES, blamed, compare, kept_state, rtol_of
from unroll.core.errors import Problem, Problems, UnrollError, refusing
from unroll.export.inputs import FAILS, is_output
from unroll.export.samples import file_inputs
from unroll.onnx.rewrite import all_nodes, is_recurrent
from unroll.onnx.runtime import first_line, function_of, session
from unroll.reports import Report, Row


def operators(model: ir.Model) -> Counter[str]:
    """Count how often each operator is written in a model, `domain::name` where the domain is not the standard's."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in all_nodes(model))


def check_operators(model: ir.Model, *, recurrent: bool = False) -> None:
    """Refuse operators that are not the standard's in the model's version of it, and recurrent ones.

    Args:
        model: what was written.
        recurrent: whether recurrent operators were meant to stay.

    Raises:
        UnrollError: naming each.
    """
    problems = Problems()
    local = {(domain, name) for domain, name, _ in model.functions}
    for (domain, name), node in {(node.domain, node.op_type): node for node in all_nodes(model)}.items():
        if is_recurrent(node) and not recurrent:
            problems.add(node.name or name, "is still recurrent", "report this model")
        version = model.opset_imports.get(domain, 1)
        if (domain, name) not in local and not onnx.defs.has(name, max_inclusive_version=version, domain=domain):
            finding = f"{domain or 'ai.onnx'}::{name} is not in version {version} of the standard"
            fix = "register a translation to standard operators, or pass check=False"
            problems.add(node.name or name, finding, fix)
    problems.check()


def check_file(
    path: str | os.PathLike[str], name: str | os.PathLike[str], source: str | os.PathLike[str] | None = None
) -> None:
    """Refuse a file that `onnx.checker` refuses.

    Args:
        path: where it lies.
        name: what it is called in messages.
        source: the file that it was made of, which may be refused itself.
    """
    error = _fault(path)
    if error is None:
        return
    before = None if source is None else _fault(source)
    if source is not None and before is not None:
        finding = f"is itself not valid ONNX ({first_line(before)})"
        raise UnrollError(Problem(os.fspath(source), finding, "fix it first")) from before
    finding = f"is not valid ONNX ({first_line(error)})"
    raise UnrollError(Problem(os.fspath(name), finding, "report this model")) from error


def _fault(path: str | os.PathLike[str]) -> Exception | None:
    """Return what `onnx.checker` says against a file; None if nothing."""
    try:
        onnx.checker.check_model(os.fspath(path))
    except Exception as error:
        return error
    return None


def check_same(
    source: str | os.PathLike[str], path: str | os.PathLike[str], name: str | os.PathLike[str], steps: int | None = None
) -> Report:
    """Compare a file with the one that it was made of, in ONNX Runtime on random inputs.

    Inputs that the source itself refuses are left out.

    Args:
        source: the file it was made of.
        path: where the file lies.
        name: what it is called in messages.
        steps: the size of all that the source leaves open, where steps were asked to be written out.

    Raises:
        UnrollError: naming what differs, and if the source refuses all of them.
    """
    original, rewritten = function_of(source), function_of(path, name)
    taken = []
    for given in file_inputs(os.fspath(source), session(source, source).get_inputs(), steps):
        problems = Problems()
        with problems:
            original(*given)
        if not problems:
            taken.append(given)
    if not taken:
        finding = "refuses all random inputs, so that nothing was compared"
        raise UnrollError(Problem(os.fspath(source), finding, "leave out --check, and use unroll.compare on your own"))
    return compare(original, rewritten, taken, reference=False, rtol=rtol_of(taken)).check()


class Inputs(NamedTuple):
    """The runs in which a file and its original are compared."""

    args: tuple[Any, ...]
    """Of the example"""
    kwargs: dict[str, Any]
    others: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments and keyword arguments of other runs"""
    weights: Iterable[Any]
    """Those of the model, whose types tell how close the two must be"""


def check_values(
    path: str | os.PathLike[str],
    name: str | os.PathLike[str],
    original: Callable[..., Any],
    given: Inputs,
    output_names: Sequence[str],
    nodes: int = 0,
) -> tuple[Report, int, int]:
    """Compare ONNX Runtime with the original, on the given inputs and on others.

    Inputs that the original itself refuses are left out.

    Args:
        path: where the file lies.
        name: what it is called in messages.
        original: what the file must agree with.
        given: what both are run on.
        output_names: of the file.
        nodes: how many the file has, as for `session`.

    Returns:
        A report with the outputs' names for places, how many inputs were compared, and how many of the others the
        original refused.

    Raises:
        UnrollError: naming what differs.
    """
    try:
        runner = session(path, name, nodes=nodes)
    except UnrollError:
        with torch.no_grad(), refusing(type(original).__name__, *FAILS):  # torch.export may have taken what it refuses
            original(*given.args, **given.kwargs)
        raise
    names = [value.name for value in runner.get_inputs()]
    inputs, refused = [(given.args, given.kwargs)], 0
    for fresh in given.others:
        try:
            with torch.no_grad():
                original(*fresh[0], **fresh[1])
        except Exception:
            refused += 1
        else:
            inputs.append(fresh)

    def rewritten(*leaves: Any) -> list[Tensor]:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(tensors) != len(names):
            finding = f"has {len(names)} inputs, the model takes {len(tensors)} tensors"
            raise UnrollError(Problem(os.fspath(name), finding, "leave out unused arguments, or pass check=False"))
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        try:
            return [torch.from_numpy(array) for array in runner.run(None, feed)]
        except Exception as error:
            finding = f"fails in ONNX Runtime ({first_line(error)})"
            raise UnrollError(Problem(os.fspath(name), finding, "report this model")) from error

    spec = pytree.tree_structure(inputs[0])

    def expected(*leaves: Any) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with refusing(type(original).__name__, *FAILS):  # on the others it has run
            results = pytree.tree_leaves(original(*args, **kwargs))
        return [torch.as_tensor(leaf).cpu() for leaf in filter(is_output, results)]

    leaves = [tuple(pytree.tree_leaves(pair)) for pair in inputs]
    tensors = [t for t in (*given.weights, *leaves[0]) if isinstance(t, Tensor)]
    rtol = max(
        (ACROSS_RUNTIMES[t.dtype] for t in tensors if t.dtype in ACROSS_RUNTIMES),
        default=ACROSS_RUNTIMES[torch.float64],
    )
    report = compare(expected, rewritten, leaves, reference=False, rtol=rtol)
    rows = [row._replace(place=_renamed(row, output_names)) for row in blamed(report.rows, original)]
    kept = kept_state(original, lambda: original(*given.args, **given.kwargs)) if report.stateful else []
    return Report(tuple(rows), report.stateful, tuple(kept)).check(), len(inputs), refused


def _renamed(row: Row, names: Sequence[str]) -> str:
    """Return the place of a row with the name of the output for its number."""
    before, bracket, number = row.place.rpartition("[")
    index = number.removesuffix("]")
    known = bracket and index.isdigit() and int(index) < len(names)
    return before.removesuffix("output") + names[int(index)] if known else row.place
