"""Explicit operations in the place of calls on packed sequences, which stay packed between the layers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from unroll.core import schedule
from unroll.core.recurrence import Recurrence
from unroll.core.values import Value
from unroll.graphs.lowering import FunctionLowering, ModuleLowering
from unroll.graphs.results import Results, Returned, undivided
from unroll.packed.sequences import Ragged, initial_states, pad_rows, restore_order, unpad_rows


class PackedModuleLowering(ModuleLowering):
    """The lowering of `call_module` of an `Unrolled` layer on a `PackedSequence` of at most the steps unrolled for.

    Rows are padded to all steps, with those past the end of a sequence masked, and unpadded again afterwards.
    """

    packed = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batched = True  # for the states

    def read_recurrence(self) -> Recurrence:
        return replace(super().read_recurrence(), batch_first=False)

    def assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
        """Do nothing: what pads the rows, and sorts the states, refuses others."""

    def starts(self, input: fx.Node, state: Any) -> list[fx.Node]:
        shapes = tuple((self.recurrence.passes, size) for size in self.recurrence.state_sizes)
        given = None if state is None else tuple(state)
        states: Any = self.writer.value("call_function", initial_states, (input, given, shapes))
        return [value.node for value in self.writer.items(states, len(shapes))]

    def rows(self, input: Any) -> Any:
        both = self.writer.value("call_function", pad_rows, (input, self.steps))
        rows, self.mask = self.writer.items(both, 2)
        return rows

    def returned(self, results: Results) -> tuple[Returned, list[Returned]]:
        finals = schedule.joined_states(self.recurrence, results.result)
        rows: Any = schedule.joined_rows(results.result.outputs)
        # Of rank 0: no index into a PackedSequence reads a part of the output.
        packed = self.writer.value("call_function", unpad_rows, (self.call.input, rows, self.steps))
        return undivided(packed, 0), [undivided(self._ordered(whole), 3) for whole in finals]

    def _ordered(self, state: Value) -> Value:
        ordered = self.writer.value("call_function", restore_order, (self.call.input, [state]))
        return self.writer.items(ordered, 1)[0]


class PackedFunctionLowering(FunctionLowering):
    """The lowering of a functional call on packed rows, whose batch sizes are known only when it runs.

    The rows are padded to as many for each step as the first step has, with those past the end of
    a sequence masked, and unpadded again after the steps. Dropout between layers therefore draws for
    more rows than torch's does, and other numbers.
    """

    packed = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batched = True  # for the states; the rows are handled here

    def choose_steps(self, known: Any, asked: Any) -> int:
        sizes = self.call.given["batch_sizes"]
        return super().choose_steps(self.known[sizes].shape[0] if sizes in self.known else None, asked)

    def assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
        steps = self.writer.node("call_function", len, (self.call.given["batch_sizes"],))
        same = self.writer.node("call_function", operator.eq, (steps, self.steps))
        message = f"{self.name}: the longest sequence must have {self.steps} time steps, as unrolled for"
        self.writer.node("call_function", torch._assert, (same, message))

    def rows(self, input: Any) -> Any:
        # B, from h of [passes, B, P].
        count = self._size(self.state[0], 1)
        sizes: Any = Value(self.writer, node=self.call.given["batch_sizes"])
        self.ragged = Ragged(sizes, count, self.writer.call(torch.arange, (count,), {}))
        self.mask = self._beside(input, self.ragged.mask())
        # [T * B, F], where a row that has ended is its own first step again.
        return input.index_select(0, self._beside(input, self.ragged.padded()))

    def returned(self, results: Results) -> tuple[Returned, list[Returned]]:
        input: Any = Value(self.writer, node=self.call.input)
        entry = self.writer.call(torch.arange, (self._size(input.node, 0),), {})
        position = self.ragged.unpadded(entry)
        rows: Any = schedule.joined_rows(results.result.outputs).index_select(0, self._beside(input, position))
        return undivided(rows, 2), results.states()

    def _size(self, node: fx.Node, dim: int) -> Any:
        """Return a size of a tensor: a number if it is known, else a value."""
        size = self.known[node].shape[dim] if node in self.known else None
        if isinstance(size, int):
            return size
        return self.writer.value("call_function", torch.ops.aten.sym_size.int, (node, dim))

    def _beside(self, input: Value, index: Any) -> Any:
        """Move an index, which comes from batch sizes on the CPU, to the device of what it is for."""
        device = getattr(self.known.get(input.node), "device", torch.device("cpu"))
        return index if device.type == "cpu" else index.to(device)
