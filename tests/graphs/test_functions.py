"""The pass on functional calls in FX graphs: Dynamo's, `make_fx`'s, `torch.export`'s, and those written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_sequence

from tests.cases import CHOSEN, DROPOUT, Case
from unroll import UnrollError, compare, unroll
from unroll.graphs.calls import form_of, layer_name
from unroll.graphs.functions import FUNCTIONS

F64 = torch.float64


def recurrent(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if form_of(node)]


def captured(model: nn.Module, args: tuple) -> fx.GraphModule:
    """What Dynamo captures, parameters as placeholders and all."""
    found: list[fx.GraphModule] = []

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(*args)
    return found[0]


class Functional(nn.Module):
    """Calls `torch.lstm` or a twin of it on the weights of a layer, which is no part of it."""

    def __init__(self, layer: nn.RNNBase, function) -> None:
        super().__init__()
        self.weights = nn.ParameterList(layer._flat_weights)
        self.count = len(layer._flat_weights)
        self.options = (layer.bias, layer.num_layers, layer.dropout, layer.training, layer.bidirectional)
        self.batch_first, self.function = layer.batch_first, function

    def forward(self, x, h, c=None):
        weights = [self.weights[i] for i in range(self.count)]
        return self.function(x, h if c is None else (h, c), weights, *self.options, self.batch_first)


class Packed(Functional):
    def forward(self, data, sizes, h, c=None):
        weights = [self.weights[i] for i in range(self.count)]
        return self.function(data, sizes, h if c is None else (h, c), weights, *self.options)


def traced(model: nn.Module, args: tuple) -> fx.GraphModule:
    names = ["data", "sizes", "h", "c"] if isinstance(model, Packed) else ["x", "h", "c"]
    return fx.symbolic_trace(model, concrete_args=dict.fromkeys(names[len(args) :]))


FUNCTIONAL = [
    (case, home)
    for case in CHOSEN
    if case.state and not case.is_cell and case.form == "batched"
    for home in (torch, torch._VF, torch.ops.aten)
]


def function_of(case: Case, home, overload: str):
    layer = case.layer(F64)
    function = getattr(home, layer.mode.lower())
    return layer, getattr(function, overload) if home is torch.ops.aten else function


@pytest.mark.parametrize(("case", "home"), FUNCTIONAL, ids=str)
def test_functions_by_every_name(case, home):
    model = Functional(*function_of(case, home, "input"))
    args = case.tensors(F64)
    graph = traced(model, args)
    assert len(recurrent(graph)) == 1
    unrolled = unroll(graph, args)
    assert not recurrent(unrolled)
    unrolled.graph.lint()
    compare(model, unrolled, args, gradients=True).check()


@pytest.mark.parametrize("case", [c for c in CHOSEN if c.is_cell and c.state and c.form == "batched"], ids=str)
@pytest.mark.parametrize("home", [torch, torch._VF, torch.ops.aten])
def test_cells_by_every_name(case, home):
    cell = case.layer(F64)
    kind = {"LSTMCell": "lstm", "GRUCell": "gru"}.get(case.kind, f"rnn_{case.nonlinearity}")
    function = getattr(home, f"{kind}_cell")
    function = function.default if home is torch.ops.aten else function

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.ParameterDict(dict(cell.named_parameters()))

        def forward(self, x, h, c):
            weights = [self.cell[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            return function(x, (h, c) if kind == "lstm" else h, *weights)

    model = Step()
    x, h, *c = case.tensors(F64)
    args = (x, h, *(c or [h]))
    unrolled = unroll(fx.symbolic_trace(model), args)
    assert not recurrent(unrolled)
    compare(model, unrolled, args).check()


@pytest.mark.parametrize("case", [c for c in CHOSEN if c.steps > 1][::2], ids=str)
def test_graphs_of_dynamo(case):
    model, args = case.model(F64), case.tensors(F64)
    graph = captured(model, args)
    assert len(recurrent(graph)) == 1
    unrolled = unroll(graph)
    assert not recurrent(unrolled)
    assert any(node.name.startswith("rnn_l0_t") for node in unrolled.graph.nodes)
    given = {f"L_self_modules_rnn_parameters_{name}_": p.detach() for name, p in model.rnn.named_parameters()}
    given |= {"L_input_": args[0]} | {f"L_rest_{k}_": state for k, state in enumerate(args[1:])}
    real = tuple(given[node.target] for node in graph.graph.nodes if node.op == "placeholder")
    assert len(real) == len(given)
    compare(graph, unrolled, real).check()


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_graphs_of_make_fx(kind, mode):
    case = Case(kind, num_layers=2, bidirectional=True, state=True)
    model = Functional(*function_of(case, torch, "input"))
    args = case.tensors(F64)
    with torch.no_grad():
        graph = make_fx(model, tracing_mode=mode, pre_dispatch=True, _allow_non_fake_inputs=True)(*args)
    if not recurrent(graph):
        pytest.skip(f"make_fx decomposes {kind} in mode {mode}, nothing is left to unroll")
    unrolled = unroll(graph, args if mode == "symbolic" else None)
    assert not recurrent(unrolled)
    with torch.no_grad():
        compare(model, unrolled, args).check()


@pytest.mark.parametrize("strict", [True, False])
def test_graphs_of_export(strict):
    case = Case("GRU", num_layers=2, bidirectional=True, state=True)
    graph = torch.export.export(case.model(F64), case.tensors(F64), strict=strict).module()
    unrolled = unroll(graph)
    assert not recurrent(unrolled)
    compare(case.model(F64), unrolled, case.tensors(F64), gradients=False).check()


@pytest.mark.parametrize("case", DROPOUT[::2], ids=str)
def test_dropout_follows_the_argument(case):
    args = (*case.tensors(F64), *Case(**{**vars(case), "state": True}).tensors(F64)[1:])
    for training in (True, False):
        layer, function = function_of(case, torch, "input")
        model = Functional(layer.train(training), function)
        compare(model, unroll(traced(model, args), args), args).check()


LENGTHS = [(5, 5, 2), (5, 4, 3, 1), (5,), (5, 1, 1, 1, 1)]


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("aten", [True, False], ids=["make_fx", "symbolic_trace"])
def test_packed_rows_of_any_lengths(kind, options, aten):
    layer = getattr(nn, kind)(3, 5, dtype=F64, **options)
    model = Packed(layer, getattr(torch, layer.mode.lower()))

    def inputs(lengths):
        packed = pack_sequence([torch.randn(n, 3, dtype=F64) for n in lengths])
        passes = layer.num_layers * (1 + layer.bidirectional)
        states = [torch.randn(passes, len(lengths), 5, dtype=F64) for _ in range(2 if kind == "LSTM" else 1)]
        return packed.data, packed.batch_sizes, *states

    args = inputs(LENGTHS[0])
    if aten:
        with torch.no_grad():
            graph = make_fx(model, tracing_mode="real", pre_dispatch=True)(*args)
        unrolled = unroll(graph)
        compare(model, unrolled, args).check()  # sizes are constants in such a graph
    else:
        graph = traced(model, args)
        unrolled = unroll(graph, args)
        compare(model, unrolled, args, gradients=True).check()
    assert recurrent(graph)
    assert not recurrent(unrolled)
    with pytest.raises(AssertionError, match="the longest sequence must have 5 time steps"):
        unrolled(*inputs((4, 4, 2)))


def test_a_run_of_another_shape_stops():
    case = Case("LSTM", state=True)
    model = Functional(*function_of(case, torch, "input"))
    x, h, c = case.tensors(F64)
    unrolled = unroll(traced(model, (x, h, c)), (x, h, c))
    with pytest.raises(AssertionError, match="must have 4 time steps of 6 features"):
        unrolled(x[:2], h, c)
    with pytest.raises(AssertionError, match=r"c_0 must have shape \[1, batch, 5\]"):
        unrolled(x, h, c[:, :1])


def test_unknown_shapes_are_refused():
    graph = fx.Graph()
    x, h, w_ih, w_hh = (graph.placeholder(name) for name in ("x", "h", "w_ih", "w_hh"))
    graph.output(graph.call_function(torch.gru, (x, h, [w_ih, w_hh], False, 1, 0.0, False, False, False)))
    with pytest.raises(UnrollError, match="gru: the shapes of its weights are unknown; give example inputs"):
        unroll(fx.GraphModule({}, graph))


def test_an_option_computed_in_the_graph_is_refused():
    graph = fx.Graph()
    x, h, w_ih, w_hh, layers = (graph.placeholder(name) for name in ("x", "h", "w_ih", "w_hh", "layers"))
    graph.output(graph.call_function(torch.gru, (x, h, [w_ih, w_hh], False, layers, 0.0, False, False, False)))
    with pytest.raises(UnrollError, match="num_layers is computed in the graph; make it a constant"):
        unroll(fx.GraphModule({}, graph))


def test_names_come_from_the_module_stack():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.LSTM(6, 5)])

        def forward(self, x):
            return self.layers[0](x)[0]

    (node,) = recurrent(captured(Model(), (torch.randn(4, 2, 6),)))
    assert layer_name(node) == "layers.0"


def test_every_recurrent_operator_is_known():
    kinds = ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for kind in kinds:
        for overload in ("input", "data"):
            assert getattr(getattr(torch.ops.aten, kind), overload) in FUNCTIONS
        assert getattr(torch.ops.aten, f"{kind}_cell").default in FUNCTIONS
        assert {getattr(torch, kind), getattr(torch, f"{kind}_cell")} <= FUNCTIONS.keys()
