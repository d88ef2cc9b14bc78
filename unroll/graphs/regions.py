"""Blocks of steps that a compiler writes once: each is a call of one graph, `torch.ops.higher_order.invoke_subgraph`.

`torch.compiler.nested_compile_region` makes the same of a function, which Dynamo then reads call after call.
"""

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


def over_regions(writer: GraphWriter, steps: int, block: int) -> Callable[..., tuple[Any, State]]:
    """Make the loop of a `Target`, over blocks of a known number of steps.

    Steps that fill no block come first, two at least: by then all that steps have in common is written, outside of
    the block.
    """

    def loop(step: Step, xs: tuple[Value, ...], state: State, *, reverse: bool) -> tuple[Any, State]:
        rows = [writer.value("call_function", torch.unflatten, (x, 0, (steps, -1))) for x in xs]  # [T, B, n] each
        alone = steps % block
        alone += block if alone < 2 else 0

        def body(given: Sequence[Value]) -> list[Any]:
            pieces = zip(*(writer.items(writer.call(torch.unbind, (x,), {}), block) for x in given[: len(xs)]))
            outputs, state = scan(step, list(pieces), tuple(given[len(xs) :]), reverse=reverse)
            return [join_rows(outputs), *state]

        put_out: list[Any] = []
        for done in range(alone):
            t = steps - 1 - done if reverse else done
            state = step(t, tuple(writer.index(x, (t,)) for x in rows), state)
            put_out.append(state[0])
        region = None
        for done in range(alone, steps, block):
            span = slice(steps - done - block, steps - done) if reverse else slice(done, done + block)
            given = [*(writer.index(x, (span,)) for x in rows), *state]
            region = region or Region(writer, body, given)
            hs, *rest = region(given)
            state = tuple(rest)
            put_out.append(hs)
        return join_rows(put_out[::-1] if reverse else put_out), state

    return loop


class Region:
    """A graph of its own, that is called with other values.

    Args:
        writer: what writes it, and the calls.
        body: given values, returns others; what else it reads is given to each call too.
        given: the first values, of which `body` is written.
    """

    def __init__(
        self, writer: GraphWriter, body: Callable[[Sequence[Value]], list[Value]], given: Sequence[Value]
    ) -> None:
        self.writer = writer
        own = [value.node for value in given]
        before = len(writer.made)
        results = [value.node for value in body(given)]
        nodes = writer.made[before:]
        read = dict.fromkeys(node for made in nodes for node in made.all_input_nodes)
        self.captured = [node for node in read if node not in {*own, *nodes}]
        self.count = len(results)

        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in [*own, *self.captured]}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[node] for node in results))
        for node in reversed(nodes):
            writer.graph.erase_node(node)
        del writer.made[before:]

        root: Any = writer.graph.owning_module
        self.name = f"unroll_region_{sum(name.startswith('unroll_region_') for name, _ in root.named_children())}"
        root.add_submodule(self.name, fx.GraphModule(root, graph))

    def __call__(self, given: Sequence[Value]) -> list[Value]:
        """Write a call, and return its results."""
        body = self.writer.value("get_attr", self.name)
        operands = [*given, *(Value(self.writer, node=node) for node in self.captured)]
        called = torch.ops.higher_order.invoke_subgraph
        return self.writer.items(self.writer.value("call_function", called, (body, self.name, *operands)), self.count)
