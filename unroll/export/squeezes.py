"""Calls of `squeeze` that leave out nothing, of which torch's exporter makes a `Squeeze` that fails."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram

SQUEEZES = (torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims)


def drop_idle_squeezes(program: ExportedProgram) -> None:
    """Leave out of each `squeeze` of a program the axes whose size is not one, and of which torch keeps them."""
    for part in program.graph_module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                if node.op == "call_function" and node.target in SQUEEZES:
                    _drop_idle(node)


def _drop_idle(node: fx.Node) -> None:
    given, axes = node.args[0], node.args[1]
    assert isinstance(given, fx.Node)
    value = given.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.dim():
        return
    asked = [axes] if isinstance(axes, int) else list(axes)  # pyright: ignore[reportArgumentType]
    kept = [
        axis
        for axis in asked
        if isinstance(axis, int) and isinstance(value.shape[axis], int) and value.shape[axis] == 1
    ]
    if kept == asked:
        return
    # The node stays under its name, by which a program knows its outputs.
    if kept:
        node.target, node.args = torch.ops.aten.squeeze.dims, (given, kept)
    else:
        node.target, node.args = torch.ops.aten.alias.default, (given,)
