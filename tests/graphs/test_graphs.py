"""The pass on FX graphs: how layers are called, what comes out, and what is refused."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from tests.cases import CHOSEN, EMPTY, PLANS, Case
from tests.checks import assert_equal, assert_same, gradients, problems
from unroll import compare, trace, unroll

F64 = torch.float64


def build(module, *args, **kwargs):
    """A module traced and unrolled, checked for what must hold of every result."""
    graph = trace(module)
    before = str(graph.graph)
    ours = unroll(graph, args, **kwargs)
    ours.graph.lint()
    assert str(graph.graph) == before
    assert type(ours) is not fx.GraphModule and isinstance(ours, fx.GraphModule)
    return ours


class Called(nn.Module):
    """A layer, called as `call(layer, *inputs)` says."""

    def __init__(self, layer, call):
        super().__init__()
        self.rnn = layer
        self.call = call

    def forward(self, x, h=None, c=None):
        return self.call(self.rnn, x, h, c)


def agree(module, *args):
    """The unrolled graph gives what the module gives."""
    ours = build(module, *args)
    assert_same(ours(*args), module(*args))
    return ours


def x(*shape):
    return torch.randn(*(shape or (4, 3)), 6, dtype=F64)


def state(*shape):
    return torch.randn(*(shape or (1, 3)), 5, dtype=F64)


def holder(case):
    """The case as a module whose forward takes as many tensors as it has."""
    layer = case.layer(F64)
    calls = {
        1: lambda rnn, x, h, c: rnn(x),
        2: lambda rnn, x, h, c: rnn(x, h),
        3: lambda rnn, x, h, c: rnn(x, (h, c)),
    }
    return Called(layer, calls[len(case.tensors(F64))])


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", CHOSEN + EMPTY, ids=str)
def test_result_is_torchs(case, plan):
    module, args = holder(case), case.tensors(F64)
    ours = build(module, *args, plan=plan)
    assert_same(ours(*args), module(*args))
    assert not any(
        isinstance(ours.get_submodule(n.target), nn.RNNBase) for n in ours.graph.find_nodes(op="call_module")
    )


@pytest.mark.parametrize("case", CHOSEN[2:12:3], ids=str)
def test_gradients_are_torchs(case):
    module, args = holder(case), case.tensors(F64)
    assert_same(gradients(build(module, *args), args), gradients(module, args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_lower_precision(kind, dtype):
    case = Case(kind, num_layers=2, bidirectional=True, batch=64)
    module = nn.Sequential(case.layer(dtype))
    compare(module, build(module, *case.args(dtype)), case.args(dtype)).check()


CALLS = {
    "positional": lambda rnn, x, h, c: rnn(x, (h, c)),
    "keyword state": lambda rnn, x, h, c: rnn(x, hx=(h, c)),
    "all keywords": lambda rnn, x, h, c: rnn(hx=(h, c), input=x),
    "state None": lambda rnn, x, h, c: rnn(x, None),
    "no state": lambda rnn, x, h, c: rnn(x),
    "state computed": lambda rnn, x, h, c: rnn(x, (h * 2, torch.zeros_like(c))),
    "state from another call": lambda rnn, x, h, c: rnn(x, rnn(x, (h, c))[1]),
    "parts of another state": lambda rnn, x, h, c: rnn(x, (rnn(x)[1][1], rnn(x)[1][0])),
    "chain": lambda rnn, x, h, c: rnn(rnn(x)[0].repeat(1, 1, 2)[..., :6]),
    "unpacked": lambda rnn, x, h, c: (rnn(x, (h, c))[0], *unpack(rnn(x, (h, c))[1])),
    "only h": lambda rnn, x, h, c: rnn(x)[1][0],
    "only c": lambda rnn, x, h, c: rnn(x)[1][1],
    "both states": lambda rnn, x, h, c: rnn(x)[1],
    "sliced results": lambda rnn, x, h, c: rnn(x)[0:1],
    "results from the end": lambda rnn, x, h, c: rnn(x)[-1][-2],
    "zeros": lambda rnn, x, h, c: rnn(x, (torch.zeros(1, x.shape[1], 5, dtype=F64),) * 2),
}


def unpack(pair):
    return pair[0], pair[1]


@pytest.mark.parametrize("call", CALLS)
def test_calls(call):
    agree(Called(nn.LSTM(6, 5, dtype=F64), CALLS[call]), x(), state(), state())


READS = [
    "y[-1]", "y[0]", "y[2]", "y[-4]", "y[:, 0]", "y[:, -1]", "y[1, 2]", "y[1, 2, 3]", "y[..., :5]", "y[..., 5:]",
    "y[:, :, :5]", "y[-1, :, :5]", "y[0, :, 5:]", "y[0][:, 5:]", "y[-1][..., :5]", "y[..., 2:4]", "y[..., 3:7]",
    "y[..., ::2]", "y[..., 5::2]", "y[1:3]", "y[::2]", "y[None]", "y[..., None]", "y[[0, 2]]", "y[..., -1]",
    "y[..., -5:]", "y[:]", "y[...]", "y[-1:]", "y[:, :, 0]", "y[..., 5]", "y[-1, ..., 5:]", "y[..., 5:5]", "y[True]",
    "h[-1]", "h[0]", "h[1]", "h[-2]", "h[0, 1]", "h[:, 0]", "h[..., 0]", "h[0, :, 1:3]", "h[None]", "h[1:]",
    "h[[1, 0]]", "torch.cat([h[-2], h[-1]], 1)", "y.sum(0)", "y[-1] + y[0]", "y.transpose(0, 1)[:, -1]", "(y, h)",
    "(h[0], y)", "y.mean(0), y[-1]", "{'y': y, 'h': h[0]}", "y[h.shape[0] - 1]",
]  # fmt: skip


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("form", ["time first", "batch first", "unbatched"])
def test_reads(form, read):
    """Whatever part of the results is read, and however, is the same part."""
    layer = nn.GRU(6, 5, bidirectional=True, batch_first=form == "batch first", dtype=F64)
    input = x(4) if form == "unbatched" else x(4, 4)
    scope = {"torch": torch}

    def call(rnn, x, h, c):
        y, h = unpack(rnn(x))
        return eval(read, scope, {"y": y, "h": h})

    module = Called(layer, call)
    try:
        expected = module(input)
    except (IndexError, RuntimeError):
        return  # too many indices for the unbatched form
    ours = unroll(trace(module), (input,))
    ours.graph.lint()
    assert_same(ours(input), expected)


def write_to_last_step(y, h):
    y[-1].mul_(2)
    return y, h


def write_to_state(y, h):
    h[0].zero_()
    return y, h


def write_to_output(y, h):
    y.relu_()
    return y, h


def write_and_agree(work):
    module, input = Called(nn.GRU(6, 5, dtype=F64), lambda rnn, x, h, c: work(*unpack(rnn(x)))), x()
    assert_same(unroll(trace(module), input)(input), module(input))


def test_a_step_may_be_written_to():
    write_and_agree(write_to_last_step)


@pytest.mark.parametrize("work", [write_to_state, write_to_output])
def test_a_whole_result_may_be_written_to(work):
    write_and_agree(work)


def test_one_layer_called_twice_at_different_lengths():
    module = Called(nn.GRU(6, 5, dtype=F64), lambda rnn, x, h, c: (rnn(x)[0], rnn(x[:2], h)[1], rnn(x[1:])[1]))
    agree(module, x(), state())


class Encoder(nn.Module):
    """Cells in a loop after stacked layers, as decoders do."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, dtype=F64)
        self.cell = nn.LSTMCell(10, 4, dtype=F64)
        self.gru = nn.GRUCell(4, 3, dtype=F64)

    def forward(self, x):
        y, _ = self.rnn(x)
        h, c = self.cell(y[:, 0])
        for t in range(1, 3):
            h, c = self.cell(y[:, t], (h, c))
        return self.gru(h), c


def test_layers_and_cells():
    agree(Encoder(), x(3, 4))


def test_a_graph_of_a_graph_and_unrolling_twice():
    ours = build(Encoder(), x(3, 4))
    again = unroll(ours)
    assert str(again.graph) == str(ours.graph)
    input = x(3, 4)
    assert_equal(again(input), ours(input))


def test_where_in_a_graph():
    module = Encoder()
    graph, input = trace(module), x(3, 4)
    ours = unroll(graph, (input,), where="cell")
    called = {str(node.target) for node in ours.graph.find_nodes(op="call_module")}
    assert called == {"rnn", "gru"}
    assert isinstance(ours.rnn, nn.LSTM)
    assert_same(ours(input), module(input))
    rest = unroll(ours, (input,))
    assert not rest.graph.find_nodes(op="call_module")
    assert_same(rest(input), module(input))


# --- steps ------------------------------------------------------------------------------------------------------------


def test_steps_from_arguments_metadata_and_by_number_give_one_graph():
    module, input = Encoder(), x(3, 4)
    by_args = unroll(trace(module), (input,))
    propagated = trace(module)
    ShapeProp(propagated).propagate(input)
    by_metadata = unroll(propagated)
    assert str(by_args.graph) == str(by_metadata.graph) == str(unroll(trace(module), steps=4).graph)
    assert str(unroll(trace(module), steps={"rnn": 4}).graph) == str(by_args.graph)
    assert_same(by_metadata(input), module(input))


def test_arguments_may_be_one_tensor_or_a_list():
    for args in (x(), [x()], (x(),)):
        assert_same(unroll(trace(nn.Sequential(nn.GRU(6, 5, dtype=F64))), args)(x())[0].shape, torch.Size([4, 3, 5]))


def test_arguments_on_meta_and_fake_tensors_do():
    graph = trace(nn.Sequential(nn.GRU(6, 5)))
    with torch._subclasses.FakeTensorMode():
        fake = torch.zeros(4, 3, 6)
    assert str(unroll(graph, (fake,)).graph) == str(unroll(graph, steps=4).graph)


UNKNOWN = "give example inputs, unroll(graph, args), or the number, steps=10"


def test_unknown_or_contradicted_steps_are_refused():
    graph = trace(nn.Sequential(nn.GRU(6, 5)))
    assert problems(unroll, graph) == [f"0: the number of time steps is unknown; {UNKNOWN}"]
    assert problems(unroll, graph, steps={"other": 3})[0].startswith("0: the number of time steps is unknown")
    assert problems(unroll, graph, torch.zeros(4, 3, 6), steps=5) == [
        "0: has 4 time steps; leave out steps=5 or make it 4"
    ]
    for steps in (0, -1, 2.0):
        assert problems(unroll, graph, steps=steps) == [f"0: steps={steps!r}; give a whole number from 1 upwards"]
    two = trace(nn.Sequential(nn.GRU(6, 5), Second(), nn.GRU(5, 4), Second(), nn.LSTMCell(4, 2)))
    assert len(problems(unroll, two)) == 2


class Second(nn.Module):
    def forward(self, results):
        return results[0]


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5, 3, 6), "rnn: the input must have 4 time steps of 6 features, as unrolled for; unroll again for another"),
        ((3, 3, 6), "rnn: the input must have 4 time steps of 6 features, as unrolled for; unroll again for another"),
        ((4, 3, 7), "rnn: the input must have 4 time steps of 6 features, as unrolled for; unroll again for another"),
        ((8, 3, 3), "rnn: the input must have 4 time steps of 6 features, as unrolled for; unroll again for another"),
        ((4, 6), "rnn: the input must be 3-D, as it was unrolled for; unroll again for another"),
    ],
)
@pytest.mark.parametrize("again", [lambda m: m, copy.deepcopy, fx.symbolic_trace])
def test_another_shape_stops_the_graph(shape, words, again):
    module = Called(nn.GRU(6, 5), lambda rnn, x, h, c: rnn(x)[0][-1])
    ours = again(build(module, torch.zeros(4, 3, 6)))
    with pytest.raises(AssertionError) as caught:
        ours(torch.zeros(shape))
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("h", "c", "words"),
    [
        ((1, 2, 5), (1, 3, 5), "rnn: h_0 must have shape [1, batch, 5]"),
        ((1, 1, 5), (1, 3, 5), "rnn: h_0 must have shape [1, batch, 5]"),
        ((1, 3, 5), (1, 1, 5), "rnn: c_0 must have shape [1, batch, 5]"),
        ((3, 5), (1, 3, 5), "rnn: h_0 must have shape [1, batch, 5]"),
        ((2, 3, 5), (1, 3, 5), "rnn: h_0 must have shape [1, batch, 5]"),
    ],
)
def test_another_state_stops_the_graph(h, c, words):
    module = Called(nn.LSTM(6, 5), lambda rnn, x, h, c: rnn(x, (h, c))[0])
    ours = build(module, *(torch.zeros(shape) for shape in ((4, 3, 6), (1, 3, 5), (1, 3, 5))))
    with pytest.raises(AssertionError) as caught:
        ours(torch.zeros(4, 3, 6), torch.zeros(h), torch.zeros(c))
    assert str(caught.value) == words


def test_a_cells_shapes_stop_the_graph_too():
    module = Called(nn.GRUCell(6, 5), lambda rnn, x, h, c: rnn(x, h))
    ours = build(module, torch.zeros(3, 6), torch.zeros(3, 5))
    for args in ((torch.zeros(3, 7), torch.zeros(3, 5)), (torch.zeros(3, 6), torch.zeros(1, 5)), (torch.zeros(6),) * 2):
        with pytest.raises(AssertionError, match="rnn: "):
            ours(*args)


def test_any_batch_goes():
    module = Called(nn.LSTM(6, 5, bidirectional=True, dtype=F64), lambda rnn, x, h, c: rnn(x))
    ours = build(module, x(4, 3))
    for batch in (0, 1, 7):
        assert_same(ours(x(4, batch) * 0 + 1), module(x(4, batch) * 0 + 1))


def test_what_depends_on_data_hides_only_what_comes_after_it():
    after = Called(nn.GRU(6, 5, dtype=F64), lambda rnn, x, h, c: rnn(x)[0][x[..., 0] > 0])
    before = Called(nn.GRU(6, 5, dtype=F64), lambda rnn, x, h, c: rnn(x[x[:, 0, 0] > -9])[0])
    input = x()
    assert_same(unroll(trace(after), input)(input), after(input))
    assert_same(unroll(trace(before), steps=4)(input), before(input))
    assert problems(unroll, trace(before), input) == [f"rnn: the number of time steps is unknown; {UNKNOWN}"]


def test_arguments_that_do_not_fit_are_refused():
    graph = trace(nn.Sequential(nn.Linear(7, 6), nn.GRU(6, 5)))
    problem, unknown = problems(unroll, graph, torch.zeros(4, 3, 5))
    assert unknown == f"1: the number of time steps is unknown; {UNKNOWN}"
    assert problem.startswith("args: the graph cannot be run on fake tensors like these (")
    assert problem.endswith("give arguments that fit the graph, or steps=")
    assert len(problems(unroll, graph, ())) == 2
    graph = trace(nn.Sequential(nn.GRU(6, 5), Second()))
    assert problems(unroll, graph, torch.zeros(4, 3, 7)) == [
        "0: input: has shape [4, 3, 7]; its last size must be input_size=6"
    ]
