"""What a user does with an unrolled graph, and how a model becomes a graph."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases import DROPOUT
from tests.checks import assert_equal, assert_same, gradients, problems
from tests.graphs.test_graphs import Called, Encoder, Second, build, x
from unroll import Plan, trace, unroll

F64 = torch.float64


# --- what a user does with the result ---------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), fx.symbolic_trace, trace])
def test_copies(again):
    ours, input = build(Encoder(), x(3, 4)), x(3, 4)
    other = again(ours)
    other.graph.lint()
    other.recompile()
    assert_equal(other(input), ours(input))
    assert len(other.graph.nodes) == len(ours.graph.nodes)


def test_the_same_parameters_and_state_dict():
    module = Encoder()
    ours = build(module, x(3, 4))
    assert list(ours.state_dict()) == list(module.state_dict())
    assert all(a is b for a, b in zip(ours.parameters(), module.parameters(), strict=True))
    ours.load_state_dict(Encoder().state_dict(), strict=True)
    input = x(3, 4)
    assert_same(ours(input), module(input))


def test_compiles_whole():
    ours, input = build(Encoder(), x(3, 4)), x(3, 4)
    assert_same(torch.compile(ours, fullgraph=True, backend="eager")(input), ours(input))


def test_becomes_aten_without_recurrent_operators():
    ours, input = build(Encoder(), x(3, 4)), x(3, 4)
    aten = make_fx(ours)(input)
    assert not any(word in str(node.target) for node in aten.graph.nodes for word in ("lstm", "gru", "rnn"))
    assert_same(aten(input), ours(input))


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_train_and_eval_switch_dropout(case):
    module = nn.Sequential(case.layer(F64))
    ours = build(module, *case.args(F64))
    for mode in (True, False, True):
        results = []
        for each in (module, ours, copy.deepcopy(ours)):
            each.train(mode)
            torch.manual_seed(3)
            results.append(each(*case.args(F64)))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


def test_parametrized_weights_are_computed_at_every_run():
    layer = nn.GRU(6, 5, dtype=F64)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    module, input = nn.Sequential(layer), x()
    ours = build(module, input)
    assert_same(ours(input), module(input))
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    assert_same(ours(input), module(input))
    assert_same(gradients(ours, (input,)), gradients(module, (input,)))


def test_hooks_are_refused():
    model = nn.Sequential(nn.GRU(6, 5), Second(), nn.LSTM(5, 4))
    graph = trace(model)
    graph.get_submodule("0").register_forward_hook(lambda m, args, out: None)
    graph.get_submodule("2").register_forward_pre_hook(lambda m, args: None)
    fix = "remove them (old weight_norm: use torch.nn.utils.parametrizations), or use unroll(module)"
    assert problems(unroll, graph, steps=2) == [f"{name}: has hooks, which no graph would call; {fix}" for name in "02"]


# --- tracing ----------------------------------------------------------------------------------------------------------


def test_trace_keeps_layers_and_packing_as_leaves():
    class Packing(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.cell = nn.LSTM(6, 5), nn.LSTMCell(5, 4)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths)
            y, (h, _) = self.rnn(packed)
            return pad_packed_sequence(y)[0], self.cell(h[-1])

    model = Packing()
    graph = trace(model)
    leaves = [str(getattr(n.target, "__name__", n.target)) for n in graph.graph.nodes if "call" in n.op]
    assert [name for name in leaves if name != "getitem"] == [
        "pack_padded_sequence",
        "rnn",
        "pad_packed_sequence",
        "cell",
    ]
    args = torch.randn(4, 3, 6), torch.tensor([4, 2, 1])
    assert_same(graph(*args), model(*args))
    assert trace(graph).graph.find_nodes(op="call_function", target=pack_padded_sequence)
    fx.symbolic_trace(nn.Linear(2, 2))  # still works


def test_trace_of_what_was_unrolled_keeps_it():
    model = unroll(nn.Sequential(nn.GRU(6, 5, dtype=F64)))
    graph = trace(model)
    assert [node.op for node in graph.graph.nodes] == ["placeholder", "call_module", "output"]
    input = x()
    ours = unroll(graph, (input,))
    assert not ours.graph.find_nodes(op="call_module")
    assert_same(ours(input), model(input))


def test_trace_with_arguments_fixed():
    module = Called(nn.GRU(6, 5, dtype=F64), lambda rnn, x, h, c: rnn(x) if h is None else rnn(x, h))
    (call,) = trace(module, {"h": None, "c": None}).graph.find_nodes(op="call_module")
    assert len(call.args) == 1
    (call,) = trace(module, {"c": None}).graph.find_nodes(op="call_module")
    assert len(call.args) == 2


def test_what_cannot_be_traced_is_refused():
    class Looping(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    (problem,) = problems(trace, Looping())
    assert problem.startswith("Looping: cannot be traced symbolically (")
    assert problem.endswith("use unroll(module), which needs no trace, or the graph of torch.export")


def test_plans_change_the_graph():
    module, input = nn.Sequential(nn.LSTM(6, 5)), torch.zeros(4, 3, 6)
    products = {}
    for gates in ("merged", "paired", "split"):
        graph = build(module, input, plan=Plan(gates=gates)).graph
        products[gates] = len(graph.find_nodes(op="call_function", target=torch.addmm))
    assert products == {"merged": 1 + 3, "paired": 2 + 6, "split": 4 + 12}
