"""What operations do to the memory of their operands: torch's own samples, and what is easily taken for a copy."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

from unroll.graphs.effects import effect, is_written, may_change_more, origins

RANDOM = {"cauchy", "exponential", "geometric", "log_normal", "normal", "uniform"}  # op_db fills a tensor in place


def memory(value):
    tensors = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided and t.numel()}


def told(function, count, **kwargs):
    """The effects on `count` operands of a call, as a graph has it."""
    graph = fx.Graph()
    operands = [graph.placeholder(f"x{k}") for k in range(count)]
    node = graph.call_function(function, tuple(operands), kwargs)
    return [effect(node, operand) for operand in operands]


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(4))  # in parts, for runs in several processes
def test_no_operator_returns_memory_that_is_taken_for_new(number):
    seen = 0
    for op in op_db[number::4]:
        name = op.name.rpartition(".")[2]
        packet = getattr(torch.ops.aten, name, None)
        if packet is None or op.name.startswith(("_refs", "masked")) or name in RANDOM:
            continue
        overloads = [getattr(packet, key) for key in packet.overloads()]
        overloads = [o for o in overloads if not any(a.is_out for a in o._schema.arguments)]
        shares = any(does.shares for overload in overloads for does in told(overload, len(overload._schema.arguments)))
        if shares:
            continue
        try:
            samples = list(op.sample_inputs("cpu", torch.float32))[:20]
        except (AssertionError, RuntimeError, NotImplementedError, TypeError):  # an operator without float32
            continue
        for sample in samples:
            given = (sample.input, sample.args)
            try:
                result = op(sample.input, *sample.args, **sample.kwargs)
            except (RuntimeError, NotImplementedError, TypeError):
                continue
            seen += 1
            assert name == "histogramdd" or not memory(result) & memory(given), op.name
    assert seen > 300


def graph_of(function, *modules):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.ModuleList(modules)

        def forward(self, x):
            return function(x + 1, *self.m)

    return fx.GraphModule(*_traced(Model()))


def _traced(model):
    tracer = fx.Tracer()
    return model, tracer.trace(model)


class Mine(nn.Module):
    """A module that a graph may call as a whole."""

    def forward(self, x):
        return x.t().add_(1)


WRITING = {
    "positional inplace": lambda x: functional.leaky_relu(x, 0.1, True),
    "a list": lambda x: torch._foreach_add_([x], 1),
    "float": lambda x: x.float().mul_(2),
    "to": lambda x: x.to(torch.float32)[0].exp_(),
    "movedim": lambda x: torch.movedim(x, 0, 1).zero_(),
    "diagonal": lambda x: x.diagonal().add_(1),
    "expand_as": lambda x: x.expand_as(x).clamp_(0),
    "unfold": lambda x: x.unfold(0, 2, 1).relu_(),
    "dropout": lambda x: functional.dropout(x, 0.5, False).add_(1),
    "out": lambda x: torch.neg(x, out=x),
    "einsum": lambda x: torch.einsum("ij->ji", x).add_(1),
    "atleast": lambda x: torch.atleast_2d(x).sub_(1),
    "real": lambda x: x.real.sub_(1),
    "an attribute": lambda x: x.T.data.add_(1),
    "split_with_sizes": lambda x: x.split_with_sizes([1, 1])[0].add_(1),
    "relu_": lambda x: torch.relu_(x.view(-1)),
}
MODULES = {
    "inplace": [nn.ReLU(inplace=True)],
    "Identity": [nn.Identity(), nn.LeakyReLU(0.1, inplace=True)],
    "Flatten": [nn.Flatten(), nn.Hardtanh(inplace=True)],
    "Dropout": [nn.Dropout(0.5).eval(), nn.SiLU(inplace=True)],
    "Unflatten": [nn.Unflatten(0, (1, 2)), nn.ELU(inplace=True)],
    "one's own": [Mine()],
}
READING = {
    "arithmetic": lambda x: (x * 2 - x / 3).mul_(2),
    "reductions": lambda x: x.sum(0).add_(x.mean(0)),
    "copies": lambda x: x.clone().add_(x.abs()),
    "into another": lambda x: torch.zeros(2).copy_(x[0]),
    "linear": lambda x: functional.linear(x, x).relu_(),
    "shapes": lambda x: x.new_zeros(x.shape[0], x.size(1)).add_(1),
    "indices": lambda x: torch.index_select(x, 0, torch.tensor([0])).add_(1),
    "cat": lambda x: torch.cat([x, x[0:1]]).add_(1),
}


def in_turn(x, *modules):
    for module in modules:
        x = module(x)
    return x


def first_result(graph):
    return next(node for node in graph.graph.nodes if node.target is operator.add)


@pytest.mark.parametrize("name", WRITING)
def test_writes_are_seen(name):
    assert is_written(first_result(graph_of(WRITING[name])))


@pytest.mark.parametrize("name", MODULES)
def test_writes_of_modules_are_seen(name):
    graph = graph_of(in_turn, *MODULES[name])
    assert is_written(first_result(graph))


@pytest.mark.parametrize("name", READING)
def test_what_reads_does_not_count(name):
    assert not is_written(first_result(graph_of(READING[name])))


def test_modules_that_return_memory_of_their_own_do_not_count():
    graph = graph_of(in_turn, nn.Linear(3, 3), nn.ReLU(inplace=True))
    assert not is_written(first_result(graph))


@pytest.mark.parametrize("function", [operator.imod, operator.iadd, operator.ixor, operator.setitem])
def test_functions_of_python_write_to_their_first_operand(function):
    (first, *others) = told(function, 3 if function is operator.setitem else 2)
    assert first.writes
    assert not any(does.writes or does.shares for does in others)


def unknown(x):
    return x


fx.wrap("unknown")


def test_of_what_is_not_known_the_worst_is_believed():
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(unknown, (x,))
    assert effect(node, x) == (True, True)
    assert may_change_more(node)
    assert origins(node) == {x, node}


def test_modes_are_more_than_operands():
    graph = fx.Graph()
    assert may_change_more(graph.call_function(torch._C._set_grad_enabled, (False,)))
    assert may_change_more(graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", None, True, None)))
    assert not may_change_more(graph.call_function(torch.zeros, (2,)))
    assert not may_change_more(graph.call_function(torch.ops.aten.zeros.default, ([2],)))
