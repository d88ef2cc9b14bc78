"""Random layers and inputs."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn.utils.rnn import pack_sequence

from tests.cases import KINDS, PLANS
from tests.checks import assert_same, gradients
from unroll import trace, unroll
from unroll.core.recurrence import Recurrence

F64 = torch.float64
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

small = st.integers(1, 5)


@st.composite
def layers(draw, kinds=KINDS):
    """A torch layer with random options, and its input size."""
    kind = draw(st.sampled_from(kinds))
    sizes = draw(small), draw(small)
    options = {"bias": draw(st.booleans()), "dtype": F64}
    if not kind.endswith("Cell"):
        options |= {
            "num_layers": draw(st.integers(1, 3)),
            "bidirectional": draw(st.booleans()),
            "batch_first": draw(st.booleans()),
        }
        if options["num_layers"] > 1:
            options["dropout"] = draw(st.sampled_from([0.0, 0.3]))
    if kind.startswith("RNN"):
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind == "LSTM" and sizes[1] > 1:
        options["proj_size"] = draw(st.integers(0, sizes[1] - 1))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return getattr(nn, kind)(*sizes, **options)


@st.composite
def calls(draw, kinds=KINDS):
    """A layer and arguments for it."""
    layer = draw(layers(kinds))
    batch = draw(st.one_of(st.none(), st.integers(0, 4)))
    lead = [] if batch is None else [batch]
    if isinstance(layer, nn.RNNCellBase):
        input, passes, output = torch.randn(*lead, layer.input_size, dtype=F64), [], layer.hidden_size
        two = isinstance(layer, nn.LSTMCell)
    else:
        steps = draw(st.integers(1, 6))
        shape = [*lead, steps] if layer.batch_first else [steps, *lead]
        input = torch.randn(*shape, layer.input_size, dtype=F64)
        passes = [layer.num_layers * (1 + layer.bidirectional)]
        output, two = layer.proj_size or layer.hidden_size, layer.mode == "LSTM"
    if not draw(st.booleans()):
        return layer, (input,)
    h = torch.randn(*passes, *lead, output, dtype=F64)
    return layer, (input, (h, torch.randn(*passes, *lead, layer.hidden_size, dtype=F64)) if two else h)


def both(function, *modules):
    """The results of two modules for the same random numbers."""
    results = []
    for module in modules:
        torch.manual_seed(3)
        results.append(function(module))
    return results


@QUICK
@given(calls(), st.sampled_from(PLANS))
def test_modules_agree(call, plan):
    layer, args = call
    theirs, ours = both(lambda m: m(*args), layer, unroll(layer, plan=plan))
    assert_same(ours, theirs)


@QUICK
@given(calls(), st.sampled_from(PLANS))
def test_gradients_agree(call, plan):
    layer, args = call
    theirs, ours = both(lambda m: gradients(m, args), layer, unroll(layer, plan=plan))
    assert_same(ours, theirs)


@settings(QUICK, max_examples=40)
@given(calls(), st.sampled_from(PLANS))
def test_graphs_agree(call, plan):
    layer, args = call
    wrapped = nn.Sequential(layer)
    graph = fx.Graph()
    input = graph.placeholder("input")
    state = [graph.placeholder("h")] if len(args) > 1 else []
    graph.output(graph.call_module("0", (input, *state)))
    module = fx.GraphModule(wrapped, graph)
    ours = unroll(module, args, plan=plan)
    ours.graph.lint()
    theirs, ours = both(lambda m: m(*args), layer, ours)
    assert_same(ours, theirs)


@QUICK
@given(layers(("LSTM", "GRU", "RNN")), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_packed_sequences_agree(layer, lengths):
    packed = pack_sequence([torch.randn(n, layer.input_size, dtype=F64) for n in lengths], enforce_sorted=False)
    theirs, ours = both(lambda m: m(packed), layer, unroll(layer))
    assert_same(ours, theirs)


@QUICK
@given(layers(("LSTM", "GRU", "RNN")), st.integers(2, 6), st.data())
def test_a_sequence_cut_in_two_is_one_sequence(layer, steps, data):
    """With the state carried over, where no direction runs backwards and nothing is drawn."""
    if layer.bidirectional:
        return
    ours = unroll(layer.eval())
    time = 1 if layer.batch_first else 0
    cut = data.draw(st.integers(1, steps - 1))
    shape = (2, steps) if layer.batch_first else (steps, 2)
    x = torch.randn(*shape, layer.input_size, dtype=F64)
    first, state = ours(x.narrow(time, 0, cut))
    second, state = ours(x.narrow(time, cut, steps - cut), state)
    whole, final = ours(x)
    assert_same((torch.cat([first, second], time), state), (whole, final))


@QUICK
@given(layers())
def test_the_reader_counts_the_parameters(layer):
    found: Recurrence = unroll(layer).recurrence
    names = [name for group in found.weight_names for name in group]
    assert names == [name for name, _ in layer.named_parameters()]
    assert found.passes == 1 if found.is_cell else layer.num_layers * (1 + layer.bidirectional)


@settings(QUICK, max_examples=30)
@given(st.data())
def test_a_traced_chain_of_layers(data):
    """Several layers in a row in one graph, each fed by the one before."""
    count = data.draw(st.integers(1, 3))
    chain, size, first = [], None, None
    for _ in range(count):
        layer = data.draw(layers(("LSTM", "GRU", "RNN")))
        layer = type(layer)(size or layer.input_size, layer.hidden_size, bidirectional=layer.bidirectional, dtype=F64)
        size = layer.hidden_size * (1 + layer.bidirectional)
        first = first or layer.input_size
        chain += [layer, First()]
    model = nn.Sequential(*chain)
    x = torch.randn(data.draw(small), data.draw(small), first, dtype=F64)
    assert_same(unroll(trace(model), (x,))(x), model(x))


class First(nn.Module):
    def forward(self, results):
        return results[0]
