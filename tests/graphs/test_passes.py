"""The pass on graphs among others, in a pass manager of `torch.fx`."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager, this_before_that_pass_constraint

import unroll
from unroll import UnrollError, UnrollPass


class Count(PassBase):
    """Counts calls, and changes nothing."""

    def __init__(self):
        self.found = []

    def call(self, graph_module):
        self.found.append(len(graph_module.graph.nodes))
        return PassResult(graph_module, False)


def test_among_other_passes():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 5)).eval(), torch.randn(6, 2, 3)
    graph, before, after = fx.symbolic_trace(model), Count(), Count()
    passes = [before, UnrollPass(x, plan="gates=split"), after]
    constraints = [this_before_that_pass_constraint(before, after)]
    result = PassManager(passes, constraints, run_checks_after_each_pass=True)(graph)
    assert result.modified
    assert before.found[0] < after.found[0]
    torch.testing.assert_close(result.graph_module(x), model(x))
    assert isinstance(graph.get_submodule("1"), nn.LSTM)
    again = UnrollPass(x)(result.graph_module)
    assert not again.modified


def test_a_program_keeps_its_operators():
    model, x = nn.Sequential(nn.GRU(3, 4)).eval(), torch.randn(6, 2, 3)
    program = torch.export.export(model, (x,))
    result = PassManager([UnrollPass()])(program.graph_module)
    targets = {node.target for node in result.graph_module.graph.nodes if node.op == "call_function"}
    assert result.modified
    assert all(isinstance(target, torch._ops.OpOverload) or target.__module__ == "_operator" for target in targets)
    assert "aten.gru.input" not in map(str, targets)
    transformed = program._transform_do_not_use(UnrollPass())
    torch.testing.assert_close(transformed.module()(x), model(x))


def test_refusals():
    graph = unroll.trace(nn.Sequential(nn.GRU(3, 4)))
    with pytest.raises(UnrollError, match="the number of time steps is unknown"):
        UnrollPass()(graph)
    with pytest.raises(UnrollError, match="is no plan"):
        UnrollPass(plan="tensort")
    with pytest.raises(UnrollError, match="names no recurrent layer"):
        UnrollPass(where="nothing", steps=3)(graph)
