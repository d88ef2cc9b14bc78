"""Sizes that are known, or only when the model runs, and what depends on them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from unroll.core.weights import Tensorlike
from unroll.onnx.writer import OnnxWriter

STORED = 2**16
"""The zeros that may be in a file: more are expanded when it runs"""


def zeros(writer: OnnxWriter, batch: Tensorlike, size: int, dtype: torch.dtype) -> Tensorlike:
    """Return zeros `[B, size]`, for `B` of shape `[1]`."""
    if batch.known and batch.known[0] * size <= STORED:
        return stored_zeros(writer, batch.known[0], size, dtype)
    return expanded_zeros(writer, batch, size, dtype)


def expanded_zeros(writer: OnnxWriter, batch: Tensorlike, size: int, dtype: torch.dtype) -> Tensorlike:
    """Return the same, made when the model runs, for a file whose size does not depend on `B`."""
    zero = writer.operand(0.0, dtype)
    assert zero is not None
    made = writer.op("Expand", writer.value(zero, dtype, 0), shape_of(writer, batch, size), dtype=dtype, rank=2)
    made.width = size
    return made


def stored_zeros(writer: OnnxWriter, batch: int, size: int, dtype: torch.dtype) -> Tensorlike:
    """Return zeros `[batch, size]` that are in the file."""
    name = f"{writer.layer}.zeros.{batch}x{size}"
    make = partial(writer.stored, torch.zeros(batch, size, dtype=dtype), name)
    return writer.value(writer.constants.get((name, dtype), make), dtype, 2)


def numbers_to(writer: OnnxWriter, end: Tensorlike) -> Tensorlike:
    """Return the numbers from zero to before `end`, of shape `[1]`."""
    zero, one = (writer.operand(n, torch.int64) for n in (0, 1))
    assert zero is not None and one is not None
    end = writer.op("Squeeze", end, rank=0)
    return writer.op("Range", writer.value(zero, torch.int64, 0), end, writer.value(one, torch.int64, 0), rank=1)


def shape_of(writer: OnnxWriter, *sizes: Tensorlike | list[int] | int) -> Tensorlike:
    """Return a shape made of sizes known now and of others known when the model runs."""
    return writer.op("Concat", *([s] if isinstance(s, int) else s for s in sizes), rank=1, attributes={"axis": 0})


def reshape_to(writer: OnnxWriter, value: Tensorlike, *sizes: Tensorlike | int, batch: int) -> Tensorlike:
    """Reshape a value to these sizes, of which that of the axis `batch` may be zero."""
    # Before version 14, a zero would stand for the size that the value has on that axis.
    known = [-1 if axis == batch and writer.opset < 14 else size for axis, size in enumerate(sizes)]
    return reshape_by(writer, value, shape_of(writer, *known), rank=len(sizes))


def reshape_by(writer: OnnxWriter, value: Tensorlike, shape: Tensorlike, rank: int) -> Tensorlike:
    """Reshape a value to a shape from `shape_of`."""
    attributes = {"allowzero": 1} if writer.opset >= 14 else None
    return writer.op("Reshape", value, shape, dtype=value.dtype, rank=rank, attributes=attributes)


def gather(writer: OnnxWriter, table: Any, indices: Tensorlike) -> Tensorlike:
    """Return the entries of a table, `[n]`, at `indices`."""
    return writer.op("Gather", table, indices, dtype=torch.int64, rank=indices.rank, attributes={"axis": 0})


def require_count(writer: OnnxWriter, value: Tensorlike, count: Tensorlike, axis: int) -> Tensorlike:
    """Return the value, by an operator that fails unless it has `count` of them, of shape `[1]`, on an axis."""
    return writer.op("Split", value, count, attributes={"axis": axis})
