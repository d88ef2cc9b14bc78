"""Blocks of steps that a compiler writes once, in a loop of a graph: `torch.ops.higher_order.scan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from unroll.core.cells import State
from unroll.core.rows import join_rows
from unroll.core.scan import Step, scan
from unroll.core.values import Value
from unroll.graphs.writer import GraphWriter


def over_blocks(
    writer: GraphWriter, steps: int, block: int, *, batch_is_open: bool
) -> Callable[..., tuple[Any, State]]:
    """Make the loop of a `Target`, over blocks of a known number of steps.

    Steps that fill no block come first, two at least: by then all that steps have in common is written, outside of
    the block.
    """

    def loop(step: Step, xs: tuple[Value, ...], state: State, *, reverse: bool) -> tuple[Any, State]:
        rows = [unflattened(x, steps) for x in xs]  # [T, B, n] each
        alone = steps % block
        alone += block if alone < 2 else 0
        put_out: list[Any] = []
        for done in range(alone):
            t = steps - 1 - done if reverse else done
            state = step(t, tuple(writer.index(x, (t,)) for x in rows), state)
            put_out.append(state[0])
        span = slice(0, steps - alone) if reverse else slice(alone, steps)
        blocks = [unflattened(writer.index(x, (span,)), (steps - alone) // block) for x in rows]  # [blocks, k, B, n]
        if reverse:  # a loop has one direction
            blocks = [torch.flip(x, [0]) for x in blocks]
            put_out.reverse()
        hs: Any
        *final, hs = scanned(step, state, blocks, reverse=reverse)
        hs = writer.value("call_function", torch.flatten, (torch.flip(hs, [0]) if reverse else hs, 0, 2))
        return join_rows([hs, *put_out] if reverse else [*put_out, hs]), tuple(final)

    def unflattened(x: Value, count: int) -> Any:
        return writer.value("call_function", torch.unflatten, (x, 0, (count, -1)))

    def scanned(step: Step, state: State, blocks: Sequence[Any], *, reverse: bool) -> list[Value]:
        """Return the last state, and `h` after every step, `[blocks, k, B, P]`."""
        start: State = tuple(map(torch.clone, state))  # what a loop is given and returns may not share memory
        first = [writer.index(x, (0,)) for x in blocks]

        def body() -> list[Any]:
            pieces = (writer.items(writer.call(torch.unbind, (x,), {}), block) for x in first)
            outputs, state = scan(step, list(zip(*pieces, strict=True)), start, reverse=reverse)
            return [*map(torch.clone, state), torch.stack(outputs)]

        # Inductor finds the symbol of an open batch only among what the loop is given.
        size = torch.ops.aten.sym_size.int
        batch = [writer.value("call_function", size, (start[0], 0))] if batch_is_open else []
        name, captured = cut(writer, body, [*start, *first], batch)
        args = (writer.value("get_attr", name), start, tuple(blocks), captured)
        return writer.items(writer.value("call_function", torch.ops.higher_order.scan, args), len(start) + 1)

    return loop


def cut(
    writer: GraphWriter, body: Callable[[], Sequence[Value]], given: Sequence[Value], more: Sequence[Value] = ()
) -> tuple[str, tuple[Value, ...]]:
    """Write a graph of its own into the module.

    Args:
        writer: of the module's graph.
        body: writes with it, and returns the results of the inner graph.
        given: the values that `body` reads as the first inputs.
        more: values that the inner graph is to take beside what it reads.

    Returns:
        The graph's name, and the values that it takes after those given: what else it reads, and `more`.
    """
    own, others = ([value.node for value in values] for values in (given, more))
    before = len(writer.made)
    results = [value.node for value in body()]
    nodes = writer.made[before:]
    inside = {*own, *nodes}
    captured = list(dict.fromkeys(node for made in nodes for node in made.all_input_nodes if node not in inside))
    captured += others

    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in [*own, *captured]}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in results))
    for node in reversed(nodes):
        writer.graph.erase_node(node)
    del writer.made[before:]
    root: Any = writer.graph.owning_module
    name = f"unroll_block_{sum(name.startswith('unroll_block_') for name, _ in root.named_children())}"
    root.add_submodule(name, fx.GraphModule(root, graph))
    return name, tuple(Value(writer, node=node) for node in captured)
