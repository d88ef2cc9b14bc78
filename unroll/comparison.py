"""Strict comparison of an original with its rewritten form."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from unroll.core.contents import buffers_restored, copied, not_finite
from unroll.core.errors import Problem, UnrollError
from unroll.core.patching import seeded
from unroll.core.signatures import told
from unroll.extras import require
from unroll.reports import Report, Row
from unroll.roundings import SHAKES, Shaken, distance

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference from the original, relative to the largest value, where there is no float64 result to judge by:
in float64 and float32 hundreds of roundings, as steps pass them on; in the narrower types, in which a layer keeps `h`,
some five of them."""

ACROSS_RUNTIMES = TOLERANCES | {torch.float32: 1e-4}
"""The same between two runtimes, whose products add up in other orders and whose activations are other polynomials."""

# How many roundings of the largest value the rewritten may be off where the original happens to have no error. Float32
# rounds every intermediate result; in narrower types the gates are computed in float32, and only the result is rounded.
ROUNDINGS = {torch.float64: 4, torch.float32: 4}


@told
def compare(
    original: Callable[..., Any] | ExportedProgram | str | os.PathLike[str],
    rewritten: Callable[..., Any] | ExportedProgram | str | os.PathLike[str],
    args: Tensor | tuple[Any, ...] | list[tuple[Any, ...]],
    kwargs: Mapping[str, Any] | None = None,
    *,
    gradients: bool = False,
    reference: bool = True,
    rtol: float | None = None,
    seed: int = 0,
) -> Report:
    """Run both on the same input and compare structure, shapes, dtypes and values of all they return.

    Values are judged against the float64 result: the largest error of the rewritten may be at most twice
    that of the original, plus one rounding of the largest value (in float32 four). In float64, or without
    a reference, the largest difference may be `rtol` times the largest value.

    The gradient of a bias before a softmax is zero because terms cancel: what is left of them is their rounding, and
    how much of it the original has is luck. Where gradients are beyond their limit, a copy of the original is therefore
    run eight times more with every result inside of it up to one rounding off, by chance (Monte Carlo arithmetic), and

        limit = 2 * error of the original + roundings * max(eps * largest value, change)
        limit = rtol * largest value + roundings * change, in float64 or without a reference

    with the largest `change` of that gradient, which goes with the terms that are added up, and with `eps`; `roundings`
    is four in float32 and float64, else one. An original that is no module, or cannot be copied, has no `change`.

    Args:
        original: a module, any callable, an ExportedProgram, or the path of an ONNX file, which ONNX Runtime runs;
            then all tensors that the other takes and returns are the file's, in their order.
        rewritten: what should do the same.
        args: a tuple of positional arguments (or a single tensor), or a list of such tuples for several inputs.
        kwargs: keyword arguments, the same for each input.
        gradients: compare also the gradients of inputs and, by name, of parameters, for one random
            direction of all outputs. A parameter that nothing uses has a gradient of zeros.
        reference: judge by a float64 copy of `original`, where that is an `nn.Module`.
        rtol: 1e-9 in float64, 1e-5 in float32 (of files 1e-4), 5e-3 in float16 and 4e-2 in bfloat16 by default.
        seed: of torch's random numbers before each run, so that dropout draws alike. Afterwards they go on as if
            nothing had been drawn.

    Buffers that a run changes are put back after it, so that each begins with the same.

    Returns:
        A report; `print(report)` shows it, `report.check()` raises if anything differs.

    Raises:
        UnrollError: for arguments of another form; if the original cannot be copied for its float64 result, or
            the copy cannot run.

    Example:
        >>> layer = nn.GRU(3, 5)
        >>> compare(layer, unroll(layer), (torch.randn(7, 2, 3),), gradients=True).ok
        True
    """
    inputs = args if isinstance(args, list) else [(args,) if isinstance(args, Tensor) else args]
    if not inputs or not all(isinstance(given, tuple) for given in inputs):
        fix = "give a tensor, a tuple of arguments, or for several inputs a list of such tuples"
        raise UnrollError(Problem("compare(args=...)", "is no input, or a list of something else than tuples", fix))
    first, second = _runnable(original), _runnable(rewritten)
    files = [isinstance(model, (str, os.PathLike)) for model in (original, rewritten)]
    if any(files):
        rtol = rtol_of(inputs) if rtol is None else rtol
        if gradients:
            raise UnrollError(Problem("compare(gradients=True)", "was given for a file", "leave gradients out"))
    # an exported program holds its dtypes as constants
    exact = _double(original) if reference and isinstance(original, nn.Module) else None
    rows: list[Row] = []
    stateful, kept = False, list[str]()
    for number, given in enumerate(inputs):
        where = f"input {number}: " if len(inputs) > 1 else ""
        results = [
            _run(function, given, dict(kwargs or {}), gradients, seed, double=function is exact)
            for function in (first, second, exact)
            if function is not None
        ]
        if any(files) and not all(files):  # a file's results have names, and are not nested
            from unroll.onnx.runtime import named_as

            names = list(results[files.index(True)][0])
            results = [(named_as(names, result), found) for result, found in results]
        found = list(_rows(results, rtol))
        if any(row.finding and row.place in results[0][1] for row in found):
            found = list(_rows(results, rtol, _changes(first, given, dict(kwargs or {}), seed)))
        if any(row.finding for row in found):
            stateful = stateful or _keeps_state(first, given, dict(kwargs or {}), seed)
            if stateful and not kept:
                kept = kept_state(first, partial(_run, first, given, dict(kwargs or {}), False, seed, double=False))
            found = blamed(found, first)
        rows += [row._replace(place=where + row.place) for row in found]
    return Report(tuple(rows), stateful, tuple(kept))


def blamed(rows: Iterable[Row], original: Any) -> list[Row]:
    """Return the rows, those with a finding naming recurrent weights of the original that are not finite."""
    names = ", ".join(not_finite(original))
    why = f"; {names} holds NaN or infinity, which the first step from zeros leaves out" if names else ""
    return [row._replace(finding=row.finding + why) if row.finding else row for row in rows]


def kept_state(model: Any, run: Callable[[], Any]) -> list[str]:
    """Return the attributes of modules, by path, whose tensors are others after a run; buffers and parameters are none.

    Example:
        >>> class Memory(nn.Module):
        ...     def forward(self, x):
        ...         self.last = x + 1
        >>> memory = Memory()
        >>> kept_state(memory, lambda: memory(torch.zeros(2)))
        ['last']
    """
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) else {}

    def seen() -> dict[str, list[tuple[int, int]]]:
        held = {"_parameters", "_buffers", "_modules"}
        return {
            f"{path}.{name}".strip("."): [
                (id(leaf), leaf._version)
                for leaf in pytree.tree_leaves(value)
                if isinstance(leaf, Tensor) and not leaf.is_inference()
            ]
            for path, module in modules.items()
            for name, value in vars(module).items()
            if name not in held
        }

    before = seen()
    run()
    return [name for name, tensors in seen().items() if tensors != before.get(name, [])]


def _keeps_state(original: Any, args: Sequence[Any], kwargs: dict[str, Any], seed: int) -> bool:
    """Tell whether an original gives another result when it is called again with the same."""
    first, second = (_run(original, args, kwargs, False, seed, double=False) for _ in range(2))
    return any(row.finding for row in _rows([first, second], 0.0))


def _runnable(model: Any) -> Callable[..., Any]:
    if isinstance(model, ExportedProgram):
        return model.module()
    if not isinstance(model, (str, os.PathLike)):
        return model
    require("onnxruntime")
    from unroll.onnx.runtime import function_of

    return function_of(model)


def rtol_of(inputs: Any) -> float:
    """Return the tolerance across runtimes for the types of some inputs."""
    found = {t.dtype for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)} & ACROSS_RUNTIMES.keys()
    return max(ACROSS_RUNTIMES[dtype] for dtype in found or [torch.float32])


def _double(original: nn.Module) -> nn.Module | None:
    """A float64 copy, or None if everything is float64 anyway."""
    tensors = (*original.parameters(), *original.buffers())
    if all(t.dtype == torch.float64 for t in tensors if t.is_floating_point()):
        return None
    try:
        return copied(original).double()
    except Exception as error:
        finding = f"cannot be copied to float64 ({type(error).__name__}: {error})"
        raise UnrollError(Problem("original", finding, "compare with reference=False")) from error


def _changes(original: Any, args: Sequence[Any], kwargs: dict[str, Any], seed: int) -> dict[str, float]:
    """Measure how far gradients of the original move if what it computes is a rounding off: the largest of a few runs.

    Each runs a copy, for a run may change a module. Where there is none to be had, nothing is known or excused.
    """
    if not isinstance(original, nn.Module):
        return {}
    found: list[dict[str, Tensor]] = []
    try:
        for number in range(1 + SHAKES):
            twin = copied(original)
            with Shaken(number) if number else nullcontext():
                found.append(_run(twin, args, kwargs, True, seed, double=False)[1])
    except Exception:
        return {}
    still, *shaken = found
    changes = {name: max(distance(value, moved[name]) for moved in shaken) for name, value in still.items()}
    return {name: change for name, change in changes.items() if math.isfinite(change)}


def _run(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], gradients: bool, seed: int, double: bool
) -> tuple[Any, dict[str, Tensor]]:
    """The result of a function, and the gradients of its inputs and parameters by name."""

    def fresh(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().double() if double and value.is_floating_point() else value.detach().clone()
        return value.requires_grad_(gradients and value.is_floating_point())

    args, kwargs = pytree.tree_map(fresh, (tuple(args), kwargs))
    with buffers_restored(function):
        result, found = _results(function, args, kwargs, gradients, seed, double)
        # one that is a buffer is what the buffer is now
        return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), result), found


def _results(
    function: Callable[..., Any], args: Any, kwargs: Any, gradients: bool, seed: int, double: bool
) -> tuple[Any, dict[str, Tensor]]:
    with torch.set_grad_enabled(gradients), seeded(seed):
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            if not double:
                raise
            finding = f"its float64 copy cannot run ({type(error).__name__}: {error})"
            fix = "it may hold dtypes as constants, as exported graphs do: compare with reference=False"
            raise UnrollError(Problem("original", finding, fix)) from error
    result = pytree.tree_map(_fields, result)
    if not gradients:
        return result, {}
    outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in outputs]
    wanted = {f"gradient of {_place('input', path)}": t for path, t in _leaves((args, kwargs)) if isinstance(t, Tensor)}
    if isinstance(function, nn.Module):
        # of a state_dict, in which layers have torch's names whatever holds their parameters
        named = {id(p): (name, p) for name, p in reversed(function.state_dict(keep_vars=True).items())}
        # a compiled module holds the original by this name
        found = ((name.replace("_orig_mod.", ""), p) for name, p in reversed(named.values()))
        wanted |= {f"gradient of {name}": p for name, p in found}
    wanted = {name: t for name, t in wanted.items() if t.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), directions, allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return result, {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def _fields(value: Any) -> Any:
    """Return a dataclass that pytree does not know as a dictionary of its fields, whose tensors are compared."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return pytree.tree_map(_fields, fields)


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return pytree.tree_flatten_with_path(tree)[0]


def _place(root: str, path: Any) -> str:
    return root + pytree.keystr(path)


def _rows(
    results: list[tuple[Any, dict[str, Tensor]]], rtol: float | None, changes: Mapping[str, float] | None = None
) -> Iterator[Row]:
    (first, first_gradients), (second, second_gradients), *exact = results
    if pytree.tree_structure(second) != pytree.tree_structure(first):
        yield Row("output", f"is {_outline(second)}, the original {_outline(first)}")
        return
    names = [_place("output", path) for path, _ in _leaves(first)]
    exact_leaves = pytree.tree_leaves(exact[0][0]) if exact else [None] * len(names)
    for name, a, b, e in zip(names, pytree.tree_leaves(first), pytree.tree_leaves(second), exact_leaves, strict=True):
        yield _row(name, a, b, e, rtol)
    for name, a in first_gradients.items():
        if name in second_gradients:
            change = (changes or {}).get(name, 0.0)
            yield _row(name, a, second_gradients[name], exact[0][1][name] if exact else None, rtol, change)
        else:
            yield Row(name, "is missing")
    for name in second_gradients.keys() - first_gradients.keys():
        yield Row(name, "is not in the original")


def _row(place: str, original: Any, rewritten: Any, exact: Any, rtol: float | None, change: float = 0.0) -> Row:
    if not isinstance(original, Tensor) or not isinstance(rewritten, Tensor):
        same = type(original) is type(rewritten) and original == rewritten
        return Row(place, "" if same else f"is {_outline(rewritten)}, the original {_outline(original)}")
    row = Row(place, "", tuple(original.shape), str(original.dtype).removeprefix("torch."))
    for what in ("shape", "dtype", "device"):
        ours, theirs = getattr(rewritten, what), getattr(original, what)
        if ours != theirs:
            return row._replace(finding=f"has {what} {ours}, the original {theirs}")
    if not original.numel():
        return row
    if not original.is_floating_point():
        return row._replace(finding="" if torch.equal(original, rewritten) else "has other values")
    difference = distance(original, rewritten)
    scale = original.detach().double().abs().nan_to_num(0, 0, 0).max().item()
    roundings = ROUNDINGS.get(original.dtype, 1)
    if exact is None or rtol is not None:
        limit = (TOLERANCES[original.dtype] if rtol is None else rtol) * scale + roundings * change
        finding = "" if difference <= limit else f"differs by {difference:.2e}, more than {limit:.2e}"
        return row._replace(difference=difference, limit=limit, finding=finding)
    theirs, ours = distance(original, exact), distance(rewritten, exact)
    limit = 2 * theirs + roundings * max(torch.finfo(original.dtype).eps * scale, change)
    finding = (
        ""
        if ours <= limit
        else f"is {ours:.2e} from the float64 result, more than {limit:.2e}; the original {theirs:.2e}"
    )
    return row._replace(difference=difference, limit=limit, original_error=theirs, error=ours, finding=finding)


def _outline(value: Any) -> str:
    """A value in its structure, without the numbers of its tensors."""
    return str(pytree.tree_map_only(Tensor, lambda _: _Word("tensor"), value))


class _Word(str):
    __slots__ = ()
    __repr__ = str.__str__
