"""Values on which the recipe writes nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch.nn import functional

from unroll.core.forms import Form
from unroll.core.values import Writer
from unroll.onnx.values import FOLDED, Constants, OnnxValue, folded

SAME_NAME = {
    torch.add: "Add",
    torch.sub: "Sub",
    torch.mul: "Mul",
    torch.bmm: "MatMul",
    torch.where: "Where",
    torch.sigmoid: "Sigmoid",
    torch.tanh: "Tanh",
    torch.relu: "Relu",
    functional.softsign: "Softsign",
    functional.softplus: "Softplus",
}
"""Functions that take the arguments of an ONNX operator, in its order."""

TENSORS = (OnnxValue, torch.Tensor)


class OnnxWriter(Writer):
    """Writes nodes of one layer for an ONNX graph, to be inserted where they belong when all are made.

    Args:
        layer: with what all names begin.
        constants: where tensors that are known already are stored.
        opset: version of the standard's operators in the model.
        taken: names that are in the model already.
        form: the operators to take where there are several.
    """

    differentiable = False

    def __init__(self, layer: str, constants: Constants, opset: int, taken: set[str], form: Form) -> None:
        super().__init__(layer)
        self.form = form
        self.constants = constants
        self.opset = opset
        self.taken = taken
        self.made: list[ir.Node] = []
        self.unnamed: list[ir.Value] = []  # outputs that get a name when they are read
        self.tensor_names: dict[int, tuple[torch.Tensor, str]] = {}
        self.transposes: dict[OnnxValue, OnnxValue] = {}
        self.numbers: dict[str, int] = {}
        self.outer: OnnxWriter | None = None
        self.depth = 0

    def inner(self) -> OnnxWriter:
        """Return a writer for the body of a loop in the same layer, which names things as this one does."""
        writer = OnnxWriter(self.layer, self.constants, self.opset, self.taken, self.form)
        writer.numbers, writer.tensor_names = self.numbers, self.tensor_names
        writer.outer, writer.depth = self, self.depth + 1
        return writer

    def name(self, what: str) -> str:
        return super().name(what) if self.outer is None else self.outer.name(what)

    def __call__(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            self.tensor_names[id(value)] = value, self.name(name)
            return value
        return super().__call__(value, name)

    def unique(self, name: str) -> str:
        """Return the name, with a number if it is taken."""
        candidate = name
        while candidate in self.taken:
            self.numbers[name] = self.numbers.get(name, 0) + 1
            candidate = f"{name}.{self.numbers[name]}"
        self.taken.add(candidate)
        return candidate

    def value(self, node: Any, dtype: torch.dtype, rank: int) -> Any:
        """Return a stand-in for a value that is in the graph already."""
        return OnnxValue(self, node=node, dtype=dtype, rank=rank)

    def op(
        self,
        kind: str,
        *inputs: Any,
        dtype: torch.dtype | None = None,
        rank: int | None = None,
        attributes: dict[str, Any] | None = None,
    ) -> Any:
        """Return the result of an operator; its type is that of the first input that is not boolean, if not given.

        Inputs may be values, tensors, numbers (of that type), lists of integers, or None.
        """
        if kind in FOLDED and (numbers := folded(kind, inputs)) is not None:
            return self.numbers_of(numbers)
        # Numbers among the operands get the type of this one.
        like = inputs[0]
        if not isinstance(like, OnnxValue) or like.dtype is torch.bool:
            values = [v for v in inputs if isinstance(v, OnnxValue)]
            like = next((v for v in values if v.dtype is not torch.bool), values[0])
        of = like.dtype

        def write(name: str | None) -> ir.Value:
            operands = [v.node if isinstance(v, OnnxValue) else self.operand(v, of) for v in inputs]
            return self.node(kind, operands, [name or self.name(kind.lower())], attributes)[0]

        return OnnxValue(self, write, dtype=dtype or of, rank=like.rank if rank is None else rank)

    def numbers_of(self, numbers: list[int]) -> Any:
        """Return a stand-in for integers that are known, `[n]`; no node is written for what is computed of them."""

        def write(name: str | None) -> Any:
            return self.operand(numbers, torch.int64)

        value = OnnxValue(self, write, dtype=torch.int64, rank=1)
        value.known = numbers
        return value

    def node(
        self, kind: str, inputs: Sequence[ir.Value | None], names: Sequence[str | None], attributes: Any = None
    ) -> Sequence[ir.Value]:
        """Write a node and return its outputs. One called None gets its name later."""
        outputs = [ir.Value(name=None if name is None else self.unique(name)) for name in names]
        if None in names:
            self.unnamed += [output for output in outputs if output.name is None]
        name = outputs[0].name or self.unique(self.name(kind.lower()))
        converted = ir.convenience.convert_attributes(attributes) if attributes else ()
        self.made.append(ir.Node("", kind, inputs, converted, outputs=outputs, name=name))
        return outputs

    def operand(self, value: Any, dtype: torch.dtype) -> ir.Value | None:
        """Return what a node reads for a value, a tensor, a number or a list of integers."""
        if value is None:
            return None
        if isinstance(value, OnnxValue):
            return value.node
        if isinstance(value, torch.Tensor):
            # Known by its id, which no other object gets while the tensor is kept.
            return self.constants.get(id(value), lambda: self.stored(value, self._name_of(value)), keep=value)
        tensor = torch.tensor(value, dtype=torch.int64 if isinstance(value, (list, tuple)) else dtype)
        text = "x".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        short = text if len(text) < 40 else f"{tensor.numel()}_numbers"
        name = f"{self.layer}.{str(tensor.dtype).removeprefix('torch.')}.{short or 'empty'}"
        return self.constants.get((tensor.dtype, text, tensor.dim()), lambda: self.stored(tensor, name))

    def _name_of(self, tensor: torch.Tensor) -> str:
        _, name = self.tensor_names.get(id(tensor)) or (None, self.name("constant"))
        return name

    def stored(self, tensor: torch.Tensor, name: str) -> Any:
        """Return what the file holds of a tensor."""
        return tensor_adapters.TorchTensor(tensor.detach().cpu().contiguous(), name=self.unique(name))

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        writer = self._innermost(args)
        kind = SAME_NAME.get(func)
        if kind is not None:
            ranks = [arg.rank if isinstance(arg, OnnxValue) else arg.dim() for arg in args if isinstance(arg, TENSORS)]
            return writer.op(kind, *args, rank=max(ranks))
        return CALLS[func](writer, *args, **kwargs)

    def _innermost(self, args: Sequence[Any]) -> OnnxWriter:
        """Return the writer of the innermost body among arguments: what reads a value of it belongs there."""
        writer = self
        for arg in args:
            if isinstance(arg, OnnxValue):
                arg_writer = arg.writer
            elif isinstance(arg, (list, tuple)):
                arg_writer = writer._innermost(arg)
            else:
                continue
            if arg_writer.depth > writer.depth:
                writer = arg_writer
        return writer

    def transposed(self, weight: Any) -> Any:
        """Return a weight `[in, out]` of one `[out, in]`; of a constant another constant, once for all who read it."""
        if isinstance(weight, OnnxValue):
            written = weight.writer.transposes
            if weight not in written:
                written[weight] = _transpose(weight.writer, weight, 0, 1)
            return written[weight]
        name = self._name_of(weight)
        stored = self.constants.get(("transposed", id(weight)), lambda: self.stored(weight.T, name), keep=weight)
        return self.value(stored, weight.dtype, 2)

    def chunk(self, value: OnnxValue, count: int, dim: int = 0) -> list[Any]:
        """Return as many equal pieces, in the form that the file's runtime wants."""
        if dim or count == 1 or self.form.rows == "split" or (value.rank != 2 and value.count is None):
            return self.split(value, count, dim)
        if value.rank == 2:  # [T, B, n], so that B may stay open
            whole = self._stacked_rows(value, count)
            return [_selected(self, whole, 0, k) for k in range(count)]
        each = (value.count or 0) // count
        indices = ([*range(k * each, (k + 1) * each)] for k in range(count))
        return [self.op("Gather", value, list(index), attributes={"axis": 0}) for index in indices]

    def _stacked_rows(self, rows: OnnxValue, count: int) -> OnnxValue:
        """Return rows as `[count, B, n]`."""
        if isinstance(rows.features, int):
            return _reshape(self, rows, (count, -1, rows.features))
        width = self.op("Slice", self.op("Shape", rows, dtype=torch.int64, rank=1), [1], [2], rank=1)
        return self.op("Reshape", rows, self.op("Concat", [count, -1], width, attributes={"axis": 0}), rank=3)

    def split(self, value: OnnxValue, sizes: int | Sequence[int], dim: int = 0) -> list[OnnxValue]:
        """Split into as many equal pieces, or pieces of these sizes, by one node whose outputs are named one by one."""
        count = sizes if isinstance(sizes, int) else len(sizes)
        attributes: dict[str, Any] = {"axis": dim % value.rank}
        if isinstance(sizes, int) and self.opset >= 18:
            attributes["num_outputs"] = count
        outputs: list[ir.Value] = []  # of the node, once a piece is read

        def write(k: int, name: str | None) -> ir.Value:
            if not outputs:
                lengths = [] if isinstance(sizes, int) else [self.operand(list(sizes), torch.int64)]
                outputs.extend(self.node("Split", [value.node, *lengths], [None] * count, attributes))
            outputs[k].name = self.unique(name or self.name(f"split.{k}"))
            return outputs[k]

        return [
            OnnxValue(self, lambda name, k=k: write(k, name), dtype=value.dtype, rank=value.rank) for k in range(count)
        ]


def _cast(writer: OnnxWriter, value: OnnxValue, dtype: torch.dtype) -> OnnxValue:
    if value.dtype is dtype:
        return value
    return writer.op("Cast", value, dtype=dtype, attributes={"to": tensor_adapters.from_torch_dtype(dtype)})


def _product(writer: OnnxWriter, x: OnnxValue, weight: Any) -> OnnxValue:
    product = writer.op("MatMul", x, weight)
    product.features = None if isinstance(weight, OnnxValue) else weight.shape[-1]
    return product


def _plus(writer: OnnxWriter, product: OnnxValue, addend: Any) -> OnnxValue:
    total = writer.op("Add", product, addend)
    total.features = product.features
    return total


def _added_product(writer: OnnxWriter, addend: Any, x: OnnxValue, weight: Any) -> OnnxValue:
    product = _product(writer, x, weight)
    if writer.form.addend == "outside":
        return _plus(writer, product, addend)
    total = writer.op("Gemm", x, weight, addend)
    total.features = product.features
    return total


def _linear(writer: OnnxWriter, x: OnnxValue, weight: Any, bias: Any) -> OnnxValue:
    product = _product(writer, x, writer.transposed(weight))
    product.features = None if isinstance(weight, OnnxValue) else weight.shape[0]
    return product if bias is None else _plus(writer, product, bias)


def _transpose(writer: OnnxWriter, value: OnnxValue, first: int, second: int) -> OnnxValue:
    order = list(range(value.rank))
    order[first], order[second] = order[second], order[first]
    return writer.op("Transpose", value, attributes={"perm": order})


def _reshape(writer: OnnxWriter, value: OnnxValue, shape: Sequence[int]) -> Any:
    """Reshape, but leave rows that stay rows: a second Reshape would let ONNX Runtime drop the first."""
    if value.width is not None and tuple(shape) == (-1, value.width):
        return value
    result = writer.op("Reshape", value, list(shape), rank=len(shape))
    result.count = shape[0] if shape[0] > 0 else None
    result.features = shape[-1] if shape[-1] > 0 else None
    return result


def _joined(writer: OnnxWriter, values: Sequence[Any], dim: int = 0) -> Any:
    rank = next(v.rank for v in values if isinstance(v, OnnxValue))
    most = writer.form.most
    if most and len(values) > most:  # the parts of all levels are as even as they can be
        ends = [len(values) * k // most for k in range(most + 1)]
        values = [_joined(writer, values[start:end], dim) for start, end in pairwise(ends)]
    return values[0] if len(values) == 1 else writer.op("Concat", *values, attributes={"axis": dim % rank})


def _stacked(writer: OnnxWriter, values: Sequence[Any], dim: int = 0) -> Any:
    rank = next(v.rank for v in values if isinstance(v, OnnxValue))
    axes = [dim % (rank + 1)]
    apart = [torch.unsqueeze(v, dim) if isinstance(v, torch.Tensor) else _unsqueezed(writer, v, axes) for v in values]
    return _joined(writer, apart, dim)


def _unsqueezed(writer: OnnxWriter, value: OnnxValue, axes: list[int]) -> Any:
    if writer.opset < 13:
        return writer.op("Unsqueeze", value, rank=value.rank + 1, attributes={"axes": axes})
    return writer.op("Unsqueeze", value, axes, rank=value.rank + 1)


def _summed(writer: OnnxWriter, value: OnnxValue, dims: list[int]) -> Any:
    """Sum over axes, which stay until they are squeezed: OpenVINO gets a ReduceSum that drops them wrong."""
    axes = [dim % value.rank for dim in dims]
    total = writer.op("ReduceSum", value, axes, attributes={"keepdims": 1})
    return writer.op("Squeeze", total, axes, rank=value.rank - len(axes))


def _flipped(writer: OnnxWriter, value: OnnxValue, dims: list[int]) -> Any:
    """Flip the first axis, of a size that is known, by indices: not all runtimes have steps of -1."""
    assert dims == [0] and value.count is not None
    return writer.op("Gather", value, [*reversed(range(value.count))], attributes={"axis": 0})


def _selected(writer: OnnxWriter, value: OnnxValue, dim: int, index: int) -> Any:
    place = writer.value(writer.operand(index, torch.int64), torch.int64, 0)
    attributes = {"axis": dim}
    result = writer.op("Gather", value, place, dtype=value.dtype, rank=value.rank - 1, attributes=attributes)
    result.count = value.count if dim else None
    return result


CALLS: dict[Callable, Callable[..., Any]] = {
    torch.addmm: _added_product,
    torch.matmul: _product,
    torch.baddbmm: lambda writer, bias, x, weight: writer.op("Add", writer.op("MatMul", x, weight), bias),
    torch.ge: lambda writer, x, y: writer.op("GreaterOrEqual", x, y, dtype=torch.bool),
    torch.clamp: lambda writer, x, low, high: writer.op("Clip", x, low, high),
    functional.linear: _linear,
    functional.leaky_relu: lambda writer, x, negative_slope, **_: writer.op(
        "LeakyRelu", x, attributes={"alpha": negative_slope}
    ),
    functional.elu: lambda writer, x, alpha, **_: writer.op("Elu", x, attributes={"alpha": alpha}),
    torch.split: OnnxWriter.split,
    torch.chunk: OnnxWriter.chunk,
    torch.cat: _joined,
    torch.stack: _stacked,
    torch.sum: _summed,
    torch.unsqueeze: lambda writer, value, dim: _unsqueezed(writer, value, [dim % (value.rank + 1)]),
    torch.flip: _flipped,
    torch.Tensor.select: _selected,
    torch.reshape: _reshape,
    torch.transpose: _transpose,
    torch.Tensor.to: _cast,
}
"""The other functions of the recipe."""
