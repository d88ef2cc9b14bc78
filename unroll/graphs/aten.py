"""The recipe on aten values: nodes of aten operators, each with the metadata that `torch.export` keeps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from unroll.core.values import Value
from unroll.graphs.writer import GraphWriter

aten = torch.ops.aten

OPERATORS: dict[Any, Any] = {
    torch.add: aten.add.Tensor,
    torch.addmm: aten.addmm.default,
    torch.arange: aten.arange.default,
    torch.baddbmm: aten.baddbmm.default,
    torch.bmm: aten.bmm.default,
    torch.cat: aten.cat.default,
    torch.clone: aten.clone.default,
    torch.cumsum: aten.cumsum.default,
    torch.flip: aten.flip.default,
    torch.Tensor.index_select: aten.index_select.default,
    torch.lt: aten.lt.Tensor,
    torch.matmul: aten.mm.default,
    torch.mul: aten.mul.Tensor,
    torch.neg: aten.neg.default,
    torch.ones_like: aten.ones_like.default,
    torch.relu: aten.relu.default,
    torch.reshape: aten.reshape.default,
    torch.searchsorted: aten.searchsorted.Tensor,
    torch.Tensor.select: aten.select.int,
    torch.sigmoid: aten.sigmoid.default,
    torch.stack: aten.stack.default,
    torch.sub: aten.sub.Tensor,
    torch.sum: aten.sum.dim_IntList,
    torch.tanh: aten.tanh.default,
    torch.transpose: aten.transpose.int,
    torch.unsqueeze: aten.unsqueeze.default,
    torch.where: aten.where.self,
    functional.dropout: aten.dropout.default,
    functional.linear: aten.linear.default,
}
"""The functions of the recipe that are one operator"""


class MetadataCache:
    """Runs operators on fake tensors, once for each operator and kind of operands, and remembers the result.

    A kind is shape, strides, dtype and device. All values of one kind share one fake tensor, so that
    the steps of a layer after the first cost a look-up each.
    """

    def __init__(self) -> None:
        self.kinds: dict[Any, FakeTensor] = {}
        # The ids of the values of `kinds`, which keeps them alive.
        self.ours: set[int] = set()
        self.results: dict[Any, Any] = {}
        self.mode: Any = None

    def kind(self, value: Any) -> Any:
        """Return the fake tensor that stands for all of this kind; anything else as it is."""
        if isinstance(value, (list, tuple)):
            return [self.kind(part) for part in value]
        if not isinstance(value, FakeTensor) or id(value) in self.ours:
            return value
        key = (*map(str, value.shape), "|", *map(str, value.stride()), value.dtype, value.device)
        if key not in self.kinds:
            self.mode = self.mode or value.fake_mode
            if value.fake_mode is not self.mode:  # `make_fx` has one for each value
                with self.mode:
                    value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
            self.kinds[key] = value
            self.ours.add(id(value))
        return self.kinds[key]

    def like(self, tensor: torch.Tensor) -> FakeTensor:
        """Return the metadata of a tensor that is none of the graph's values so far."""
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)  # pyright: ignore[reportReturnType]

    def of(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the metadata of `target(*args, **kwargs)`, for nodes among the arguments."""
        if target is operator.getitem:
            return args[0].meta["val"][args[1]]
        operands = self._operands(args)
        key = (target, _key(operands), *kwargs.values())
        if key not in self.results:
            mode = self.mode
            # The shapes follow from those of the operands: nothing new is to be learned, or required, of them.
            unguarded = mode.shape_env.suppress_guards() if mode.shape_env else nullcontext()
            # Some operators compute theirs in Python, by others that take symbolic sizes only there.
            with mode, torch.no_grad(), unguarded, enable_python_dispatcher():
                self.results[key] = self.kind(target(*operands, **kwargs))
        return self.results[key]

    def _operands(self, args: Any) -> Any:
        if isinstance(args, fx.Node):
            return self.kind(args.meta["val"])
        return [self._operands(arg) for arg in args] if isinstance(args, (list, tuple)) else args


def _key(operands: Any) -> Any:
    """Make a key of operands, in which a fake tensor has its `id`: there is one for each kind."""
    if isinstance(operands, list):
        return tuple(map(_key, operands))
    return id(operands) if isinstance(operands, FakeTensor) else operands


class AtenWriter(GraphWriter):
    """Writes nodes of aten operators."""

    def __init__(self, layer: str, graph: fx.Graph, meta: Mapping[str, Any], metadata: MetadataCache) -> None:
        super().__init__(layer, graph, meta)
        self.metadata = metadata

    def node(
        self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None, name: str | None = None
    ) -> fx.Node:
        if isinstance(target, torch._ops.OpOverload):
            name = name or self.name(target._schema.name.partition("::")[2])
        node = super().node(op, target, args, kwargs, name)
        if isinstance(target, torch._ops.OpOverload) or (target is operator.getitem and "val" in args[0].meta):
            node.meta["val"] = self.metadata.of(target, args, kwargs or {})
        elif op == "get_attr":
            node.meta["val"] = self.metadata.like(operator.attrgetter(target)(self.graph.owning_module))
        if target is aten.linear.default:  # by which quantizers of PT2E find it
            node.meta["source_fn_stack"] = [*node.meta.get("source_fn_stack", ()), (node.name, functional.linear)]
        return node

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is torch.Tensor.to:
            keyword = "dtype" if isinstance(args[1], torch.dtype) else "device"
            return self.value("call_function", aten._to_copy.default, args[:1], {keyword: args[1]})
        if func is torch.chunk:
            return self._chunk(*args)
        if func is torch.split:
            split = self.value("call_function", aten.split_with_sizes.default, (*args, *kwargs.values()))
            return self.items(split, len(args[1]))
        return self.value("call_function", OPERATORS[func], args, kwargs)

    def _chunk(self, value: Value, count: int, dim: int = 0) -> list[Value]:
        shape = value.node.meta["val"].shape
        if not dim and (whole := _flattened(value.node, count)):
            # [count, rows, ...], as states are: sizes that are computed would be bounds of another export
            parts = self.value("call_function", aten.unbind.int, (Value(self, node=whole),))
        elif dim:
            parts = self.value("call_function", aten.split.Tensor, (value, shape[dim] // count, dim))
        else:  # so that rows of any number are divided without knowing how many
            # [count, rows, ...]; a symbolic size is left to reshape, as -1.
            sizes = [size if isinstance(size, int) else -1 for size in (count, shape[0] // count, *shape[1:])]
            stacked = self.value("call_function", aten.reshape.default, (value, sizes))
            parts = self.value("call_function", aten.unbind.int, (stacked,))
        return self.items(parts, count)

    def index(self, value: Value, index: tuple[Any, ...]) -> Value:
        # From the last dimension, so that a dimension that goes does not move those still to come.
        for dim, part in reversed(list(enumerate(index))):
            if isinstance(part, int):
                value = self.value("call_function", aten.select.int, (value, dim, part))
            elif part != slice(None):
                args = (value, dim, part.start, part.stop, part.step or 1)
                value = self.value("call_function", aten.slice.Tensor, args)
        return value


def _flattened(node: fx.Node, count: int) -> fx.Node | None:
    """Return the tensor `[count, rows, ...]` that a node makes `[count * rows, ...]` of, if it does."""
    whole = node.args[0] if node.target is aten.reshape.default else None
    if not isinstance(whole, fx.Node):
        return None
    (first, *rest), shape = whole.meta["val"].shape, node.meta["val"].shape
    return whole if isinstance(first, int) and first == count and tuple(rest[1:]) == tuple(shape[1:]) else None


def writer_for(call: fx.Node, metadata: MetadataCache) -> Callable[[str, fx.Graph, Mapping[str, Any]], GraphWriter]:
    """Choose the writer for the dialect that a call is written in."""
    described = all(isinstance(node.meta.get("val"), FakeTensor) for node in call.all_input_nodes)
    if described and isinstance(call.target, torch._ops.OpOverload):
        metadata.mode = metadata.mode or call.all_input_nodes[0].meta["val"].fake_mode
        return lambda layer, graph, meta: AtenWriter(layer, graph, meta, metadata)
    return GraphWriter
