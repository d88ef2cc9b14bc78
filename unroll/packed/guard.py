"""Watches what models do with rows of which some are padding, and refuses what may mix them.

`mark` and `unmark` say where such rows come from, and where they go to what knows of the padding. In plain Python
tensors are followed as a model runs; Dynamo leaves the two as nodes in its graph, which is then read and rid of them.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from unroll.core import patching
from unroll.core.alone import alone
from unroll.core.errors import Problem, UnrollError
from unroll.core.patching import Local, patched
from unroll.packed.row_rules import NEW, Seen, mixes_rows

PLACE = "packed.data"

FIX = "do it before packing or after padding, or rewrite the FX graph, where rows stay packed"

_PADDED = WeakTensorKeyDictionary()
"""Tensors with rows of padding among their rows"""

GUARDED: Local[bool] = Local("guarded")
"""True in a thread whose exports are watched"""

CAPTURED: Local[bool] = Local("captured")
"""True in a thread while a graph is made of what runs in it as plain Python"""


def mark(rows: Tensor) -> Tensor:
    """Have these rows watched, some of which are padding, and return them."""
    _PADDED[rows] = True
    return rows


def unmark(rows: Tensor) -> Tensor:
    """Watch these rows no more, for what knows of the padding; where they have other uses, `mark` must follow."""
    _PADDED.pop(rows, None)
    return rows


def _refused(name: str) -> UnrollError:
    return UnrollError(Problem(PLACE, f"is given to {name}, which may mix its rows, some of them padding", FIX))


def _leak() -> UnrollError:
    return UnrollError(Problem(PLACE, "leaves the model, with rows of padding among its rows", FIX))


class PaddingGuard(TorchFunctionMode):
    """Follows padded rows through what runs as plain Python: while a graph is made of it, or else while none is."""

    def __init__(self, *, graphs: bool) -> None:
        super().__init__()
        self.graphs = graphs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # a loop, which torch.export has Dynamo read by itself; and what is another guard's, or no one's
        if torch.compiler.is_dynamo_compiling() or bool(CAPTURED.value) != self.graphs:
            return func(*args, **kwargs)
        if func is torch.as_tensor and isinstance(args[0], (list, tuple)) and _any_symbolic(args[0]):
            return torch.stack([torch.scalar_tensor(value, **kwargs) for value in args[0]])  # lengths.tolist()
        if not _any_padded((*args, *kwargs.values())):
            return func(*args, **kwargs)
        seen, seen_kwargs = pytree.tree_map_only(Tensor, lambda t: Seen(t.shape, t in _PADDED), (args, kwargs))
        name = _name(func)
        if mixes_rows(name, seen, seen_kwargs):
            raise _refused(name)
        result = func(*args, **kwargs)
        # what is made of padded rows has padded rows
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and name not in NEW:
                mark(tensor)
        return result


def _any_symbolic(values: Any) -> bool:
    return any(isinstance(value, torch.SymInt) for value in values)


def _any_padded(values: Any) -> bool:
    return any(
        value in _PADDED if isinstance(value, Tensor) else isinstance(value, (list, tuple)) and _any_padded(value)
        for value in values
    )


def _name(function: Any) -> str:
    """Name a function as the table of rules does: `add` for `Tensor.add_`, `Tensor.__add__` and `aten.add.Tensor`."""
    name = getattr(function, "__name__", str(function))
    if name in ("__get__", "__set__"):  # of an attribute
        name = function.__self__.__name__
    return name.partition(".")[0].strip("_")


@contextmanager
def guard_export() -> Iterator[None]:
    """Watch models that `torch.export` runs as plain Python while this lasts."""
    from torch.export import _trace

    export = patching.original(_trace, "_export")

    def checked(model: nn.Module, *args: Any, strict: bool = False, **kwargs: Any) -> Any:
        if GUARDED.value is None:
            return export(model, *args, strict=strict, **kwargs)
        with alone(exports=True), nullcontext() if strict else guard_run(model):
            return export(model, *args, strict=strict, **kwargs)

    with GUARDED.set(True), patched(_trace, _export=checked):
        yield


@contextmanager
def guard_run(model: nn.Module) -> Iterator[None]:
    """Watch what the model runs as plain Python, for a graph, while this lasts; it may return no padded rows."""
    forward = model.forward

    @functools.wraps(forward)
    def checked(*args: Any, **kwargs: Any) -> Any:
        results = forward(*args, **kwargs)
        if CAPTURED.value and _any_padded(_tensors(results)):
            raise _leak()
        return results

    with CAPTURED.set(True), patched(model, forward=checked), PaddingGuard(graphs=True):
        yield


def _tensors(results: Any) -> list[Any]:
    return pytree.tree_leaves(results, is_leaf=lambda value: isinstance(value, PackedSequence))


@contextmanager
def guard_dynamo() -> Iterator[None]:
    """Watch graphs that Dynamo makes while this lasts."""
    from torch._dynamo.output_graph import OutputGraph

    compiled = patching.original(OutputGraph, "call_user_compiler")

    @functools.wraps(compiled)
    def checked(self: Any, graph: fx.GraphModule, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        check_graph(graph)
        return compiled(self, graph, *args, **kwargs)

    with patched(OutputGraph, call_user_compiler=checked):
        yield


def check_graph(module: fx.GraphModule) -> None:
    """Follow padded rows through a graph of Dynamo's, and take the marks out of it.

    Raises:
        UnrollError: where rows are mixed, or leave the graph.
    """
    graph = module.graph
    found: set[fx.Node] = set()  # with rows of padding in their values; nodes come after what they read
    for node in graph.nodes:
        if node.op == "output":
            if found.intersection(node.all_input_nodes):
                raise _leak()
        elif node.target is mark:
            found.add(node)
        elif node.target is not unmark and found.intersection(node.all_input_nodes):
            if _mixes(node, found):
                raise _refused(_target(node))
            # a result without tensors, such as a size, has no rows
            given = pytree.tree_leaves(node.meta.get("example_value"))
            if _target(node) not in NEW and any(isinstance(value, Tensor) for value in given):
                found.add(node)
    marks = [node for node in graph.nodes if node.target in (mark, unmark)]
    for node in marks:
        node.replace_all_uses_with(node.args[0])
    for node in reversed(marks):
        graph.erase_node(node)
    if marks:
        module.recompile()


def _target(node: fx.Node) -> str:
    if node.target is getattr:
        return str(node.args[1])
    name = node.target if isinstance(node.target, str) else _name(node.target)
    return name.strip("_")


def _mixes(node: fx.Node, found: set[fx.Node]) -> bool:
    """Tell whether a node that is given padded rows may mix them."""
    if node.op == "call_module":  # what it does is not in the graph
        return True
    if node.target is operator.getitem and not isinstance(node.args[0].meta.get("example_value"), Tensor):  # pyright: ignore
        return False  # one of several results

    def seen(given: fx.Node) -> Any:
        value = given.meta.get("example_value")
        return pytree.tree_map_only(Tensor, lambda t: Seen(t.shape, given in found), value)

    args, kwargs = fx.map_arg((node.args, node.kwargs), seen)
    # of an attribute the name stands for the function; see `_target`
    args = args[:1] if node.target is getattr else args
    return mixes_rows(_target(node), args, kwargs)
