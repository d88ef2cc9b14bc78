"""A loop over time inside the ONNX graph, for sequences of any length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from unroll.cells import State, Value
from unroll.onnx.values import OnnxWriter
from unroll.recurrence import Recurrence

Loop = Callable[..., tuple[Any, State]]


def zeros(writer: OnnxWriter, batch: Value, size: int, dtype: torch.dtype) -> Value:
    """`[B, size]`, for `B` of shape `[1]`."""
    zero = writer.operand(0.0, dtype)
    assert zero is not None
    return writer.op("Expand", writer.value(zero, dtype, 0), shape_of(writer, batch, size), rank=2)


def shape_of(writer: OnnxWriter, *sizes: Value | int) -> Value:
    """A shape made of sizes known now and of others known when the model runs."""
    return writer.op("Concat", *([s] if isinstance(s, int) else s for s in sizes), rank=1, attributes={"axis": 0})


def reshaped(writer: OnnxWriter, value: Value, *sizes: Value | int) -> Value:
    """A value with these sizes, of which any may be zero."""
    attributes = {"allowzero": 1} if writer.opset >= 14 else None
    return writer.op("Reshape", value, shape_of(writer, *sizes), rank=len(sizes), attributes=attributes)


def scan(
    writer: OnnxWriter,
    recurrence: Recurrence,
    lead: tuple[Value, Value],
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype],
    mask: Value | None = None,
) -> Loop:
    """What `schedule.run` takes as `loop`: a `Scan` whose body is one step.

    Args:
        writer: of the graph around the loop.
        recurrence: what the layer is.
        lead: T and B, each a tensor of shape `[1]`.
        widths: of what a step reads, the features of each product with the input.
        dtypes: of the states.
        mask: `[T, B, 1]`, boolean: rows that have a step `t`; the others keep their state.
    """

    def loop(step: Callable, xs: tuple[Any, ...], state: State, *, reverse: bool) -> tuple[Any, State]:
        here = writer.scope
        sequences = [reshaped(writer, x, *lead, width) for x, width in zip(xs, widths, strict=True)]
        sequences += [] if mask is None else [mask]
        starts = tuple(
            zeros(writer, lead[1], size, dtype) if s is None else s
            for s, size, dtype in zip(state, recurrence.state_sizes, dtypes, strict=True)
        )

        body = writer.inner()
        inputs: list[ir.Value] = []

        def entry(name: str, like: Value, width: int) -> Value:
            """An input of the body, `[B, width]`."""
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
        read = [entry(f"x.{k}", x, width) for k, (x, width) in enumerate(zip(sequences, (*widths, 1), strict=False))]
        after: State = step(0, tuple(read[: len(xs)]), before)
        if mask is not None:
            after = tuple(torch.where(read[-1], new, old) for new, old in zip(after, before, strict=True))
        output = body.op("Identity", after[0]).named(body.name("output"))
        results: list[Any] = [value.node for value in (*after, output)]
        for value, like, size in zip(results, (*starts, starts[0]), (*recurrence.state_sizes, recurrence.output_size)):
            value.type = ir.TensorType(tensor_adapters.from_torch_dtype(like.dtype))
            value.shape = ir.Shape([None, size])
        writer.enter(here)
        graph = ir.Graph(inputs, results, nodes=body.made, name=writer.name("step"))

        attributes: dict[str, Any] = {"body": graph, "num_scan_inputs": len(sequences)}
        if reverse:
            attributes |= {"scan_input_directions": [1] * len(sequences), "scan_output_directions": [1]}
        names = [writer.name(f"final.{name}") for name in recurrence.cell.states]
        outputs = writer.node(
            "Scan", [v.node for v in (*starts, *sequences)], [*names, writer.name("outputs")], attributes
        )
        *finals, stacked = outputs
        rows = torch.reshape(writer.value(stacked, starts[0].dtype, 3), (-1, recurrence.output_size))
        return rows, tuple(writer.value(v, start.dtype, 2) for v, start in zip(finals, starts, strict=True))

    return loop


def drop_unread_outputs(node: ir.Node) -> None:
    """Let a `Scan` keep its last states alone, if nothing reads what its steps put out."""
    stacked = node.outputs[-1]
    if stacked.uses() or stacked.is_graph_output():
        return
    node.resize_outputs(len(node.outputs) - 1)
    node.attributes.pop("scan_output_directions", None)
    body = node.attributes["body"].as_graph()
    copied = body.outputs.pop().producer()
    assert copied is not None
    body.remove(copied, safe=True)
