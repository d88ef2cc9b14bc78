"""Plain operators in the place of a recurrent node."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from unroll.core import schedule
from unroll.core.layout import Layout
from unroll.core.plan import Plan
from unroll.core.scan import Rows
from unroll.core.weights import Tensorlike
from unroll.onnx import loops
from unroll.onnx.calls import Call
from unroll.onnx.constants import known_constant
from unroll.onnx.sizes import gather, numbers_to, require_count, reshape_by, shape_of, zeros
from unroll.onnx.writer import OnnxWriter

States = tuple[Tensorlike | None, ...]
"""A value for each state of the cell; None for zeros"""


class Lowering:
    """A node's replacement, in the graph of a writer."""

    def __init__(self, call: Call, writer: OnnxWriter) -> None:
        self.call, self.writer, self.recurrence = call, writer, call.recurrence

    def write(self, plan: Plan, prepared: dict[Any, Layout]) -> list[Tensorlike]:
        """Write what the node computes and return its results.

        Args:
            plan: how the steps are laid out.
            prepared: constant weights that other nodes laid out, for nodes that share them.
        """
        call, writer, recurrence = self.call, self.writer, self.recurrence
        writer.enter("given")
        x = writer.value(call.given, call.dtype, call.rank)
        self.steps, self.batch = self._sizes(x)
        for axis in call.guarded:
            x = self._guard(x, axis)
        rows = schedule.flat_rows(recurrence, x, batched=call.batched)
        given = state = self._count_rows(call.initial(writer))
        layout = self._lay_out(plan, prepared)
        wide = torch.float32 if layout.passes[0].precision else call.dtype
        looping = not recurrence.is_cell and (call.steps is None or plan.block is not None)
        lengths = self._lengths(looping=looping)
        padding = None if lengths is None else self._mask(lengths, looping=looping)
        if looping:
            dtypes = (call.dtype, wide)[: len(recurrence.state_sizes)]
            lead, block = (self.steps, self.batch), plan.block or 1
            writer.loop = loops.over_blocks(
                writer, recurrence, lead, layout.widths, dtypes, padding, steps=call.steps, block=block
            )
        elif padding is not None:
            state = self._write_zeros(state)  # a row without a step keeps its state, which must be there
        steps = call.steps or 1
        result = schedule.run(recurrence, layout, rows, state, steps=steps, mask=padding, target=writer)
        writer.enter("results")
        # Rows that have ended kept their state: it is no output.
        if padding is not None and lengths is not None and call.has_any_length:
            size = recurrence.output_size
            shown = [torch.where(padding, output.rows(), 0.0) for output in result.outputs]
            finals = self._zero_unstarted(lengths, given, result.finals)
            result = schedule.Result([Rows(rows, call.steps, size) for rows in shown], finals)
        return call.results(writer, result, (self.steps, self.batch))

    def _sizes(self, x: Tensorlike) -> tuple[Tensorlike, Tensorlike]:
        """Return T and B, each of shape `[1]`: of the running model, where they are not known before."""
        writer = self.writer
        shape = writer.op("Shape", x, dtype=torch.int64, rank=1)
        ranked = self.call.shape(self.call.given) is not None
        if not ranked:  # as many numbers in more axes would pass what follows
            shape = torch.reshape(shape, (self.call.rank,))

        def size(axis: int | None) -> Tensorlike:
            if axis is None:
                return writer.numbers_of([1])
            if known := self.call.known_size(axis):
                return writer.numbers_of(known)
            if writer.opset < 15 or not ranked:
                return writer.op("Gather", shape, [axis], rank=1)
            attributes = {"start": axis, "end": axis + 1}
            return writer.op("Shape", x, dtype=torch.int64, rank=1, attributes=attributes)

        return size(self.call.time), size(self.call.batch)

    def _guard(self, x: Tensorlike, axis: int) -> Tensorlike:
        """Return the input, by an operator that fails unless an axis has the size that is written out."""
        size = self.call.steps if axis == self.call.time else self.recurrence.input_size
        assert size is not None
        # A Split into one piece: two Reshapes in a row would be made one by ONNX Runtime, and pass.
        (piece,) = self.writer.split(x, [size], axis)
        return piece

    def _count_rows(self, state: States) -> States:
        """Return the states; where rows must be counted, an operator fails for another number than the input's."""
        writer, sizes = self.writer, self.recurrence.state_sizes
        count = self._rows_of_all()
        shapes = {size: shape_of(writer, count, size) for size in sizes}

        def counted(given: ir.Value | None, value: Tensorlike | None, size: int) -> Tensorlike | None:
            if value is None or given not in self.call.uncounted:
                return value
            # A Reshape counts if it allows zeros, as it can from version 14 on. Before, ONNX Runtime puts -1 for a size
            # that is not known; there a Split into one piece counts.
            if writer.opset < 14:
                return require_count(writer, value, self.batch, value.rank - 2)
            rows = reshape_by(writer, value, shapes[size], rank=2)
            rows.width = size
            return rows

        return tuple(map(counted, self.call.states, state, sizes))

    def _write_zeros(self, state: States) -> States:
        """Return the states, with zeros written out."""
        count, make = self._rows_of_all(), partial(zeros, self.writer)
        sizes = self.recurrence.state_sizes
        return tuple(make(count, size, self.call.dtype) if s is None else s for s, size in zip(state, sizes))

    def _rows_of_all(self) -> Tensorlike:
        """Return the number of rows of the states of all layers and directions, of shape `[1]`."""
        passes = self.recurrence.passes
        return self.batch if passes == 1 else self.writer.op("Mul", self.batch, [passes], rank=1)

    def _lengths(self, *, looping: bool) -> Tensorlike | None:
        """Return the lengths, `[B]`, of 64 bits; None if all rows have all steps."""
        call, writer = self.call, self.writer
        if call.lengths is None:
            return None
        given = writer.value(call.lengths, torch.int32, 1)
        lengths = writer.op("Cast", given, dtype=torch.int64, attributes={"to": 7})
        if call.lengths in call.uncounted:
            lengths = require_count(writer, lengths, self.batch, 0)
        checked = call.steps is not None and known_constant(call.lengths) is not None
        if checked or not call.has_any_length:
            return lengths
        # From a table of 0 to T, beyond which a Gather fails; below zero it would count from the end.
        if call.steps is None or looping:
            end = writer.op("Add", self.steps, [1], rank=1)
            table: Any = numbers_to(self.writer, end)
        else:
            end, table = [call.steps + 1], torch.arange(call.steps + 1)
        negative = writer.op("Less", lengths, 0, dtype=torch.bool)
        return gather(writer, table, writer.op("Where", negative, end, lengths))

    def _mask(self, lengths: Tensorlike, *, looping: bool) -> Tensorlike:
        """Return the mask `[T * B, 1]`, boolean, of the rows that have a step."""
        call, writer = self.call, self.writer
        if call.steps is not None and not looping:
            steps: Any = torch.arange(call.steps).reshape(-1, 1)
        else:
            steps = torch.reshape(numbers_to(self.writer, self.steps), (-1, 1))
        # [T, 1] < [1, B]
        going = writer.op("Less", steps, torch.reshape(lengths, (1, -1)), dtype=torch.bool, rank=2)
        return torch.reshape(going, (-1, 1))

    def _zero_unstarted(
        self, lengths: Tensorlike, given: States, finals: list[list[Tensorlike]]
    ) -> list[list[Tensorlike]]:
        """Return the last states, with zeros for rows without any step, which have kept the states that were given."""
        started = self.writer.op("Greater", torch.reshape(lengths, (-1, 1)), 0, dtype=torch.bool)
        return [
            parts if start is None else [torch.where(started, part, 0.0) for part in parts]
            for start, parts in zip(given, finals, strict=True)
        ]

    def _lay_out(self, plan: Plan, prepared: dict[Any, Layout]) -> Layout:
        """Return the weights as the steps want them, laid out once for nodes that share them."""
        call = self.call
        known = all(value is None or known_constant(value) is not None for value in call.parameters)
        key = (call.recurrence, plan, tuple(map(id, call.parameters))) if known else call
        if key not in prepared:
            prepared[key] = call.lay_out(self.writer, plan)
        # What is shared has no variant, which is the node's own; directions go together only if they have the same.
        if not call.variants:
            return prepared[key]
        passes, stacks, widths = prepared[key]
        passes = [p._replace(variant=variant) for p, variant in zip(passes, call.variants, strict=True)]
        alike = len(set(call.variants)) == 1
        return Layout(passes, [p._replace(variant=call.variants[0]) for p in stacks if alike], widths)
