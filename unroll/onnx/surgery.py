"""New nodes in the place of old ones, and the removal of what nothing reads."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from unroll.onnx import loops
from unroll.onnx.writer import OnnxWriter


def hand_over(old: ir.Value, new: ir.Value, writer: OnnxWriter) -> None:
    """Let a new value be read wherever the old one was, under its name if it leaves the graph."""
    name = old.name
    if old.is_graph_output():
        # What is an output already, or was not made for this node, cannot take the name.
        if new.is_graph_output() or new.producer() not in writer.made:
            (new,) = writer.node("Identity", [new], [writer.name("copy")])
        old.name = None
        new.name = name
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def without_unread(made: list[ir.Node]) -> list[ir.Node]:
    """Return the nodes that something reads, of nodes in the order in which they were made."""
    kept = []  # from the last to the first: a node that is dropped reads nothing any more
    for node in reversed(made):
        if _is_read(node):
            if node.op_type in ("Scan", "Loop"):
                loops.drop_unread_outputs(node)
            kept.append(node)
        else:
            _detach(node)
    return kept[::-1]


def _is_read(node: ir.Node) -> bool:
    for value in node.outputs:  # noqa: SIM110 — `any` takes twice the time
        if value.uses() or value.is_graph_output():
            return True
    return False


def _detach(node: ir.Node) -> None:
    """Let a node, and those in graphs that it holds, read nothing any more."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                _detach(inner)
    for k in range(len(node.inputs)):
        node.replace_input_with(k, None)


def drop_unread(values: Iterable[ir.Value | None]) -> None:
    """Remove the nodes that computed values which nothing reads any more."""
    pending = [value for value in values if value is not None]
    while pending:
        producer = pending.pop().producer()
        if producer is None or producer.graph is None:
            continue
        if not _is_read(producer):
            pending += [value for value in producer.inputs if value is not None]
            producer.graph.remove(producer, safe=True)


def drop_unread_initializers(graph: ir.Graph) -> None:
    for name, value in list(graph.initializers.items()):
        if not (value.uses() or value.is_graph_input() or value.is_graph_output()):
            graph.initializers.pop(name)
