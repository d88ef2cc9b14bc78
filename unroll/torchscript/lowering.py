"""Explicit operations in the place of a recurrent operator of TorchScript."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll.core import schedule
from unroll.core.layout import lay_out
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence
from unroll.core.values import Value
from unroll.torchscript.calls import ScriptCall, is_constant
from unroll.torchscript.checks import check_cell, check_layer, check_length, check_packed, check_state, compiled
from unroll.torchscript.loops import over_blocks
from unroll.torchscript.writer import ScriptWriter


def lower(call: ScriptCall, recurrence: Recurrence, weights: list[Tensor], steps: int | None, plan: Plan) -> None:
    """Put explicit operations before the node and hand their results to those that read it.

    Weights that are constants of the graph are laid out here and now; others by the graph, whenever it runs.
    """
    node, writer = call.node, ScriptWriter(call.name, call.graph)
    with call.graph.insert_point_guard(node):
        train = False if call.is_cell else call.argument("train")
        if not isinstance(train, bool):
            train = train.toIValue() if is_constant(train) else Value(writer, node=train)
        results = write_recurrence(
            writer,
            recurrence,
            plan,
            weights if is_constant(call.weights()) else _weight_values(call, writer, len(weights)),
            weights[0].dtype,
            Value(writer, node=node.inputsAt(0)),
            Value(writer, node=call.argument("hx")),
            train=train,
            steps=steps,
            batch_sizes=Value(writer, node=call.argument("batch_sizes")) if call.packed else None,
        )
    for output, result in zip(node.outputs(), results, strict=True):
        output.replaceAllUsesWith(result.node)
    node.destroy()


def _weight_values(call: ScriptCall, writer: ScriptWriter, count: int) -> list[Value]:
    values = call.weights()
    if isinstance(values, list):
        return [Value(writer, node=value) for value in values]
    return writer.items(Value(writer, node=values), count)


def observe(call: ScriptCall, function: Any, number: int) -> None:
    """Have `function(number, input, weights)` called before the node."""
    writer = ScriptWriter("", call.graph)
    with call.graph.insert_point_guard(call.node):
        values = call.weights()
        whole = not isinstance(values, list)
        weights: Any = Value(writer, node=values) if whole else [Value(writer, node=value) for value in values]
        writer.run(function, number, Value(writer, node=call.node.inputsAt(0)), weights)


def write_recurrence(
    writer: ScriptWriter,
    recurrence: Recurrence,
    plan: Plan,
    weights: Sequence[Any],
    dtype: torch.dtype,
    input: Value,
    hx: Value,
    *,
    train: Any = False,
    steps: int | None = None,
    batch_sizes: Value | None = None,
) -> list[Value]:
    """Write a recurrence in place of its operator.

    Args:
        writer: of the graph.
        recurrence: the layer or cell that is run.
        plan: the layout of the steps.
        weights: in torch's order, values, or tensors for constants.
        dtype: of the weights.
        input: as the operator takes it.
        hx: the initial state, for an LSTM a list.
        train: true if dropout is on, a truth value or the graph's value of one.
        steps: the number of time steps, or None for any number.
        batch_sizes: of packed rows.

    Returns:
        The results of the operator: for a layer the output, then each state.
    """
    writer.enter("given")
    features, place, sizes = recurrence.input_size, writer.layer, None
    lead: list[Any] = [] if recurrence.is_cell else [recurrence.passes]
    if recurrence.is_cell:
        length, batch = writer.run(compiled(check_cell), input, features, place)
    elif batch_sizes is not None:
        length, batch, sizes = writer.run(compiled(check_packed), input, batch_sizes, features, place)
    else:
        length, batch = writer.run(compiled(check_layer), input, features, recurrence.batch_first, place)
    if steps is not None and not recurrence.is_cell:
        writer.run(compiled(check_length), length, steps, place)
    state = writer.items(hx, 2) if len(recurrence.state_sizes) == 2 else [hx]
    for s, size in zip(state, recurrence.state_sizes, strict=True):
        writer.run(compiled(check_state), s, [*lead, batch, size], place)
    looping = not recurrence.is_cell and (steps is None or plan.block is not None)
    plan = replace(plan, layers="sequential")  # TorchScript's own differentiation fails on a wavefront
    layout: Any = lay_out(recurrence, recurrence.weights(weights), plan, dtype, writer)
    # what was made of tensors, and not of values, becomes constants
    layout = pytree.tree_map_only(Tensor, writer.constant, layout)
    rows = input if sizes is not None else schedule.flat_rows(recurrence, input)
    drop = recurrence.dropout if train is not False else 0.0
    writer.loop = partial(over_blocks, writer, length, sizes, plan.block or 1) if looping else None
    result = schedule.run(
        recurrence,
        layout,
        rows,
        tuple(state),
        steps=steps or 1,  # a cell has one, and a loop takes its own from `length`
        dropout=(lambda rows: writer.insert("dropout", rows, drop, train)) if drop else None,
        target=writer,
    )
    writer.enter("results")
    states = schedule.joined_states(recurrence, result)
    if recurrence.is_cell:
        return states
    output: Any = schedule.joined_rows(result.outputs)
    if sizes is None:
        width = len(recurrence.directions) * recurrence.output_size
        output = writer.insert("reshape", output, [length, -1, width])
        output = writer.insert("transpose", output, 0, 1) if recurrence.batch_first else output
    if steps == 1 and recurrence.passes == 1:  # or it would be in the memory of the last state
        output = writer.insert("clone", output)
    return [output, *states]
