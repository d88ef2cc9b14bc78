"""A loop over time inside of a TorchScript graph, for sequences of any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unroll.core.cells import State
from unroll.core.values import Value
from unroll.torchscript.writer import INT, ScriptWriter


def over_blocks(
    writer: ScriptWriter,
    steps: Value,
    sizes: Value | None,
    block: int,
    step: Callable[[Any, Any, State], State],
    xs: tuple[Value, ...],
    state: State,
    *,
    reverse: bool = False,
) -> tuple[Value, State]:
    """Go over all rows at once like `scan`, as a loop of the graph.

    A turn of the loop does `block` steps, and those of a second one the steps that fill no block.
    For packed rows `sizes` tells how many have a step `t`; the others keep their state, and a turn is one step.
    """
    pieces = [writer.insert("chunk", x, steps) if sizes is None else writer.insert("split", x, sizes) for x in xs]
    outputs = writer.list([])

    def one_step(name: Any, done: Value, state: State) -> State:
        """Write the next step, after those that are done."""
        t = writer.insert("sub", writer.insert("sub", steps, 1), done) if reverse else done
        x = tuple(writer.insert("__getitem__", piece, t) for piece in pieces)
        if sizes is None:
            state = step(name, x, state)
            writer.insert("append", outputs, state[0])
            return state
        # rows are sorted by falling length: the first `rows` of them have a step t
        rows = writer.insert("__getitem__", sizes, t)
        going = step(name, x, tuple(writer.insert("slice", s, 0, 0, rows) for s in state))
        writer.insert("append", outputs, going[0])
        idle = [writer.insert("slice", s, 0, rows) for s in state]
        return tuple(writer.insert("cat", pair) for pair in zip(going, idle, strict=True))

    if sizes is None and block > 1:
        blocks = writer.insert("floordiv", steps, block)

        def whole_block(turn: Value, state: State) -> State:
            done = writer.insert("mul", turn, block)
            for k in range(block):
                # only a name, of the place in the block: the step itself is in `done`
                name = block - 1 - k if reverse else k
                state = one_step(name, writer.insert("add", done, k) if k else done, state)
            return state

        state = _turns(writer, blocks, whole_block, state)
        done = writer.insert("mul", blocks, block)
        rest = writer.insert("sub", steps, done)
        state = _turns(writer, rest, lambda turn, state: one_step("", writer.insert("add", done, turn), state), state)
    else:
        state = _turns(writer, steps, lambda turn, state: one_step("", turn, state), state)
    if reverse:  # in place: outputs were appended from the last step on
        writer.node("aten::reverse", [outputs], 0)
    return writer.insert("cat", outputs), state


def _turns(writer: ScriptWriter, count: Value, body: Callable[[Value, State], State], state: State) -> State:
    """Return the state after `count` turns of a loop, each of which makes it `body(turn, state)`."""
    # prim::Loop(count, condition, *state), its block (turn, *state) -> (condition, *state)
    loop = writer.node("prim::Loop", [count, True, *state], len(state))
    block = loop.addBlock()
    turn = Value(writer, node=block.addInputToBlock().setType(INT))
    state = tuple(Value(writer, node=block.addInputToBlock()) for _ in state)
    with writer.graph.insert_point_guard(block):
        for output in (writer.constant(True), *body(turn, state)):
            block.registerOutput(output.node)
    return tuple(Value(writer, node=output) for output in loop.outputs())
