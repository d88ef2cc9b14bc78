"""Random inputs of a model and of a file, on which the two are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from unroll.core.errors import Problems
from unroll.export.inputs import Leaf, lengths_among, limits_of, within


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
            sizes = {s: within(change(int(hints[s]), k), limits[s]) for k, s in enumerate(symbols)}
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


def varied_inputs(
    leaves: Sequence[Leaf], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Yield inputs on which what a trace has frozen shows: other values, signs and masks flipped, other open sizes.

    Whole numbers of one axis, which may be lengths, come as they are drawn and sorted falling; some are 0 or 1, with
    which padding and ends are marked. Open sizes keep to the bounds of their `Dim`; those computed from another follow
    it.
    """
    flat, spec = pytree.tree_flatten((args, kwargs))
    generator = torch.Generator().manual_seed(0)

    def made(tensors: Iterator[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return pytree.tree_unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in flat], spec)

    def drawn(sizes: Mapping[str, int], *, falling: bool) -> Iterator[Tensor]:
        for leaf in leaves:
            shape = [sizes[leaf.open[axis]] if axis in leaf.open else n for axis, n in enumerate(leaf.tensor.shape)]
            tensor = _drawn(_with_others(leaf.tensor), shape, generator).to(leaf.tensor.device)
            yield tensor.sort(descending=True).values if falling and tensor.dim() == 1 and _is_whole(tensor) else tensor

    yield made(_flipped(leaf.tensor) for leaf in leaves)
    for mark in (0, 1) if any(_is_whole(leaf.tensor) for leaf in leaves) else ():
        yield made(_marked(leaf.tensor, mark, generator) for leaf in leaves)
    sizes = {name: leaf.tensor.shape[axis] for leaf in leaves for axis, name in leaf.open.items()}
    dims = {name: dim for leaf in leaves for name, dim in leaf.dims.items()}

    def changed(change: Callable[[int, int], int]) -> dict[str, int]:
        found = {name: within(change(n, k), limits_of(dims[name])) for k, (name, n) in enumerate(sizes.items())}
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


def _is_whole(tensor: Tensor) -> bool:
    """Tell whether a tensor is of whole numbers."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)


def _with_others(like: Tensor) -> Tensor:
    """Return the values to draw from: an example's, and for one whole number or truth alone also others near it.

    A file in which a trace has kept that number is right for no other.
    """
    if like.is_floating_point() or like.is_complex() or not like.numel() or (like != like.flatten()[0]).any():
        return like
    value = like.flatten()[0].item()
    near = {not value} if like.dtype is torch.bool else {abs(value - 1), value // 2} - {value}
    return torch.tensor([*near, *[value] * (like.numel() > 1)], dtype=like.dtype)


def _marked(tensor: Tensor, mark: int, generator: torch.Generator) -> Tensor:
    """Return a tensor of whole numbers with a third of them another; others as they are."""
    if not _is_whole(tensor) or not tensor.numel():
        return tensor
    flat = tensor.flatten().clone()
    flat[torch.randperm(len(flat), generator=generator)[: -(-len(flat) // 3)]] = mark
    return flat.reshape(tensor.shape)


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
