"""The products of a model that PT2E has converted, and those that its quantizer left in float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import fx
from torch.export import ExportedProgram

from unroll.core.errors import Problem, UnrollError
from unroll.targets.uses import RECURRENT, Row

FACTORS = {
    "aten.linear": (0, 1),
    "aten.matmul": (0, 1),
    "aten.mm": (0, 1),
    "aten.bmm": (0, 1),
    "aten.addmm": (1, 2),
    "aten.baddbmm": (1, 2),
    "aten.convolution": (0, 1),
    "aten.conv1d": (0, 1),
    "aten.conv2d": (0, 1),
    "aten.conv3d": (0, 1),
}
"""Operators that are products, and the places of both factors among their arguments: what is computed, and a weight"""

MOVES = {
    *("alias", "chunk", "clone", "contiguous", "detach", "expand", "flatten", "permute", "reshape", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    "getitem",
}
"""Names of operators that compute nothing, behind which a factor may stand"""

FIX = "unroll the model with plan='quantize' before it is exported and prepared, and see that the quantizer takes it"


def is_product(operator: str) -> bool:
    """Tell whether an operator is a product; a recurrent one counts as such."""
    return operator.startswith(RECURRENT) or operator.rpartition(".")[0] in FACTORS


class Products(NamedTuple):
    """The products of a model."""

    total: int
    floats: tuple[Row, ...]
    """Those that are computed in float"""

    def __str__(self) -> str:
        return f"{len(self.floats)} of {self.total} products are float"


def read_products(model: ExportedProgram | fx.GraphModule) -> Products:
    """Return the products of a program or graph, those of loops included; a recurrent operator counts as one.

    A product is of integers where both factors come from a `dequantize`: a runtime then makes one operator of them.

    Raises:
        UnrollError: for calls of modules and methods, which PT2E leaves nowhere.
    """
    module = model.graph_module if isinstance(model, ExportedProgram) else model
    graphs = [p for name, p in module.named_modules() if isinstance(p, fx.GraphModule) and name != "_guards_fn"]
    found = [row for part in graphs for node in part.graph.nodes for row in _rows(node)]
    return Products(len(found), tuple(row for row in found if row.finding))


def _rows(node: fx.Node) -> Iterator[Row]:
    """Yield a row for a product; its finding is empty if it is of integers."""
    if node.op == "call_method" or (node.op == "call_module" and node.target != "_guards_fn"):
        fix = "give what convert_pt2e returns, or what torch.export.export makes of a model"
        raise UnrollError(Problem(node.name, f"is a {node.op} of {node.target}, which is no aten operator", fix))
    if isinstance(node.target, torch._ops.OpOverload):
        name = str(node.target)
        if name.startswith(RECURRENT):
            yield Row(node.name, name, "is float, as quantizers know no recurrent operator", FIX)
        elif places := FACTORS.get(name.rpartition(".")[0]):
            integers = [_is_dequantized(node.args[k]) for k in places]
            other = "its weight" if integers[1] else "what it is applied to"
            half = f"is float, though {other} is not"
            yield Row(node.name, name, "" if all(integers) else half if any(integers) else "is float", FIX)


def _is_dequantized(value: object) -> bool:
    """Tell whether a factor comes from a `dequantize`, behind any number of operators that move it."""
    while isinstance(value, fx.Node):
        name = getattr(value.target, "__name__", str(value.target)).partition(".")[0]
        if name.startswith("dequantize"):
            return True
        if name not in MOVES:
            return False
        value = value.args[0]
    return False
