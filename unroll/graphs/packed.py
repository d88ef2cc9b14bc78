"""Calls of layers on packed sequences in an FX graph, where sequences stay packed between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from unroll.core import schedule
from unroll.graphs.lowering import ModuleCall, Returned
from unroll.packed.contexts import gathered, original_order, spread, started


class PackedModuleCall(ModuleCall):
    """`call_module` of an `Unrolled` layer on a `PackedSequence` of no more steps than it was unrolled for.

    Rows are spread out to all steps, with those past the end of a sequence masked, and gathered again afterwards.
    """

    packed = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batched = True  # for the states

    def read_recurrence(self) -> Any:
        return replace(super().read_recurrence(), batch_first=False)

    def assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
        """What spreads the rows, and sorts the states, does so."""

    def starts(self, input: fx.Node, state: Any) -> list[fx.Node]:
        shapes = tuple((self.recurrence.passes, size) for size in self.recurrence.state_sizes)
        given = None if state is None else tuple(state)
        states: Any = self.writer.value("call_function", started, (input, given, shapes))
        return [value.node for value in self.writer.items(states, len(shapes))]

    def rows(self, input: Any) -> Any:
        both = self.writer.value("call_function", spread, (input, self.steps))
        rows, self.mask = self.writer.items(both, 2)
        return rows

    def final(self, whole: Any, rank: int, read: Any) -> Returned:
        input, _ = self.operands()
        (ordered,) = self.writer.items(self.writer.value("call_function", original_order, (input, [whole])), 1)
        return Returned(ordered, rank, lambda index: None)

    def output(self, result: schedule.Result) -> Returned:
        input, _ = self.operands()
        rows: Any = schedule.joined_rows(result.outputs)
        packed = self.writer.value("call_function", gathered, (input, rows, self.steps))
        return Returned(packed, 0, lambda index: None)
