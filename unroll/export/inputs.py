"""The inputs of a model, as its file takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from unroll.core.errors import Problem, UnrollError
from unroll.modules.find import walk_all
from unroll.onnx.layers import DOMAIN

FAILS = ("fails itself on the example arguments", "give arguments that it takes")
"""The finding and the fix where a model refuses its own example"""


class Leaf(NamedTuple):
    """A tensor among the arguments of a model: an input of its file."""

    name: str
    tensor: Tensor
    open: dict[int, str]
    """The names of its open sizes, by axis"""
    dims: dict[str, Any]
    """What they were given as, by name: a `Dim` has bounds, or is computed from another"""


def tensor_leaves(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any = None
) -> list[Leaf]:
    """Return the tensors among the arguments, in the order in which pytree flattens them.

    Open sizes that `dynamic_shapes` does not name are taken for one if they are the same in the example.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        fix = "give what its forward takes"
        raise UnrollError(Problem("args, kwargs", f"do not fit {type(model).__name__} ({error})", fix)) from error
    if dynamic_shapes is None or isinstance(dynamic_shapes, Mapping):
        shapes = dict(dynamic_shapes or {})
    elif isinstance(dynamic_shapes, (tuple, list)) and len(dynamic_shapes) == len(bound):
        shapes = dict(zip(bound, dynamic_shapes))
    else:
        raise _unfit("dynamic_shapes", dynamic_shapes, f"give one entry for each of {', '.join(bound)}")
    if unknown := shapes.keys() - {*bound, *kwargs}:
        raise _unfit("dynamic_shapes", min(map(repr, unknown)), f"name what is given, {', '.join({**bound, **kwargs})}")
    found: list[Leaf] = []
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            for key, inner in value.items():
                found += _leaves(key, inner, shapes.get(key, (shapes.get(name) or {}).get(key)))
        else:
            found += _leaves(name, value, shapes.get(name))
    return found


def _leaves(name: str, value: Any, shape: Any) -> Iterator[Leaf]:
    if isinstance(value, Tensor):
        sizes = _by_axis(name, value.dim(), shape or {})
        opened = {axis: (text, dim) for axis, dim in sizes if (text := _dim_name(dim, value.shape[axis]))}
        for axis, (_, dim) in opened.items():
            if within(value.shape[axis], limits_of(dim)) != value.shape[axis]:
                raise _unfit(f"dynamic_shapes: {name}", f"{dim} for {value.shape[axis]}", "give an example within it")
        yield Leaf(name, value, {axis: text for axis, (text, _) in opened.items()}, dict(opened.values()))
    elif pytree.tree_is_leaf(value):
        if hides_tensors(value):
            fix = "give its tensors as arguments, or register the class by torch.export.register_dataclass"
            raise UnrollError(Problem(name, f"is a {type(value).__name__}, whose tensors a trace would keep", fix))
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}_{key}", inner, (shape or {}).get(key))
    else:
        parts = pytree.tree_leaves(value, is_leaf=lambda part: part is not value)
        for k, inner in enumerate(parts):
            inside = shape[k] if isinstance(shape, (tuple, list)) and k < len(shape) else None
            yield from _leaves(f"{name}_{k}", inner, inside)


def _by_axis(name: str, count: int, shape: Any) -> list[tuple[int, Any]]:
    """Return the entries of an argument of so many axes in `dynamic_shapes`, by the number of the axis from 0."""
    if isinstance(shape, (tuple, list)) and len(shape) == count:
        return list(enumerate(shape))
    if isinstance(shape, Mapping) and all(axis in range(-count, count) for axis in shape):
        return [(axis % count, dim) for axis, dim in shape.items()]
    raise _unfit(f"dynamic_shapes: {name}", shape, f"give an entry for each of its {count} axes, or some by number")


def _unfit(place: str, given: Any, fix: str) -> UnrollError:
    return UnrollError(Problem(place, f"does not fit the arguments ({given})", fix))


def is_output(value: Any) -> bool:
    """Tell whether something that a model returns is an output of a file: a tensor, or a number."""
    return isinstance(value, (Tensor, int, float))


def hides_tensors(value: Any) -> bool:
    """Tell whether something holds tensors that pytree does not see, which are neither inputs nor outputs of a file."""
    if isinstance(value, (Tensor, nn.Module, FunctionType, MethodType)):
        return False
    return any(isinstance(part, Tensor) for _, part in walk_all(value))


def _dim_name(dim: Any, size: int) -> str | None:
    """Return the name of a size by its entry in `dynamic_shapes`; None if it is not open."""
    if dim is None or isinstance(dim, int) or dim is Dim.STATIC:
        return None
    if isinstance(dim, str):
        return dim
    if isinstance(dim, Dim):
        return dim.__name__
    if isinstance(dim, type(Dim.AUTO)):
        return f"size_{size}"
    raise _unfit("dynamic_shapes", dim, "give a name or a Dim")


def limits_of(dim: Any) -> ValueRanges:
    """Return the bounds of an open size by its entry in `dynamic_shapes`; a name alone has none."""
    lower, upper = getattr(dim, "min", None), getattr(dim, "max", None)
    return ValueRanges(lower or 0, int_oo if upper is None else upper)


def within(size: int, limits: Any) -> int:
    """Return the size, or the bound that it is beyond."""
    if limits is None:
        return size
    if limits.upper < size:
        return int(limits.upper)
    return int(limits.lower) if limits.lower > size else size


def in_order(model: nn.Module | ExportedProgram, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Put keyword arguments in the order of the model's forward, which is that of a file's inputs."""
    given = dict(kwargs or {})
    if not given or isinstance(model, (ExportedProgram, torch.jit.ScriptModule)):
        return given
    names = [name for name in inspect.signature(model.forward).parameters if name in given]
    return {name: given[name] for name in [*names, *given]}


class Lengths(NamedTuple):
    """The bounds of the lengths of packed sequences."""

    steps: Any
    """The largest length, a number or a symbolic one"""
    falling: bool
    """True if they must be sorted, the longest first"""


def lengths_among(program: ExportedProgram) -> dict[str, Lengths]:
    """Return the inputs of a captured program that are lengths of packed sequences, by name."""
    found: dict[str, Lengths] = {}
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.onnx_symbolic._symbolic_multi_out.default
    ):
        operands: Any = node.args[0]
        if node.kwargs["domain"] != DOMAIN or not _is_padded(node):
            continue
        before = _before(operands[-1])
        vectors = [n for n in before if n.op == "placeholder" and n.meta["val"].dim() == 1]
        if len(vectors) == 1:
            # A program that sorts them itself takes them in any order.
            falling = not any("sort" in str(n.target) for n in before)
            found[vectors[0].name] = Lengths(operands[0].meta["val"].shape[0], falling)
    return found


def _is_padded(node: fx.Node) -> bool:
    # All whole numbers lie in one list; a position is where those of an attribute begin and end.
    keys: Any = node.kwargs["attr_keys"]
    values: Any = node.kwargs["attr_ints"]
    positions: Any = node.kwargs["attr_pos"]
    return bool(values[positions[keys.index("padded")][0]])


def _before(node: fx.Node) -> set[fx.Node]:
    """Return the node and all that its value is computed from, as far as they are tensors."""
    found: set[fx.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node not in found and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            found.add(node)
            left += node.all_input_nodes
    return found
