"""Inputs of a model: examples in order, and random ones like them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.modules.find import walk_all
from unroll.onnx.layers import DOMAIN


def fresh_inputs(
    program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield random inputs like the given ones: once of their sizes, and with dynamic sizes longer and shorter."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    examples = [values.get(name) for name in program.graph_signature.user_inputs]
    dims = [size for e in examples if isinstance(e, Tensor) for size in e.shape if isinstance(size, torch.SymInt)]
    symbols: list[Any] = sorted({s for size in dims for s in size.node.expr.free_symbols}, key=str)
    hints = {s: size.node.shape_env.backed_var_to_val[s] for size in dims for s in size.node.expr.free_symbols}
    variants = [hints]  # sizes by symbol: those of the example, then longer and shorter ones
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
            if _within(value.shape[axis], _limits(dim)) != value.shape[axis]:
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


def _limits(dim: Any) -> ValueRanges:
    """Return the bounds of an open size by its entry in `dynamic_shapes`; a name alone has none."""
    lower, upper = getattr(dim, "min", None), getattr(dim, "max", None)
    return ValueRanges(lower or 0, int_oo if upper is None else upper)


def varied_inputs(
    leaves: Sequence[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield inputs on which what a trace has frozen shows: other values, signs and masks flipped, other open sizes.

    Whole numbers of one axis, which may be lengths, come as they are drawn and sorted falling. Open sizes keep to the
    bounds of their `Dim`; those computed from another follow it.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    generator = torch.Generator().manual_seed(0)

    def made(tensors: Iterator[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return pytree.tree_unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in flat], spec)

    def drawn(sizes: Mapping[str, int], *, falling: bool) -> Iterator[Tensor]:
        for leaf in leaves:
            shape = [sizes[leaf.open[axis]] if axis in leaf.open else n for axis, n in enumerate(leaf.tensor.shape)]
            tensor = _drawn(_with_others(leaf.tensor), shape, generator).to(leaf.tensor.device)
            whole = tensor.dim() == 1 and not tensor.is_floating_point() and tensor.dtype is not torch.bool
            yield tensor.sort(descending=True).values if falling and whole else tensor

    yield made(_flipped(leaf.tensor) for leaf in leaves)
    sizes = {name: leaf.tensor.shape[axis] for leaf in leaves for axis, name in leaf.open.items()}
    dims = {name: dim for leaf in leaves for name, dim in leaf.dims.items()}

    def changed(change: Callable[[int, int], int]) -> dict[str, int]:
        found = {name: _within(change(n, k), _limits(dims[name])) for k, (name, n) in enumerate(sizes.items())}
        roots = {name: getattr(getattr(dim, "root", None), "__name__", None) for name, dim in dims.items()}
        return found | {name: dims[name].fn(found[root]) for name, root in roots.items() if root in found}

    changes = [lambda n, k: n]
    if sizes:
        changes += [lambda n, k: n + 2 + k, lambda n, k: max(n - 1 - k, 1), lambda n, k: 1]
    else:
        changes *= 2
    for change in changes:
        for falling in (False, True):
            yield made(drawn(changed(change), falling=falling))


def _with_others(like: Tensor) -> Tensor:
    """Return the values to draw from: an example's, and for one whole number or truth alone also others near it.

    A file in which a trace has kept that number is right for no other.
    """
    if like.is_floating_point() or like.is_complex() or not like.numel() or (like != like.flatten()[0]).any():
        return like
    value = like.flatten()[0].item()
    near = {not value} if like.dtype is torch.bool else {abs(value - 1), value // 2} - {value}
    return torch.tensor([*near, *[value] * (like.numel() > 1)], dtype=like.dtype)


def _flipped(tensor: Tensor) -> Tensor:
    """Return a tensor with other signs, or a mask with the other truth; other whole numbers in another order."""
    if tensor.dtype is torch.bool:
        return ~tensor
    if tensor.is_floating_point() or tensor.is_complex():
        return -tensor
    return tensor.flip(0) if tensor.dim() else tensor


DRAWN = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
"""The types of a file's inputs, by ONNX Runtime's names, of which random numbers can be drawn"""


def file_inputs(place: str, values: Sequence[Any], steps: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield random inputs of a file: with its open sizes larger, smaller, and all the same.

    Args:
        place: the file, for messages.
        values: its inputs, as ONNX Runtime tells them.
        steps: the size of all that are open, if they were asked to be written out.

    Raises:
        UnrollError: for a type of which none can be drawn.
    """
    problems = Problems()
    for value in values:
        if value.type not in DRAWN:
            problems.add(f"{place}: {value.name}", f"is a {value.type}, of which none is drawn", "leave out --check")
    problems.check()
    generator = torch.Generator().manual_seed(0)
    opened = dict.fromkeys(size for value in values for size in value.shape if not isinstance(size, int))
    tried: Any = [[steps] * len(opened)] if steps else [range(3, 3 + len(opened)), [2] * len(opened), [5] * len(opened)]
    for sizes in tried:
        chosen: dict[Any, int] = dict(zip(opened, sizes, strict=True))
        drawn = []
        for value in values:
            shape: Any = [chosen.get(size, size) for size in value.shape]
            dtype = DRAWN[value.type]
            if dtype.is_floating_point:
                drawn.append(torch.randn(shape, generator=generator).to(dtype))
            else:  # numbers that lengths, and places in a table, may be
                drawn.append(torch.randint(1, 3, shape, generator=generator).to(dtype))
        yield tuple(drawn)


def _within(size: int, limits: Any) -> int:
    if limits is None:
        return size
    if limits.upper < size:
        return int(limits.upper)
    return int(limits.lower) if limits.lower > size else size


def _lengths(like: Tensor, shape: list[int], steps: int, falling: bool, generator: torch.Generator) -> Tensor:
    """Draw lengths up to `steps`, of which the first is the longest that there may be."""
    lengths = torch.randint(1, steps + 1, shape, generator=generator)
    lengths[:1] = steps
    return (lengths.sort(descending=True).values if falling else lengths).to(like)


def _drawn(like: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    """Draw values as those of `like`: normal with its mean and spread, or picked among its integers."""
    like = like.detach().cpu()
    if like.is_floating_point():
        mean, spread = (like.double().mean(), like.double().std(correction=0)) if like.numel() else (0.0, 1.0)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (mean + (spread if spread else 1.0) * noise).to(like.dtype)
    if like.is_complex() or not like.numel():
        return torch.zeros(shape, dtype=like.dtype)
    return like.flatten()[torch.randint(like.numel(), shape, generator=generator)]


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
