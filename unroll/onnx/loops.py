"""A loop over time inside the ONNX graph, for sequences of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from unroll.core.cells import State
from unroll.core.recurrence import Recurrence
from unroll.core.scan import masked, scan
from unroll.core.weights import Tensorlike
from unroll.onnx.writer import OnnxWriter, reshape_to, zeros

Loop = Callable[..., tuple[Any, State]]


def over_blocks(
    writer: OnnxWriter,
    recurrence: Recurrence,
    lead: tuple[Tensorlike, Tensorlike],
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    mask: Tensorlike | None = None,
    *,
    steps: int | None = None,
    block: int = 1,
) -> Loop:
    """What `schedule.run` takes as `loop`: a `Scan` whose body is a block of steps.

    Where the last block is not full, rows of zeros fill it, and what its steps make of them is left out of the
    results: a `Scan` without any turn, as one over the rest might be, is an error in ONNX Runtime.

    Args:
        writer: of the graph around the loop.
        recurrence: what the layer is.
        lead: T and B, each a tensor of shape `[1]`.
        widths: of what a step reads, the features of each product with the input.
        dtypes: of the states.
        mask: `[T * B, 1]`, boolean: rows that have a step; the others keep their state.
        steps: T, if it is known.
        block: steps in the body.
    """
    block = block if steps is None else min(block, steps)
    filling = block > 1 and (steps is None or steps % block > 0)

    def loop(step: Callable, xs: tuple[Any, ...], state: State, *, reverse: bool) -> tuple[Any, State]:
        here = writer.scope
        rows, sizes = list(xs), list(widths)
        if mask is not None:
            rows, sizes = [*rows, mask], [*sizes, 1]
        blocks = _Blocks.of(writer, lead, block, reverse)
        if filling:
            rows = [blocks.filled(x, size) for x, size in zip(rows, sizes, strict=True)]
        sequences = [
            reshape_to(writer, x, blocks.count, blocks.rows, size) for x, size in zip(rows, sizes, strict=True)
        ]
        starts = tuple(
            zeros(writer, lead[1], size, dtype) if s is None else s
            for s, size, dtype in zip(state, recurrence.state_sizes, dtypes, strict=True)
        )

        body = writer.inner()
        inputs: list[ir.Value] = []

        def entry(name: str, like: Tensorlike, width: int) -> Tensorlike:
            """An input of the body, `[B, width]` or a block of these."""
            dtype = tensor_adapters.from_torch_dtype(like.dtype)
            value = ir.Value(
                name=body.unique(body.name(name)), type=ir.TensorType(dtype), shape=ir.Shape([None, width])
            )
            inputs.append(value)
            return body.value(value, like.dtype, 2)

        before = tuple(
            entry(f"before.{name}", start, size)
            for name, start, size in zip(recurrence.cell.states, starts, recurrence.state_sizes, strict=True)
        )
        read = [entry(f"x.{k}", x, size) for k, (x, size) in enumerate(zip(sequences, sizes, strict=True))]
        pieces = [[body(x, f"t{t}.x") for t, x in enumerate(torch.chunk(x, block))] if block > 1 else [x] for x in read]
        states: list[State] = [()] * block

        def noted(t: int, x: tuple[Tensorlike, ...], state: State) -> State:
            new: State = step(t, x[: len(xs)], state)
            states[t] = new if mask is None else masked(x[-1], new, state)
            return states[t]

        _, after = scan(noted, list(zip(*pieces, strict=True)), before, reverse=reverse)
        put_out = list(zip(*states, strict=True))[: len(starts) if filling else 1]
        joined = [torch.cat(list(parts)) if block > 1 else body.op("Identity", *parts) for parts in put_out]
        joined = [body(value, f"outputs.{name}") for value, name in zip(joined, recurrence.cell.states, strict=False)]
        results: list[Any] = [value.node for value in (*after, *joined)]
        likes = [*zip(starts, recurrence.state_sizes, strict=True)]
        for value, (like, size) in zip(results, likes * 2, strict=False):
            value.type = ir.TensorType(tensor_adapters.from_torch_dtype(like.dtype))
            value.shape = ir.Shape([None, size])
        writer.enter(here)
        graph = ir.Graph(inputs, results, nodes=body.made, name=writer.name("step" if block == 1 else "block"))

        attributes: dict[str, Any] = {"body": graph, "num_scan_inputs": len(sequences)}
        if reverse:
            attributes |= {
                "scan_input_directions": [1] * len(sequences),
                "scan_output_directions": [1] * len(joined),
            }
        names = [writer.name(f"{kind}.{name}") for kind in ("final", "outputs") for name in recurrence.cell.states]
        outputs = writer.node("Scan", [v.node for v in (*starts, *sequences)], names[: len(results)], attributes)
        values = [writer.value(v, like.dtype, 2) for v, (like, _) in zip(outputs, likes, strict=False)]
        stacked = [
            torch.reshape(writer.value(v, like.dtype, 3), (-1, size))
            for v, (like, size) in zip(outputs[len(starts) :], likes, strict=False)
        ]
        if not filling:
            return stacked[0], tuple(values)
        return blocks.all_steps(stacked[0]), tuple(map(blocks.last_step, stacked))

    return loop


class _Blocks(NamedTuple):
    """A sequence in blocks of steps, the last of which is filled up: at the end at which the steps arrive."""

    writer: OnnxWriter
    reverse: bool
    count: Tensorlike
    """How many blocks there are, of shape `[1]` as all here"""
    rows: Tensorlike
    """Of a block"""
    batch: Tensorlike
    """Rows of a step"""
    total: Tensorlike
    """Rows of all steps"""
    missing: Tensorlike
    """Rows that fill the last block"""

    @classmethod
    def of(cls, writer: OnnxWriter, lead: tuple[Tensorlike, Tensorlike], block: int, reverse: bool) -> _Blocks:
        steps, batch = lead
        op = partial(writer.op, rank=1)
        if block == 1:
            count, rows = steps, batch
        else:
            count, rows = op("Div", op("Add", steps, [block - 1]), [block]), op("Mul", batch, [block])
        total = op("Mul", steps, batch)
        return cls(writer, reverse, count, rows, batch, total, op("Sub", op("Mul", count, rows), total))

    def filled(self, x: Tensorlike, size: int) -> Tensorlike:
        """Rows `[total, size]` with those that are missing."""
        more = zeros(self.writer, self.missing, size, x.dtype)
        return torch.cat([more, x] if self.reverse else [x, more])

    def all_steps(self, filled: Tensorlike) -> Tensorlike:
        """Without the rows that were filled in."""
        return self._between(filled, self.missing if self.reverse else [0], self.total)

    def last_step(self, filled: Tensorlike) -> Tensorlike:
        """The rows of the step that comes last before those that were filled in."""
        begin = self.missing if self.reverse else self.writer.op("Sub", self.total, self.batch, rank=1)
        return self._between(filled, begin, self.batch)

    def _between(self, rows: Tensorlike, begin: Any, count: Tensorlike) -> Tensorlike:
        return self.writer.op("Slice", rows, begin, self.writer.op("Add", count, begin, rank=1), [0])


def drop_unread_outputs(node: ir.Node) -> None:
    """Let a `Scan` put out no more of what its steps leave than is read; the last states stay."""
    body = node.attributes["body"].as_graph()
    states = len(node.inputs) - node.attributes["num_scan_inputs"].as_int()
    while len(node.outputs) > states and not (node.outputs[-1].uses() or node.outputs[-1].is_graph_output()):
        node.resize_outputs(len(node.outputs) - 1)
        joined = body.outputs.pop().producer()
        assert joined is not None
        body.remove(joined, safe=True)
    if "scan_output_directions" in node.attributes:
        node.attributes.pop("scan_output_directions")
        if count := len(node.outputs) - states:
            node.attributes["scan_output_directions"] = ir.AttrInt64s("scan_output_directions", [1] * count)
