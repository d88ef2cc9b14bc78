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
from unroll.core.scan import mask_state, scan
from unroll.core.weights import Tensorlike
from unroll.onnx.sizes import expanded_zeros, numbers_to, reshape_to, shape_of, zeros
from unroll.onnx.writer import OnnxWriter

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
    """Return the loop of a target: a `Scan`, or a `Loop` if the file's form has it, whose body is a block of steps.

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
    # Unless T is known to be a multiple of the block, the last block may not be full.
    filling = block > 1 and (steps is None or steps % block > 0)

    def loop(step: Callable, xs: tuple[Any, ...], state: State, *, reverse: bool) -> tuple[Any, State]:
        here = writer.scope
        rows, sizes = list(xs), list(widths)
        if mask is not None:  # as numbers: TensorRT has no Scan of booleans
            rows, sizes = [*rows, mask.to(rows[0].dtype)], [*sizes, 1]
        blocks = _Blocks.of(writer, lead, block, reverse)
        if filling:
            rows = [blocks.filled(x, size) for x, size in zip(rows, sizes, strict=True)]
        # [count, block * B, size]: a turn of the loop reads one block of each.
        reads = [
            _Entry(reshape_to(writer, x, blocks.count, blocks.rows, size, batch=1), size)
            for x, size in zip(rows, sizes, strict=True)
        ]
        starts = [
            _Entry(zeros(writer, lead[1], size, dtype) if s is None else s, size)
            for s, size, dtype in zip(state, recurrence.state_sizes, dtypes, strict=True)
        ]
        kind = _Scan if writer.form.loop == "Scan" else _Loop
        node = kind(writer, recurrence.cell.states, block, blocks.count, reverse=reverse)
        node.write_body(step, starts, reads, masked=mask is not None, all_states=filling)
        writer.enter(here)  # the steps have entered scopes of their own
        finals, outputs = node.write(starts, reads)
        if not filling:
            return outputs[0], tuple(finals)
        # `finals` are the states after the rows of zeros: the true ones are taken from the states of all steps.
        return blocks.all_steps(outputs[0]), tuple(map(blocks.last_step, outputs))

    return loop


class _Entry(NamedTuple):
    """A value that goes into a loop, and the features of the rows that its body gets of it."""

    value: Any
    width: int

    @property
    def type(self) -> ir.TensorType:
        return ir.TensorType(tensor_adapters.from_torch_dtype(self.value.dtype))


class _Scan:
    """A `Scan` node: first its body, then the node itself.

    The body takes the states and, of each sequence, a block `[block * B, width]`. It returns the states after its last
    step, and what its steps put out, joined: `h` of each, or all states where a last block is filled up.
    """

    def __init__(
        self, writer: OnnxWriter, states: Sequence[str], block: int, count: Tensorlike, *, reverse: bool
    ) -> None:
        self.writer, self.states, self.block, self.count, self.reverse = writer, states, block, count, reverse
        self.body = writer.inner()
        self.inputs: list[ir.Value] = []
        self.begin()

    def write_body(
        self, step: Callable, starts: Sequence[_Entry], reads: Sequence[_Entry], *, masked: bool, all_states: bool
    ) -> None:
        """Write the steps of a block.

        Args:
            step: `step(t, x, state)`.
            starts: the states before the first step of all.
            reads: what the steps read; the last is a mask if they are `masked`.
            masked: whether rows without a step keep their state.
            all_states: whether all states are put out, or `h` alone.
        """
        body = self.body
        before = tuple(self._input(f"before.{name}", start) for name, start in zip(self.states, starts, strict=True))
        read = [self.read(f"x.{k}", entry) for k, entry in enumerate(reads)]
        block, count = self.block, len(reads) - masked
        if masked:
            read[-1] = body(read[-1].to(torch.bool), "mask")
        # pieces[k][t]: the rows `[B, width]` that step t reads of sequence k; left[t]: the states after step t.
        pieces = [[body(x, f"t{t}.x") for t, x in enumerate(torch.chunk(x, block))] if block > 1 else [x] for x in read]
        left: list[State] = [()] * block

        def noted(t: int, x: tuple[Tensorlike, ...], state: State) -> State:
            new: State = step(t, x[:count], state)
            left[t] = mask_state(x[-1], new, state) if masked else new
            return left[t]

        _, after = scan(noted, list(zip(*pieces, strict=True)), before, reverse=self.reverse)
        put_out = list(zip(*left, strict=True))[: len(starts) if all_states else 1]
        # With a single step, an Identity: its state is an output of the body already.
        joined = [torch.cat(list(parts)) if block > 1 else body.op("Identity", *parts) for parts in put_out]
        joined = [body(value, f"outputs.{name}") for value, name in zip(joined, self.states, strict=False)]
        results: list[Any] = [value.node for value in (*after, *joined)]
        for value, like in zip(results, [*starts, *starts], strict=False):
            value.type, value.shape = like.type, ir.Shape([None, like.width])
        self.results = results

    def begin(self) -> None:
        """Write what the body takes before the states."""

    def read(self, name: str, entry: _Entry) -> Tensorlike:
        """Return the block of a sequence that a turn reads."""
        return self._input(name, entry)

    def _input(self, name: str, entry: _Entry) -> Tensorlike:
        body = self.body
        name, shape = body.unique(body.name(name)), ir.Shape([None, entry.width])
        self.inputs.append(ir.Value(name=name, type=entry.type, shape=shape))
        return body.value(self.inputs[-1], entry.value.dtype, 2)

    def write(self, starts: Sequence[_Entry], reads: Sequence[_Entry]) -> tuple[list[Any], list[Any]]:
        """Write the node, and return the last states and, as rows of all steps, what the steps put out."""
        writer, count = self.writer, len(self.results) - len(starts)
        names = [writer.name(f"{kind}.{state}") for kind in ("final", "outputs") for state in self.states]
        outputs = self.node(starts, reads, names[: len(self.results)], count)
        finals = [writer.value(v, start.value.dtype, 2) for v, start in zip(outputs, starts, strict=False)]
        # The node puts out [count, block * B, width].
        stacked = [
            torch.reshape(self.ordered(writer.value(v, start.value.dtype, 3), start.width), (-1, start.width))
            for v, start in zip(outputs[len(starts) :], starts, strict=False)
        ]
        return finals, stacked

    def graph(self, results: list[Any]) -> ir.Graph:
        name = self.writer.name("step" if self.block == 1 else "block")
        return ir.Graph(self.inputs, results, nodes=self.body.made, name=name)

    def node(self, starts: Sequence[_Entry], reads: Sequence[_Entry], names: list[str], count: int) -> Sequence[Any]:
        """Write the node itself, which puts out `count` sequences beside the last states."""
        attributes: dict[str, Any] = {"body": self.graph(self.results), "num_scan_inputs": len(reads)}
        if self.reverse:
            attributes |= {"scan_input_directions": [1] * len(reads), "scan_output_directions": [1] * count}
        return self.writer.node("Scan", [entry.value.node for entry in (*starts, *reads)], names, attributes)

    def ordered(self, stacked: Tensorlike, width: int) -> Tensorlike:
        """Return what the turns put out, in the order of time."""
        return stacked


class _Loop(_Scan):
    """The same as a `Loop` node, whose body picks its blocks by the number of the turn."""

    def begin(self) -> None:
        body = self.body
        self.last = self.writer.op("Sub", self.count, [1], rank=1)
        for name, kind in (("turn", ir.DataType.INT64), ("going", ir.DataType.BOOL)):
            value = ir.Value(name=body.unique(body.name(name)), type=ir.TensorType(kind), shape=ir.Shape([]))
            self.inputs.append(value)
        turn = body.value(self.inputs[0], torch.int64, 0)
        index = body.op("Sub", self.last, turn, dtype=torch.int64, rank=1) if self.reverse else turn
        self.index = index if self.reverse else torch.reshape(index, (1,))

    def read(self, name: str, entry: _Entry) -> Tensorlike:
        # [1, block * B, width] becomes [block * B, width]
        block = self.body.op("Gather", entry.value, self.index, rank=3, attributes={"axis": 0})
        return self.body(torch.reshape(block, (-1, entry.width)), name)

    def node(self, starts: Sequence[_Entry], reads: Sequence[_Entry], names: list[str], count: int) -> Sequence[Any]:
        writer, body = self.writer, self.body
        going = body.node("Identity", [self.inputs[1]], [body.name("goes_on")])
        going[0].type, going[0].shape = self.inputs[1].type, ir.Shape([])
        turns = writer.op("Squeeze", self.count, [0], rank=0)
        true = writer.operand(True, torch.bool)
        given = [turns.node, true, *(entry.value.node for entry in starts)]
        return writer.node("Loop", given, names, {"body": self.graph([*going, *self.results])})

    def ordered(self, stacked: Tensorlike, width: int) -> Tensorlike:
        if not self.reverse:
            return stacked
        # some evaluators join what the turns put out, and do not stack it
        shape = shape_of(self.writer, self.count, -1, width)
        stacked = self.writer.op("Reshape", stacked, shape, dtype=stacked.dtype, rank=3)
        places = self.writer.op("Sub", self.last, numbers_to(self.writer, self.count), rank=1)
        return self.writer.op("Gather", stacked, places, attributes={"axis": 0})


class _Blocks(NamedTuple):
    """A sequence in blocks of steps, filled up to whole blocks at the end at which the steps arrive."""

    writer: OnnxWriter
    reverse: bool
    count: Tensorlike
    """The number of blocks, of shape `[1]` as all here"""
    rows: Tensorlike
    """Rows of a block"""
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
            # count = ceil(T / block)
            count, rows = op("Div", op("Add", steps, [block - 1]), [block]), op("Mul", batch, [block])
        total = op("Mul", steps, batch)
        return cls(writer, reverse, count, rows, batch, total, op("Sub", op("Mul", count, rows), total))

    def filled(self, x: Tensorlike, size: int) -> Tensorlike:
        """Add to rows `[total, size]` those that are missing."""
        more = expanded_zeros(self.writer, self.missing, size, x.dtype)
        return torch.cat([more, x] if self.reverse else [x, more])

    def all_steps(self, filled: Tensorlike) -> Tensorlike:
        """Return the rows without those that were filled in."""
        return self._between(filled, self.missing if self.reverse else [0], self.total)

    def last_step(self, filled: Tensorlike) -> Tensorlike:
        """Return the rows of the step that comes last before those that were filled in."""
        begin = self.missing if self.reverse else self.writer.op("Sub", self.total, self.batch, rank=1)
        return self._between(filled, begin, self.batch)

    def _between(self, rows: Tensorlike, begin: Any, count: Tensorlike) -> Tensorlike:
        return self.writer.op("Slice", rows, begin, self.writer.op("Add", count, begin, rank=1), [0])


def drop_unread_outputs(node: ir.Node) -> None:
    """Let a loop put out no more of what its steps leave than is read; the last states stay."""
    body = node.attributes["body"].as_graph()
    # A Loop takes its condition and the number of turns before the states.
    others = node.attributes["num_scan_inputs"].as_int() if node.op_type == "Scan" else 2
    states = len(node.inputs) - others
    while len(node.outputs) > states and not (node.outputs[-1].uses() or node.outputs[-1].is_graph_output()):
        node.resize_outputs(len(node.outputs) - 1)
        joined = body.outputs.pop().producer()
        assert joined is not None
        body.remove(joined, safe=True)
    if "scan_output_directions" in node.attributes:
        node.attributes.pop("scan_output_directions")
        if count := len(node.outputs) - states:
            node.attributes["scan_output_directions"] = ir.AttrInt64s("scan_output_directions", [1] * count)
