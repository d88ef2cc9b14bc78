"""Sizes of values of an ONNX graph that are the same in every run, as they come from one place."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from unroll.onnx.constants import known_tensor

Origin = int | tuple[ir.Value, int] | None
"""A size: its number, a value and the axis that has it, or None if nothing tells it"""

KEEPING = {"Cast", "Clip", "Dropout", "Elu", "Gelu", "Identity", "LayerNormalization", "LeakyRelu", "Neg", "Relu"}
KEEPING |= {"Sigmoid", "Softmax", "Softplus", "Tanh"}
"""Operators whose first result has the shape of their first input"""


def origin(value: ir.Value, axis: int) -> Origin:
    """Return the origin of the size of a value on an axis, counted from the first."""
    tensor = known_tensor(value)
    if tensor is not None:
        return tensor.shape[axis] if axis < tensor.ndim else None
    node = value.producer()
    first = node.inputs[0] if node is not None and node.domain == "" and node.inputs else None
    if node is None or first is None:
        return value, axis
    if node.op_type in KEEPING and value is node.outputs[0]:
        return origin(first, axis)
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return origin(first, node.attributes["perm"].as_ints()[axis])
    if node.op_type == "ConstantOfShape":
        return entry(first, axis)
    if node.op_type == "Expand" and (shape := node.inputs[1]) is not None:
        rank, count = _rank(first), _length(shape)
        if rank is None or count is None or rank > count:
            return value, axis
        own = origin(first, axis - count + rank) if axis >= count - rank else 1
        wanted = entry(shape, axis)
        return wanted if own == 1 else own if own == wanted or wanted == 1 else (value, axis)
    if node.op_type == "Gather" and (indices := node.inputs[1]) is not None and not _attribute(node, "axis"):
        rank = _rank(indices)
        if rank is not None and axis < rank:
            return origin(indices, axis)
    return value, axis


def entry(shape: ir.Value, k: int) -> Origin:
    """Return the origin of the number at `k` in a 1-D value, or of a scalar's, for `k` zero."""
    tensor = known_tensor(shape)
    if tensor is not None:
        return int(tensor.flatten()[k]) if 0 <= k < tensor.numel() else None
    node = shape.producer()
    first = node.inputs[0] if node is not None and node.domain == "" and node.inputs else None
    if node is None or first is None:
        return None
    if node.op_type == "Shape":
        start = _attribute(node, "start") or 0
        return origin(first, start + k) if start >= 0 else None
    if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
        return entry(first, k)
    if node.op_type == "Reshape":
        return entry(first, k) if k == 0 and _length(first) == 1 else None
    if node.op_type == "Gather" and not _attribute(node, "axis"):
        index = entry(node.inputs[1], k) if node.inputs[1] is not None else None
        return entry(first, index) if isinstance(index, int) and index >= 0 else None
    if node.op_type == "Slice":
        numbers = [None if value is None else known_tensor(value) for value in node.inputs[1:]]
        if any(n is None or n.numel() != 1 for n in numbers) or (len(numbers) == 4 and int(numbers[3]) != 1):  # pyright: ignore[reportArgumentType]
            return None
        begin = int(numbers[0])  # pyright: ignore[reportArgumentType]
        return entry(first, begin + k) if begin >= 0 else None
    return _entry_of_joined(node.inputs, k) if node.op_type == "Concat" else None


def _entry_of_joined(parts: Sequence[ir.Value | None], k: int) -> Origin:
    for part in parts:
        count = None if part is None else _length(part)
        if part is None or count is None:
            return None
        if k < count:
            return entry(part, k)
        k -= count
    return None


def _length(value: ir.Value) -> int | None:
    """Return how many numbers a value has, one for a scalar, if that is known."""
    tensor = known_tensor(value)
    if tensor is not None:
        return tensor.numel()
    if value.shape is not None and value.shape.is_static():
        count = 1
        for n in value.shape.numpy():
            count *= n
        return count
    node = value.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type in ("Identity", "Cast", "Squeeze", "Unsqueeze"):
        return _length(node.inputs[0])
    if node.op_type == "Gather" and node.inputs[1] is not None:
        return _length(node.inputs[1])
    if node.op_type == "Concat":
        counts = [None if part is None else _length(part) for part in node.inputs]
        return None if None in counts else sum(filter(None, counts))
    return None


def _rank(value: ir.Value) -> int | None:
    if value.shape is not None:
        return len(value.shape)
    tensor = known_tensor(value)
    return None if tensor is None else tensor.ndim


def _attribute(node: ir.Node, name: str) -> int | None:
    return node.attributes[name].as_int() if name in node.attributes else None
