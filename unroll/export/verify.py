"""Whether an ONNX file is valid and computes what the original does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from unroll.comparison import Report, Row, compare
from unroll.core.recurrence import Problem, UnrollError
from unroll.export.capture import lengths_among
from unroll.onnx.rewrite import all_nodes, is_recurrent

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference from the original, relative to the largest value, by the least exact type in the model."""


def operators(model: ir.Model) -> Counter[str]:
    """How often each operator is written in a model, `domain::name` where the domain is not the standard's."""
    return Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in all_nodes(model))


def check_operators(model: ir.Model, *, recurrent: bool = False) -> None:
    """Refuse operators that are not the standard's in the model's version of it, and recurrent ones.

    Args:
        model: what was written.
        recurrent: whether recurrent operators were meant to stay.

    Raises:
        UnrollError: naming each.
    """
    problems = {}
    local = {(domain, name) for domain, name, _ in model.functions}
    for node in all_nodes(model):
        if is_recurrent(node) and not recurrent:
            problems[node.op_type] = Problem(node.name or node.op_type, "is still recurrent", "report this model")
        version = model.opset_imports.get(node.domain, 1)
        if (node.domain, node.op_type) not in local and not onnx.defs.has(
            node.op_type, max_inclusive_version=version, domain=node.domain
        ):
            finding = f"{node.domain or 'ai.onnx'}::{node.op_type} is not in version {version} of the standard"
            mend = "register a translation to standard operators, or pass check=False"
            problems[node.op_type] = Problem(node.name or node.op_type, finding, mend)
    if problems:
        raise UnrollError(*problems.values())


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
        finding = f"is itself not valid ONNX ({_first_line(before)})"
        raise UnrollError(Problem(os.fspath(source), finding, "mend it first")) from before
    finding = f"is not valid ONNX ({_first_line(error)})"
    raise UnrollError(Problem(os.fspath(name), finding, "report this model")) from error


def _fault(path: str | os.PathLike[str]) -> Exception | None:
    """What `onnx.checker` says against a file."""
    try:
        onnx.checker.check_model(os.fspath(path))
    except Exception as error:
        return error
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def session(path: str | os.PathLike[str], name: str | os.PathLike[str]) -> Any:
    """An ONNX Runtime session on the CPU, for one thread, with a file that is called `name` in messages."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        # ONNX Runtime 1.31 crashes in that optimization, of convolutions, where a float16 file has an open batch.
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
        )
    except Exception as error:
        if not os.path.exists(path):
            finding, mend = "cannot be read (No such file or directory)", "give the path of an ONNX file"
        else:
            finding, mend = f"is refused by ONNX Runtime ({_first_line(error)})", _mend(str(error))
        raise UnrollError(Problem(os.fspath(name), finding, mend)) from error


# What to do, by what the reason of ONNX Runtime holds.
MENDS = {
    "NOT_IMPLEMENTED": "export in float32, or pass check=False for another runtime",
    "under development": "ask for an older opset_version, or pass check=False for another runtime",
    "Unsupported model IR version": "install a newer ONNX Runtime, or write the file for an older version",
    "INVALID_PROTOBUF": "give the path of an ONNX file",
    "ShapeInferenceError": "torch's exporter wrote that node if it is no step of a layer: change the operation",
}


def _mend(reason: str) -> str:
    return next((mend for part, mend in MENDS.items() if part in reason), "report this model")


def check_values(
    path: str | os.PathLike[str],
    name: str | os.PathLike[str],
    program: ExportedProgram,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output_names: Sequence[str],
) -> tuple[Report, int]:
    """Compare ONNX Runtime with the original, on the given and on fresh random inputs.

    Where sizes are dynamic, fresh inputs have other sizes. Inputs that the original itself refuses are left out.

    Args:
        path: where the file lies.
        name: what it is called in messages.
        program: the model as it was captured, which tells which sizes are dynamic.
        original: what the file must agree with.
        args: example inputs.
        kwargs: example keyword arguments.
        output_names: of the file.

    Returns:
        A report with the outputs' names for places, and how many inputs the original refused.

    Raises:
        UnrollError: naming what differs.
    """
    runner = session(path, name)
    names = [value.name for value in runner.get_inputs()]
    inputs, refused = [(args, kwargs)], 0
    for fresh in fresh_inputs(program, args, kwargs):
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
            finding = f"fails in ONNX Runtime ({_first_line(error)})"
            raise UnrollError(Problem(os.fspath(name), finding, "report this model")) from error

    spec = pytree.tree_structure(inputs[0])

    def expected(*leaves: Any) -> list[Tensor]:
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return [leaf.cpu() for leaf in pytree.tree_leaves(original(*args, **kwargs)) if isinstance(leaf, Tensor)]

    leaves = [tuple(pytree.tree_leaves(pair)) for pair in inputs]
    tensors = [t for t in (*program.state_dict.values(), *leaves[0]) if isinstance(t, Tensor)]
    rtol = max((TOLERANCES[t.dtype] for t in tensors if t.dtype in TOLERANCES), default=TOLERANCES[torch.float64])
    report = compare(expected, rewritten, leaves, reference=False, rtol=rtol)
    rows = [row._replace(place=_renamed(row, output_names)) for row in report.rows]
    return Report(tuple(rows)).check(), refused


def _renamed(row: Row, names: Sequence[str]) -> str:
    """With the name of the output for its number."""
    before, bracket, number = row.place.rpartition("[")
    index = number.removesuffix("]")
    known = bracket and index.isdigit() and int(index) < len(names)
    return before.removesuffix("output") + names[int(index)] if known else row.place


def fresh_inputs(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Random inputs like the given ones: once of their sizes, and with dynamic sizes longer and shorter."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    examples = [values.get(name) for name in program.graph_signature.user_inputs]
    dims = [size for e in examples if isinstance(e, Tensor) for size in e.shape if isinstance(size, torch.SymInt)]
    symbols: list[Any] = sorted({s for size in dims for s in size.node.expr.free_symbols}, key=str)
    hints = {s: size.node.shape_env.backed_var_to_val[s] for size in dims for s in size.node.expr.free_symbols}
    variants = [hints]
    if symbols:
        limits = {s: program.range_constraints.get(s) for s in symbols}
        for change in (lambda n, k: n + 3 + k, lambda n, k: max(n // 2, 1)):
            sizes = {s: _within(change(int(hints[s]), k), limits[s]) for k, s in enumerate(symbols)}
            variants.append(sizes)
    generator = torch.Generator().manual_seed(0)
    packed = lengths_among(program)
    for sizes in variants:

        def size(n: Any, sizes: dict[Any, int] = sizes) -> int:
            return int(n) if isinstance(n, int) else int(n.node.expr.subs(sizes))

        drawn = []
        for name, leaf, example in zip(program.graph_signature.user_inputs, leaves, examples, strict=False):
            if isinstance(leaf, Tensor) and isinstance(example, Tensor):
                shape = [size(n) for n in example.shape]
                if name in packed:
                    steps, falling = packed[str(name)]
                    leaf = _lengths(leaf, shape, size(steps), falling, generator)
                else:
                    leaf = _drawn(leaf, shape, generator).to(leaf.device)
            drawn.append(leaf)
        yield pytree.tree_unflatten(drawn, spec)


def _within(size: int, limits: Any) -> int:
    if limits is None:
        return size
    if limits.upper < size:
        return int(limits.upper)
    return int(limits.lower) if limits.lower > size else size


def _lengths(like: Tensor, shape: list[int], steps: int, falling: bool, generator: torch.Generator) -> Tensor:
    """Random lengths up to `steps`, of which the first is the longest that there may be."""
    lengths = torch.randint(1, steps + 1, shape, generator=generator)
    lengths[:1] = steps
    return (lengths.sort(descending=True).values if falling else lengths).to(like)


def _drawn(like: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Random values as those of `like`: normal with its mean and spread, or picked among its integers."""
    like = like.detach().cpu()
    if like.is_floating_point():
        mean, spread = (like.double().mean(), like.double().std(correction=0)) if like.numel() else (0.0, 1.0)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (mean + (spread if spread else 1.0) * noise).to(like.dtype)
    if like.is_complex() or not like.numel():
        return torch.zeros(shape, dtype=like.dtype)
    return like.flatten()[torch.randint(like.numel(), shape, generator=generator)]
