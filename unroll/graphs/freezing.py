"""Weights of a graph's calls, laid out once in buffers of its module."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch import Tensor, fx, nn

from unroll.core.errors import Problem, Problems
from unroll.core.layout import Frozen
from unroll.graphs.effects import is_written
from unroll.graphs.lowering import FunctionLowering, Lowering

FIX = "freeze the module, unroll(module, freeze=True), before it becomes a graph"


def freeze_calls(
    found: list[tuple[fx.GraphModule, list[Lowering]]],
) -> tuple[dict[fx.GraphModule, list[str]], list[Problem]]:
    """Lay out the weights of calls in buffers of their modules; layers that are modules were frozen before.

    Returns:
        The names of attributes of each graph module that may be needed no more, and problems.
    """
    names: dict[fx.GraphModule, list[str]] = {}
    problems = Problems()
    for part, calls in found:
        for call in calls:
            with problems:
                if isinstance(call, FunctionLowering):
                    call.frozen = _freeze_call(part, call)
                    names.setdefault(part, []).extend(str(w.target) for w in call.call.weights)
                names.setdefault(part, []).extend(call.frozen.names if call.frozen else [])
    return names, problems


def _freeze_call(module: fx.GraphModule, lowering: FunctionLowering) -> Frozen:
    """Lay out the weights of a call; refuse those that are computed in the graph, given to it or written to."""
    place, weights = lowering.name, lowering.call.weights
    problems = Problems()
    for node in weights:
        if node.op == "placeholder":
            problems.add(place, f"takes its weight {node.name} as an input of the graph", FIX)
        elif node.op != "get_attr":
            problems.add(place, f"takes its weight {node.name} from other operations of the graph", FIX)
        elif any(is_written(n) for n in module.graph.find_nodes(op="get_attr") if n.target == node.target):
            problems.add(place, f"has the weight {node.target}, to which the graph writes", FIX)
    problems.check()

    def keep(name: str, tensor: Tensor) -> str:
        name = f"frozen_{place}_{name}".replace(".", "_")
        while hasattr(module, name):
            name += "_"
        module.register_buffer(name, tensor)
        return name

    tensors = [operator.attrgetter(str(w.target))(module) for w in weights]
    return Frozen.of(lowering.recurrence, tensors, lowering.plan, keep)


def drop_unread(module: fx.GraphModule, names: Iterable[str]) -> None:
    """Take away those attributes of a graph module, by their paths, that the graph has no use for."""
    names = set(names)
    for node in module.graph.find_nodes(op="get_attr"):
        if node.target in names and not node.users:
            module.graph.erase_node(node)
    # The ids of tensors that the graph reads, as one tensor may have several names.
    used: set[int] = set()
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            found = operator.attrgetter(str(node.target))(module)
            tensors = (*found.parameters(), *found.buffers()) if isinstance(found, nn.Module) else (found,)
            used |= set(map(id, tensors))
    for name in names:
        owner, _, last = name.rpartition(".")
        holder = module.get_submodule(owner)
        if id(getattr(holder, last, None)) not in used and hasattr(holder, last):
            delattr(holder, last)
