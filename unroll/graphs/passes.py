"""Unrolling as a pass among others, for pass managers of `torch.fx`."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from unroll.core.options import Rules, Steps, Where, read_where
from unroll.core.plan import Plan, Preset
from unroll.graphs.calls import form_of, graph_parts
from unroll.graphs.rewrite import unroll_graph
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled


class UnrollPass(PassBase):
    """Unrolls the recurrent layers of a graph module, as one pass of a `PassManager`.

    The graph module that it is given is not changed. Graphs of aten operators, as programs have them, stay such: no
    shapes are asserted in them.

    Args:
        args: example inputs, from which the number of time steps is read where the graph's metadata does not tell it.
        where: which layers, as for `unroll`.
        rules: for layers of classes of your own.
        plan: how the steps are laid out.
        steps: the number of time steps, for all layers or by layer name.

    Raises:
        UnrollError: when it is called, for every layer that cannot be unrolled.

    Example:
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.GRU(3, 5)))
        >>> result = PassManager([UnrollPass(steps=7)])(graph)
        >>> result.modified, result.graph_module(torch.zeros(7, 2, 3))[0].shape
        (True, torch.Size([7, 2, 5]))
    """

    def __init__(
        self,
        args: Any = None,
        *,
        where: Where = None,
        rules: Rules | None = None,
        plan: Plan | Preset | None = None,
        steps: Steps = None,
    ) -> None:
        super().__init__()
        self.args, self.where, self.rules, self.steps = args, read_where(where), rules, steps
        self.plan = None if plan is None else Plan.of(plan)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        nodes = [node for part in graph_parts(graph_module) for node in part.graph.nodes]
        aten = all(isinstance(node.target, OpOverload) for node in nodes if form_of(node))
        given: dict[str, Any] = {"where": self.where, "rules": self.rules, "plan": self.plan, "steps": self.steps}
        unrolled = unroll_graph(graph_module, self.args, **given, asserts=not aten)
        modified = len(list(_calls(graph_module))) != len(list(_calls(unrolled)))
        return PassResult(unrolled, modified)


def _calls(module: fx.GraphModule) -> Any:
    for part in graph_parts(module):
        yield from filter(form_of, part.graph.nodes)
        for node in part.graph.find_nodes(op="call_module"):
            layer = part.get_submodule(str(node.target))
            if isinstance(layer, Unrolled) or is_recurrent(layer):
                yield node
