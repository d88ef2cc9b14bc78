"""Pieces of a sequence, with the state carried from each to the next, against the whole sequence at once."""

import copy
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, rnn

from tests.by_version import SHAPES_LSTM_STATES
from tests.cases import CELL_KINDS, Case
from tests.checks import assert_equal, assert_same, gradients, problems
from unroll import Plan, Stream, Streaming, export_onnx, streaming, trace, unroll
from unroll.graphs.functions import FUNCTIONS

LAYERS = [
    Case("LSTM"),
    Case("LSTM", num_layers=2, proj_size=2),
    Case("LSTM", batch_first=True, bias=False),
    Case("GRU", num_layers=3, batch_first=True),
    Case("RNN", nonlinearity="relu"),
    Case("LSTM", form="unbatched", num_layers=2),
    Case("GRU", form="unbatched"),
]


class Voice(nn.Module):
    """A bit of everything: layers of two kinds, one called twice, and a cell in a loop over the steps."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(3, 5, num_layers=2, batch_first=True)})
        self.gru = nn.GRU(5, 5, batch_first=True)
        self.cell = nn.LSTMCell(5, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        y, _ = self.encoder["rnn"](x)
        y, _ = self.gru(self.gru(y)[0])
        state, outputs = None, []
        for t in range(y.shape[1]):
            state = self.cell(y[:, t], state)
            outputs.append(state[0])
        return torch.sigmoid(self.head(torch.stack(outputs, 1)))


NAMES = ["encoder.rnn.h", "encoder.rnn.c", "gru.h", "gru.1.h", "cell.h", "cell.c"]


class Wrapped(nn.Module):
    """A layer by the name of `layer`, and what `run` does with it."""

    def __init__(self, layer, run):
        super().__init__()
        self.layer = layer
        self.run = run

    def forward(self, *args):
        return self.run(self.layer, *args)


def voice(dtype=torch.float64):
    return Voice().to(dtype).eval()


def audio(steps=12, batch=2, dtype=torch.float64):
    return torch.randn(batch, steps, 3, dtype=dtype)


def fed(stream, x, sizes, dim=1):
    """The output of all pieces."""
    return torch.cat([stream(piece.contiguous()) for piece in x.split(sizes, dim)], dim)


def splits(total):
    """Lists of sizes of pieces that add up to a total."""
    cuts = st.sets(st.integers(1, total - 1)).map(sorted)
    return cuts.map(lambda ends: [b - a for a, b in pairwise([0, *ends, total])])


@settings(deadline=None, max_examples=30)
@given(sizes=splits(12), batch=st.integers(1, 3), plan=st.sampled_from(["merged", "paired", "split"]))
def test_any_split_gives_what_the_whole_gives(sizes, batch, plan):
    torch.manual_seed(0)
    model, x = voice(), audio(batch=batch)
    stream = Stream(streaming(model, x, plan=Plan(gates=plan)), batch)
    assert list(stream.state) == NAMES
    assert_same(fed(stream, x, sizes), model(x).detach())


@pytest.mark.parametrize("case", LAYERS, ids=str)
@pytest.mark.parametrize("sizes", [[1] * 12, [5, 1, 6]], ids=["steps", "pieces"])
def test_every_kind_of_layer(case, sizes):
    case = replace(case, steps=12)
    layer, (x, *_) = case.layer(torch.float64), case.args(torch.float64)
    streamed = streaming(layer, x)
    whole, final = layer(x)
    stream, time = Stream(streamed), 1 if case.batch_first else 0
    pieces = [stream(piece) for piece in x.split(sizes, time)]
    assert_same(torch.cat([output for output, _ in pieces], time), whole)
    assert_same(pieces[-1][1], final)
    states = final if isinstance(final, tuple) else (final,)
    assert_equal(stream.state, dict(zip(("h", "c"), pieces[-1][1] if case.kind == "LSTM" else pieces[-1][1:])))
    assert [s.shape for s in stream.initial_state().values()] == [s.shape for s in states]


@pytest.mark.parametrize("kind", CELL_KINDS)
def test_a_cell_that_is_called_once(kind):
    case = Case(kind)
    cell, (x, *_) = case.layer(torch.float64), case.args(torch.float64)
    stream, state = Stream(streaming(nn.Sequential(cell), x)), None
    for _ in range(4):
        state = cell(x, state)
        assert_same(stream(x), state)
    assert list(stream.state) == (["0.h", "0.c"] if kind == "LSTMCell" else ["0.h"])


def test_the_state_is_that_of_the_layer():
    model, x = nn.Sequential(nn.LSTM(3, 5, num_layers=2)), torch.randn(7, 2, 3)
    streamed = streaming(model, x)
    (_, (h, c)), state = streamed(x)
    assert_equal(state, {"0.h": h, "0.c": c})
    zeros = streamed.initial_state(4)
    assert_equal(zeros, {"0.h": torch.zeros(2, 4, 5), "0.c": torch.zeros(2, 4, 5)})
    assert_equal(streamed(x, state=streamed.initial_state(2)), streamed(x))
    assert all(s.dtype is torch.bfloat16 for s in streamed.to(torch.bfloat16).initial_state().values())


def test_the_model_stays_as_it_is():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.GRU(3, 5, num_layers=2, dropout=0.5))
    x = torch.randn(7, 3)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    streamed = streaming(model, x)
    assert_equal(dict(model.state_dict()), dict(before))
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model[1]) is nn.GRU and streamed.training
    assert all(a is b for a, b in zip(model.parameters(), streamed.parameters(), strict=True))
    streamed.eval()
    assert not any(module.training for module in streamed.modules())


def test_rows_of_the_state_are_rows_of_the_batch():
    model, x, other = voice(), audio(), audio()
    stream = Stream(streaming(model, x))
    stream(x[:, :5])
    for state in stream.state.values():
        state.select(-2, 1).zero_()
    mixed = torch.stack([x[0, 5:], other[1, 5:]])
    expected = torch.stack([model(x)[0, 5:], model(other[:, 5:])[1]]).detach()
    assert_same(stream(mixed), expected)
    stream.reset(1)
    assert_same(stream(x[:1]), model(x[:1]).detach())


def test_gradients_flow_through_the_state():
    model, x = nn.GRU(3, 5).double(), torch.randn(6, 2, 3, dtype=torch.float64)
    streamed = streaming(model, x)

    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = streamed.model

        def forward(self, x):
            (first, _), state = streamed(x[:2])
            (second, last), _ = streamed(x[2:], state=state)
            return torch.cat([first, second]), last

    ours = {name.removeprefix("model."): g for name, g in gradients(Pieces(), (x,)).items()}
    assert_same(ours, gradients(model, (x,)))


def test_copies_and_pickles():
    model, x = voice(), audio()
    streamed = streaming(model, x)
    for twin in (copy.deepcopy(streamed), pickle.loads(pickle.dumps(streamed)), unroll(streamed)):
        assert isinstance(twin, Streaming)
        assert_same(fed(Stream(twin), x, [3, 9]), model(x).detach())


class Doubling(nn.GRU):
    def forward(self, x):
        return super().forward(2 * x)[0]


def test_subclasses_and_parametrized_layers():
    for layer in (Doubling(3, 5), parametrizations.weight_norm(Doubling(3, 5), "weight_hh_l0")):
        model, x = nn.Sequential(layer).double(), torch.randn(7, 2, 3, dtype=torch.float64)
        streamed = streaming(model, x)
        assert_same(fed(Stream(streamed), x, [3, 4], 0), model(x).detach())
        assert_same(fed(Stream(copy.deepcopy(streamed)), x, [3, 4], 0), model(x).detach())
    twin = pickle.loads(pickle.dumps(streaming(nn.Sequential(Doubling(3, 5)), x.float())))
    assert list(twin(x.float())[1]) == ["0.h"]


def test_what_is_unrolled_already_is_streamed():
    model, x = voice(), audio()
    unrolled = unroll(model, plan=Plan(gates="split"))
    streamed = streaming(unrolled, x)
    assert streamed.model.gru.plan == Plan(gates="split")
    assert_same(fed(Stream(streamed), x, [3, 9]), model(x).detach())
    assert problems(streaming, streamed, x) == [
        "streaming(model): has states for inputs already; give the model that it was made of"
    ]


# Whose state it is


class Keeping(nn.Module):
    """A model that keeps its state in an attribute."""

    def __init__(self):
        super().__init__()
        self.own = nn.GRU(3, 3)
        self.other = nn.GRU(3, 3)
        self.hidden = None

    def forward(self, x):
        y, self.hidden = self.own(x, self.hidden)
        return self.other(y)[0]


def test_a_state_in_an_attribute_is_left_alone():
    model, x = Keeping().double(), torch.randn(7, 2, 3, dtype=torch.float64)
    streamed = streaming(model, x)
    assert model.hidden is None and list(streamed.initial_state()) == ["other.h"]
    whole = model(x)
    assert_same(fed(Stream(streamed), x, [3, 4], 0), whole)


def test_a_state_that_the_model_passes_is_left_alone():
    layers = nn.ModuleList([nn.LSTM(3, 3), nn.LSTM(3, 3)])

    def run(layers, x, *own):
        zeros = x.new_zeros(1, x.shape[1], 3)
        return layers[1](layers[0](x, own or (zeros, zeros))[0])[0]

    model, x = Wrapped(layers, run).double(), torch.randn(7, 2, 3, dtype=torch.float64)
    streamed = streaming(model, x, check=False)
    assert list(streamed.initial_state()) == ["layer.1.h", "layer.1.c"]
    first, state = streamed(x)
    assert_same(first, model(x))
    h = torch.randn(1, 2, 3, dtype=torch.float64)
    again = layers[1](layers[0](x, (h, h))[0], (state["layer.1.h"], state["layer.1.c"]))[0]
    assert_same(streamed(x, h, h, state=state)[0], again)


def test_where_leaves_layers_to_the_model():
    """A layer over the frequencies of one step begins anew in every step, in both directions if it likes."""

    class TwoWays(nn.Module):
        def __init__(self):
            super().__init__()
            self.frequency = nn.LSTM(3, 2, bidirectional=True, batch_first=True)
            self.time = nn.GRU(4, 5, batch_first=True)

        def forward(self, x):  # [B, T, K, 3]
            b, t, k, _ = x.shape
            y = self.frequency(x.reshape(b * t, k, 3))[0].reshape(b, t, k, 4).transpose(1, 2)
            return self.time(y.reshape(b * k, t, 4))[0].reshape(b, k, t, 5).transpose(1, 2)

    model, x = TwoWays().double(), torch.randn(2, 9, 6, 3, dtype=torch.float64)
    (refused,) = problems(streaming, model, x)
    assert refused.startswith("frequency: is bidirectional: its reverse direction begins at the end of the sequence")
    for start in (model, unroll(model)):
        for where in ("time", lambda name, layer: not layer.bidirectional):
            stream = Stream(streaming(start, x, where=where), 12)
            assert_same(fed(stream, x, [4, 1, 4]), model(x).detach())
    assert type(streaming(model, x, where="time").model.frequency) is nn.LSTM


def test_rows_for_each_item_of_a_batch():
    def run(layers, x):
        return layers[0](x)[0], layers[1](torch.cat([x, x, x], 1))[0]

    streamed = streaming(Wrapped(nn.ModuleList([nn.GRU(3, 4), nn.GRU(3, 5)]), run), torch.randn(7, 2, 3))
    assert [tuple(s.shape) for s in streamed.initial_state(5).values()] == [(1, 5, 4), (1, 15, 5)]


# States that are written into


class Classifier(nn.Module):
    """Its activation works in place, on the state that the layer returned."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4)
        self.activation = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.activation(self.layer(x)[1][-1]))


class Doubled(nn.Module):
    """Its cell's state is its output, doubled in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRUCell(3, 4)

    def forward(self, x):
        state = self.layer(x[0])
        state.mul_(2)
        return state


def forms(model, x, **options):
    """The streaming model in torch: as a module, a graph and a program, and those two unrolled."""
    yield streaming(model, x, **options)
    graph = streaming(trace(model), x, **options)
    programs = [streaming(torch.export.export(model, (x,), strict=strict), **options) for strict in (False, True)]
    yield from (graph, unroll(graph, steps=len(x)), *programs, *map(unroll, programs))


@pytest.mark.parametrize(("model", "steps"), [(Classifier(), 3), (Doubled(), 1)], ids=["layer", "cell"])
def test_the_state_is_as_the_layer_gave_it(model, steps):
    """What the model writes into a state that it got does not reach the next piece."""
    torch.manual_seed(0)
    model, x = copy.deepcopy(model).double(), torch.randn(3 * steps, 2, 3, dtype=torch.float64)
    h, states, outputs = None, [], []
    for piece in x.split(steps):
        h = model.layer(piece, h)[1] if steps > 1 else model.layer(piece[0], h)
        states.append(h)
        outputs.append(model.head(h[-1].relu()) if steps > 1 else 2 * h)
    for form in forms(model, x[:steps]):
        stream = Stream(form)
        for piece, output, state in zip(x.split(steps), outputs, states, strict=True):
            assert_same(stream(piece), output.detach())
            assert_same(stream.state["layer.h"], state.detach())


def test_the_state_is_as_the_layer_gave_it_in_onnx(tmp_path):
    model, x, path = Classifier().eval(), torch.randn(6, 2, 3), tmp_path / "model.onnx"
    whole = model.layer(x)[1].detach()
    assert whole.min() < 0  # so that it differs from what the activation leaves
    export_onnx(streaming(model, x[:3]), x[:3], path)
    stream = Stream(path)
    assert_same(fed(stream, x, 3, 0)[-2:], model(x).detach(), rtol=1e-5)
    assert_same(stream.state["layer.h"], whole, rtol=1e-5)


@pytest.mark.parametrize("kind", ["module", "graph", "unrolled graph", "program", "file"])
def test_streams_are_copied_and_pickled_with_their_state(kind, tmp_path, monkeypatch):
    x, model = torch.randn(6, 2, 3), nn.Sequential(nn.LSTM(3, 5)).eval()
    if kind == "file":
        monkeypatch.chdir(tmp_path)
        export_onnx(streaming(model, x[:2]), x[:2], made := Path("model.onnx"))
    else:
        source = {"module": model, "program": torch.export.export(model, (x[:2],))}.get(kind, trace(model))
        made = streaming(source, None if kind == "program" else x[:2])
        made = unroll(made, (x[:2],)) if kind == "unrolled graph" else made
    stream = Stream(made, 2)
    stream(x[:2])
    saved = pickle.dumps(stream)
    if kind == "file":
        monkeypatch.chdir(tmp_path.parent)  # as an actor may be in another folder
    copies = [copy.deepcopy(stream), pickle.loads(saved)]
    expected = stream(x[2:4])[0]
    for other in copies:
        assert torch.equal(other(x[2:4])[0], expected)
        assert_same(dict(other.state), dict(stream.state))
    # each goes on by itself
    stream(x[4:])
    assert not torch.equal(next(iter(copies[0].state.values())), next(iter(stream.state.values())))
    copies[0].reset()
    assert not next(iter(copies[0].state.values())).any()
    if kind == "file":
        session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / made)
        assert "make it of the path of the file" in problems(copy.deepcopy, Stream(session, 2))[0]


def test_the_state_of_a_stream_is_its_own():
    x = torch.randn(6, 2, 3)
    layer, cell = nn.GRU(3, 3), nn.GRUCell(3, 3)
    for form in (streaming(layer, x[:3]), streaming(torch.export.export(layer, (x[:3],)))):
        stream = Stream(form)
        for piece in x.split(3):
            output, last = stream(piece)
            before = last.clone()
            assert_equal(stream.state, {"h": before})
            stream.state["h"][:, 1] = 0
            assert_equal(last, before)
            stream.state["h"].copy_(before)
            last.zero_()
        assert_same(output, layer(x)[0][3:].detach(), rtol=1e-4)
    for form in (streaming(cell, x[0]), streaming(torch.export.export(cell, (x[0],)))):
        stream, state = Stream(form), None
        for step in x:
            state = cell(step, state)
            output = stream(step)
            assert_same(output, state.detach(), rtol=1e-4)
            output.relu_()


def scaling(layer, x):
    """A loop whose steps scale the state in place, unlike `masking` below."""
    state = None
    for step in x:
        state = layer(step, state)
        state[0].mul_(0.5)
    return state


class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRUCell(3, 4)

    def forward(self, x):
        state = self.layer(x[0])
        state.mul_(0.5)
        return self.layer(x[1], state)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_state_that_is_changed_and_passed_on_is_the_models_own(mode):
    refusal = (
        "layer: is called without a state, and also with one of the model's own that no call of it returned as it is"
    )
    x = torch.randn(5, 2, 3)
    with mode():
        model = Wrapped(nn.LSTMCell(3, 4), lambda layer, x: scaling(layer, x) if x.dim() == 3 else layer(x))
        (refused,) = problems(streaming, model.requires_grad_(False), x)
        assert refused.startswith(refusal)
        for run in (scaling, masking):  # an example of one step does not tell
            model = Wrapped(nn.LSTMCell(3, 4) if run is scaling else nn.GRUCell(3, 4), run).requires_grad_(False)
            streamed = streaming(model, x[:1])
            assert problems(streamed, x)[0].startswith(refusal)
    for graph, args in ((trace(Scaling()), (x,)), (torch.export.export(Scaling(), (x,)), ())):
        assert problems(streaming, graph, *args)[0].startswith(refusal)


def test_a_state_that_was_passed_on_may_be_written_into():
    def run(layer, x):
        first = layer(x[0])
        second = layer(x[1], first)
        return second, first.zero_()

    class Run(Scaling):
        def forward(self, x):
            return run(self.layer, x)

    model, x = Run().double(), torch.randn(4, 2, 3, dtype=torch.float64)
    expected = model.layer(x[1], model.layer(x[0])).detach()
    for form in forms(model, x[:2], check=False):
        stream = Stream(form)
        assert_same(stream(x[:2])[0], expected)
        assert_same(stream(x[2:])[0], model.layer(x[3], model.layer(x[2], expected)).detach())


# What is refused


def test_all_that_cannot_be_streamed_is_said_at_once():
    model = nn.Sequential(nn.LSTM(3, 4, bidirectional=True), nn.Module())
    model[1].deep = nn.GRU(8, 4, bidirectional=True)
    found = problems(streaming, model, torch.zeros(5, 1, 3))
    assert [problem.partition(":")[0] for problem in found] == ["0", "1.deep"]
    assert all("in one direction, or leave it out by where=" in problem for problem in found)


def packing(layer, x, lengths):
    return rnn.pad_packed_sequence(layer(rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))[0])[0]


def masking(layer, x):
    state, outputs = None, []
    for step in x:
        state = layer(step, state) * 0.5
        outputs.append(state)
    return torch.stack(outputs)


def test_layers_that_no_piece_can_tell_of():
    x = torch.randn(5, 2, 3)
    (refused,) = problems(streaming, Wrapped(nn.GRU(3, 4), packing), (x, torch.tensor([3, 5])))
    assert refused.startswith("layer: runs on a PackedSequence")
    (refused,) = problems(streaming, Wrapped(nn.GRUCell(3, 4), masking), x)
    assert refused.startswith("layer: is called without a state, and also with one of the model's own")
    (refused,) = problems(streaming, nn.Sequential(nn.Linear(3, 4)), x)
    assert refused.startswith("Sequential: calls no recurrent layer without a state")


def test_a_run_unlike_the_first():
    layer = nn.GRU(3, 3)
    by_step = Wrapped(layer, lambda layer, x: torch.cat([layer(step[None])[0] for step in x]))
    streamed = streaming(by_step, torch.randn(2, 1, 3), check=False)
    assert list(streamed.initial_state()) == ["layer.h", "layer.1.h"]
    assert "more often than with the example, 2 times" in problems(streamed, torch.randn(3, 1, 3))[0]
    assert "1 times in this run, 2 times with the example" in problems(streamed, torch.randn(1, 1, 3))[0]
    packed = streaming(Wrapped(layer, lambda layer, x: layer(x)), torch.randn(2, 1, 3))
    assert "PackedSequence" in problems(packed, rnn.pack_sequence([torch.randn(2, 3)]))[0]
    skipping = Wrapped(layer, lambda layer, x: layer(x)[0] if len(x) > 2 else x)
    (refused,) = problems(streaming, skipping, torch.randn(2, 1, 3))
    assert "calls no recurrent layer" in refused


def test_a_layer_that_the_example_left_out_is_not_forgotten():
    layers = nn.ModuleList([nn.GRU(3, 3), nn.GRU(3, 3)])
    model = Wrapped(layers, lambda layers, x: layers[0](layers[1](x)[0] if len(x) > 2 else x)[0])
    streamed = streaming(model, torch.randn(2, 1, 3), check=False)
    assert list(streamed.initial_state()) == ["layer.0.h"]
    assert problems(streamed, torch.randn(3, 1, 3))[0].startswith("layer.1: is called without a state more often")
    assert streamed(torch.randn(2, 1, 3))[0].shape == (2, 1, 3)  # a refusal leaves nothing behind


def test_states_that_do_not_fit():
    x = torch.randn(5, 2, 3)
    streamed = streaming(nn.Sequential(nn.LSTM(3, 4)), x)
    state = streamed.initial_state(2)
    call = lambda state: problems(streamed, x, state=state)  # noqa: E731
    assert call(state | {"1.h": x}) == ["state: has 1.h, which is no state; the states are: 0.h, 0.c"]
    assert call({"0.h": state["0.h"]}) == ["state: has no 0.c; give what the last call returned"]
    assert call((x, x)) == [
        "state: is tuple; give a dictionary of tensors, such as initial_state(batch), or None for zeros"
    ]
    assert "0: h_0: has shape [1, 3, 4]" in call(streamed.initial_state(3))[0]
    assert "batch=-1" in problems(streamed.initial_state, -1)[0]


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(3, 4, num_layers=2)

    def forward(self, x):
        return self.layer(x)[0]


def test_rows_that_the_example_does_not_have():
    model, x = Last(), torch.randn(5, 3)
    graph = streaming(trace(model), x)
    for form in (streaming(model, x), graph, unroll(graph, steps=5)):
        stream = Stream(form)
        assert {name: s.shape for name, s in stream.state.items()} == {"layer.h": (2, 4), "layer.c": (2, 4)}
        assert problems(stream.initial_state, 2)[0].startswith("layer.h: has shape [2, 4] in the example, which does")
    fixed = Stream(streaming(torch.export.export(model, (x[:, None].expand(5, 3, 3),))))
    assert fixed.initial_state(3)["layer.h"].shape == (2, 3, 4)
    (refused, _) = problems(fixed.initial_state, 2)
    assert refused == "batch=2: layer.h has the fixed shape [2, 3, 4]; export with dynamic_shapes for another batch"
    cell = Stream(streaming(nn.GRUCell(3, 4), x[0]))
    assert problems(cell.initial_state, 2)[0].startswith("h: has shape [4] in the example")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_arguments_that_mean_nothing():
    x = torch.randn(5, 2, 3)
    graph = trace(nn.Sequential(nn.GRU(3, 4)))
    program = torch.export.export(nn.Sequential(nn.GRU(3, 4)), (x,))
    for wrong in ({"plan": Plan()}, {"rules": {}}, {"kwargs": {}}):
        assert "was given for a graph" in problems(streaming, graph, x, **wrong)[0]
        assert "was given for a graph" in problems(streaming, program, **wrong)[0]
    assert "streaming(args=...)" in problems(streaming, program, x)[0]
    assert problems(streaming, "model.onnx")[0].startswith("streaming(model): got str")
    assert problems(streaming, torch.jit.script(nn.GRU(3, 4)), x)[0].startswith("streaming(model): got")
    assert "where='nothing'" in problems(streaming, graph, x, where="nothing")[0]
    assert "where='nothing'" in problems(streaming, program, where="nothing")[0]
    assert "where='nothing'" in problems(streaming, nn.Sequential(nn.GRU(3, 4)), x, where="nothing")[0]
    assert problems(Stream, nn.GRU(3, 4))[0].startswith("Stream(model): is a GRU without named states")
    assert problems(Stream, graph)[0].startswith("Stream(model): is a Sequential without named states")
    takes = Wrapped(nn.GRU(3, 4), lambda layer, x, state=None: layer(x))
    assert "is an argument of the model already" in problems(streaming, takes, x, kwargs={"state": 1})[0]


# Other kinds of model


class Traceable(nn.Module):
    """What symbolic tracing can follow: no loop over steps."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(3, 5, num_layers=2, batch_first=True)})
        self.gru = nn.GRU(5, 5, batch_first=True)
        self.cell = nn.LSTMCell(5, 4)
        self.last = nn.GRUCell(5, 4)

    def forward(self, x):
        y, (h, _) = self.encoder["rnn"](x)
        y, _ = self.gru(self.gru(y)[0])
        once = self.cell(y[:, 0])
        twice = self.cell(y[:, 1], once)
        return y + h[-1].unsqueeze(1), twice[1] + self.last(y[:, -1])


@pytest.mark.parametrize("unrolled", [False, True], ids=["as it is", "unrolled"])
def test_a_graph_module(unrolled):
    model, x = Traceable().double(), audio()
    expected = Stream(streaming(model, x, check=False))
    graph = trace(model)
    code = graph.code
    streamed = streaming(graph, x[:, :3], check=False)
    if unrolled:
        streamed = unroll(streamed, steps=3)
        assert not [node for node in streamed.graph.nodes if node.op == "call_module"]
    assert graph.code == code and isinstance(streamed, torch.fx.GraphModule)
    assert next(streamed.parameters()) is next(model.parameters())
    stream = Stream(streamed)
    assert set(stream.state) == set(expected.state)
    for piece in x.split(3, 1):
        assert_same(stream(piece), expected(piece))
        assert_same({name: stream.state[name] for name in expected.state}, expected.state)
    assert {name: s.shape for name, s in stream.initial_state(5).items()} == {
        name: s.shape for name, s in expected.initial_state(5).items()
    }


def test_graphs_of_functional_calls():
    """`make_fx` keeps no modules: zeros of a layer's own cannot be told from the model's, and count as the layer's."""
    model, x = nn.Sequential(nn.LSTM(3, 5, num_layers=2)).double(), torch.randn(6, 2, 3, dtype=torch.float64)
    graph = make_fx(lambda x: model(x)[0], tracing_mode="real", pre_dispatch=True)(x[:2])
    streamed = streaming(graph, x[:2])
    assert_same(fed(Stream(streamed), x, 2, 0), model(x)[0].detach())
    assert_same(fed(Stream(unroll(streamed)), x, 2, 0), model(x)[0].detach())


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 4)

    def forward(self, x, lengths):
        return packing(self.layer, x, lengths)


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.GRUCell(3, 4)

    def forward(self, x):
        return self.layer(x[1], 2 * self.layer(x[0]))


def test_refusals_in_graphs():
    model = nn.Sequential(nn.GRU(3, 4, bidirectional=True))
    for graph in (trace(model), torch.export.export(model, (torch.zeros(5, 1, 3),))):
        args = (torch.zeros(5, 1, 3),) if isinstance(graph, torch.fx.GraphModule) else ()
        (refused,) = problems(streaming, graph, *args)
        assert refused.startswith("0: is bidirectional")
    x = torch.randn(5, 2, 3)
    assert "the size of its state is unknown" in problems(streaming, trace(nn.Sequential(nn.GRU(3, 4))))[0]
    assert "0: input: has shape [5, 2, 2]" in problems(streaming, trace(nn.Sequential(nn.GRU(3, 4))), x[..., :2])[0]
    behind = trace(nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 4)))
    assert "cannot be run on fake tensors" in problems(streaming, behind, x[..., :2])[0]
    (refused,) = problems(streaming, trace(nn.Sequential(Doubling(3, 4))), x)
    assert refused.startswith("0: has a forward of its own")
    (refused,) = problems(streaming, trace(Packing()), (x, torch.tensor([5, 3])))
    assert refused.startswith("layer: runs on a PackedSequence")
    (refused,) = problems(streaming, trace(Mixing()), x)
    assert refused.startswith("layer: is called without a state, and also")
    flat = torch.export.export(nn.Sequential(nn.GRU(3, 4)), (x,)).module()
    assert "flattens its arguments" in problems(streaming, flat, x)[0]
    done = torch.export.export(unroll(nn.Sequential(nn.GRU(3, 4))), (x,))
    assert "calls no recurrent layer" in problems(streaming, done)[0]


shaped = pytest.mark.skipif(not SHAPES_LSTM_STATES, reason="torch.export refuses the model itself")


@shaped
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program(strict):
    model, x = Traceable().double(), audio()
    expected = Stream(streaming(model, x, check=False))
    batch = torch.export.Dim("batch", min=2)
    piece = x[:, :3].contiguous()
    program = torch.export.export(model, (piece,), dynamic_shapes=({0: batch},), strict=strict)
    code = program.graph_module.code
    streamed = streaming(program, check=False)
    assert program.graph_module.code == code and type(streamed) is type(program)
    names = [spec.arg.name for spec in streamed.graph_signature.input_specs][-7:]
    assert set(names) == {f"state_{name.replace('.', '_')}" for name in expected.state}
    explicit = unroll(streamed)
    assert not [node for node in explicit.graph.nodes if node.target in FUNCTIONS]
    wide = torch.cat([x, x, x])
    for program in (streamed, explicit):
        stream = Stream(program)
        expected.reset(2)
        for piece in x.split(3, 1):
            assert_same(stream(piece), expected(piece))
            assert_same({name: stream.state[name] for name in expected.state}, expected.state)
        stream.reset(6)
        expected.reset(6)
        for piece in wide.split(3, 1):
            assert_same(stream(piece), expected(piece))


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_that_is_the_whole_program(strict):
    x = torch.randn(4, 2, 3)
    for layer, args in ((nn.LSTM(3, 3), x), (nn.GRUCell(3, 3), x[0])):
        program = torch.export.export(layer, (args,), strict=strict)
        names = list(Stream(streaming(layer, args)).state)
        assert list(Stream(streaming(program)).state) == names == ["h", "c"][: len(names)]
        assert list(Stream(unroll(streaming(program.run_decompositions({})))).state) == names
    program = torch.export.export(nn.GRU(3, 3, bidirectional=True), (x,), strict=strict)
    assert problems(streaming, program)[0].startswith("gru: is bidirectional")


def test_zeros_of_the_models_own_in_a_program():
    def run(layers, x):
        y, _ = layers[0](x, x.new_zeros(1, x.shape[1], 3))
        return layers[1](y)[0]

    model, x = Wrapped(nn.ModuleList([nn.GRU(3, 3), nn.GRU(3, 3)]), run), torch.randn(4, 2, 3)
    streamed = streaming(torch.export.export(model, (x,)), check=False)
    assert list(Stream(streamed).state) == ["layer.1.h"]


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # that a run keeps notes, and ends
@pytest.mark.parametrize("strict", [False, True])
def test_a_streaming_module_is_exported(strict):
    model, x = voice(), audio()
    streamed = streaming(model, x)
    piece = x[:, :4].contiguous()
    program = torch.export.export(streamed, (piece,), {"state": streamed.initial_state(2)}, strict=strict)
    assert_same(fed(Stream(program), x, 4), model(x).detach())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_a_streaming_module_is_compiled(backend):
    torch._dynamo.reset()
    model, x = voice(), audio()
    streamed = streaming(model, x)
    compiled = torch.compile(streamed, backend=backend, fullgraph=True)
    state, outputs = streamed.initial_state(2), []
    with torch.no_grad():
        for piece in x.split(3, 1):
            output, state = compiled(piece, state=state)
            outputs.append(output)
    assert_same(torch.cat(outputs, 1), model(x).detach())


# ONNX


def test_an_onnx_file_has_the_names(tmp_path):
    model, x = voice(torch.float32), audio(dtype=torch.float32)
    streamed, path = streaming(model, x), tmp_path / "voice.onnx"
    piece = x[:, :3].contiguous()
    export_onnx(streamed, piece, path, input_names=["x"], output_names=["y"], dynamic_shapes=({0: "batch"},))
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["x", *NAMES]
    assert [value.name for value in graph.output] == ["y", *(f"{name}.next" for name in NAMES)]
    assert not {"LSTM", "GRU", "Scan", "Loop"} & {node.op_type for node in graph.node}
    stream = Stream(path, 2)
    assert_same(fed(stream, x, 3), model(x).detach(), rtol=1e-5)
    stream.reset(1)
    assert_same(fed(stream, x[:1], 3), model(x[:1]).detach(), rtol=1e-5)
    assert problems(stream)[0] == "Stream: 0 arguments and none by name were given; give x"
    assert (
        "has no cell.c" in problems(stream._run, x, state={n: s for n, s in stream.state.items() if n != "cell.c"})[0]
    )


@pytest.mark.parametrize("kind", ["module", "graph", "program"])
def test_a_dynamic_number_of_steps_in_onnx(kind, tmp_path):
    """In a file, a piece may have any number of steps, which run in a loop."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
            self.gru = nn.GRU(5, 4, batch_first=True)

        def forward(self, x):
            return torch.sigmoid(self.gru(self.lstm(x)[0])[0])

    model, x, path = Model().double(), audio(20), tmp_path / "model.onnx"
    open_sizes = ({0: "batch", 1: "steps"},)
    if kind == "program":
        with pytest.raises(Exception, match="specialized"):  # torch reads the number of steps of an nn.GRU
            torch.export.export(model.eval(), (x,), dynamic_shapes=({1: torch.export.Dim("steps")},))
        return
    streamed = streaming(model.eval() if kind == "module" else trace(model.eval()), x)
    export_onnx(streamed, x, path, input_names=["x"], dynamic_shapes=open_sizes)
    for sizes in ([1] * 20, [7, 1, 12], [20]):
        assert_same(fed(Stream(path, 2), x, sizes), model(x).detach())


@shaped
def test_a_program_to_onnx(tmp_path):
    model, x, path = Traceable().eval(), audio(dtype=torch.float32), tmp_path / "model.onnx"
    piece = x[:, :3].contiguous()
    export_onnx(streaming(torch.export.export(model, (piece,)), check=False), None, path)
    stream, expected = Stream(path), Stream(streaming(model, x, check=False))
    assert set(stream.state) == set(expected.state)
    for piece in x.split(3, 1):
        assert_same(stream(piece), expected(piece), rtol=1e-5)
    assert "batch=3: encoder.rnn.h has the fixed shape" in problems(Stream, path, 3)[0]


def test_a_file_of_an_open_batch_begins_with_as_many_rows_as_the_first_piece(tmp_path):
    model, x, path = Last().eval(), torch.randn(6, 2, 3), tmp_path / "model.onnx"
    export_onnx(streaming(model, x), x, path, dynamic_shapes=({0: "steps", 1: "batch"},))
    stream = Stream(path)
    for rows in (2, 5, 1):
        x = torch.randn(6, rows, 3)
        stream.reset()
        assert stream.state is None
        assert_same(fed(stream, x, [1, 5], 0), model(x).detach(), rtol=1e-5)
        assert stream.state["layer.h"].shape == (2, rows, 4) == stream.initial_state(rows)["layer.c"].shape
    stream.reset(3)
    assert "fails in ONNX Runtime" in problems(stream, x)[0]


def test_a_file_of_any_length_with_a_fixed_batch_tells_it(tmp_path):
    model, x, path = Last().eval(), torch.randn(6, 2, 3), tmp_path / "model.onnx"
    export_onnx(streaming(model, x), x, path, dynamic_shapes=({0: "steps"},))
    assert_same(Stream(path)(x), Stream(streaming(model, x), batch=2)(x), rtol=1e-5)


def test_a_file_whose_states_have_more_rows_than_its_input(tmp_path):
    def run(layers, x):
        return layers[1](torch.cat([layers[0](x)[0], x], 1))[0]

    model, path = Wrapped(nn.ModuleList([nn.GRU(3, 3), nn.GRU(3, 4)]), run).eval(), tmp_path / "model.onnx"
    x = torch.randn(2, 3, 3)
    export_onnx(streaming(model, x[:1]), x[:1], path, dynamic_shapes=({1: torch.export.Dim.AUTO},))
    assert "of which the batch is not told; set the state yourself" in problems(Stream, path, 3)[0]
    stream = Stream(path)
    (refused,) = problems(stream, x[:1])
    assert refused.startswith("layer.1.h: has shape [1, '2*") and refused.endswith("a dictionary of tensors")
    stream.state = {"layer.0.h": torch.zeros(1, 3, 3), "layer.1.h": torch.zeros(1, 6, 4)}
    assert_same(fed(stream, x, 1, 0), model(x).detach(), rtol=1e-5)


def test_an_output_that_is_a_state(tmp_path):
    model, x, path = nn.GRU(3, 5).eval(), torch.randn(4, 2, 3), tmp_path / "gru.onnx"
    export_onnx(streaming(model, x), x, path, input_names=["x"], output_names=["y", "last"])
    stream = Stream(path)
    for _ in range(3):
        _, last = stream(x)
        assert_equal(last, stream.state["h"])
    assert [value.name for value in onnx.load(path).graph.output] == ["y", "last", "h.next"]
    export_onnx(model, x, path)
    assert problems(Stream, path)[0].startswith("Stream(file): has no input x with an output x.next")


@pytest.mark.parametrize("kind", ["module", "graph", "program"])
def test_names_that_fit_no_state_are_refused(kind, tmp_path):
    model, x, path = nn.Sequential(nn.LSTM(3, 4)).eval(), torch.randn(5, 2, 3), tmp_path / "model.onnx"
    form = {
        "module": lambda: streaming(model, x),
        "graph": lambda: streaming(trace(model), x),
        "program": lambda: streaming(torch.export.export(model, (x,))),
    }[kind]()
    stream = Stream(form)
    state = stream.state
    stream.state = state | {"1.h": x}
    assert problems(stream, x) == ["state: has 1.h, which is no state; the states are: 0.h, 0.c"]
    stream.state = {"0.h": x}
    assert problems(stream, x) == ["state: has no 0.c; give what the last call returned"]
    args = None if kind == "program" else x
    found = problems(export_onnx, form, args, path, input_names=["x", "hidden", "cell"])
    fix = "leave it out: states keep their own names"
    assert found == [
        f"hidden: is to be the name of the state 0.h; {fix}",
        f"cell: is to be the name of the state 0.c; {fix}",
    ]
    found = problems(export_onnx, form, args, path, output_names=["y", "h", "c", "0.h.next", "cell"])
    assert found == [f"cell: is to be the name of the state 0.c.next; {fix}"]
    export_onnx(form, args, path, input_names=["x", "0.h", "0.c"])
    if kind == "graph":
        with pytest.raises(AssertionError, match="has a name which is no state"):
            form(x, state | {"1.h": x})


def test_dynamic_shapes_of_one_argument(tmp_path):
    """The sizes of the only argument, as a tuple: not one for each argument."""
    model, x, path = nn.Sequential(nn.GRU(3, 4)).eval(), torch.randn(5, 2, 3), tmp_path / "model.onnx"
    several = Wrapped(nn.GRU(3, 4), lambda layer, x, y: layer(x + y)[0]).eval()  # takes `*args`
    batch = torch.export.Dim("b")
    static = torch.export.Dim.STATIC
    for shapes in ({"input": (static, batch, static)}, {"input": {1: batch}}, ({1: batch},)):
        export_onnx(streaming(model, x), x, path, dynamic_shapes=shapes)
        wide = torch.randn(5, 3, 3)
        assert_same(Stream(path, 3)(wide), model(wide), rtol=1e-5)
    export_onnx(streaming(several, (x, x)), (x, x.clone()), path, dynamic_shapes={"args": ({1: batch}, {1: batch})})
    assert_same(Stream(path, 3)(wide, wide), several(wide, wide).detach(), rtol=1e-5)


# Drift


def test_no_drift_in_ten_thousand_steps():
    """In float32 the streamed states are as far from float64's as those of torch's layer on the whole sequence."""
    exact = nn.Sequential(nn.LSTM(4, 16, num_layers=2)).double()
    model, x = copy.deepcopy(exact).float(), torch.randn(10_000, 1, 4)
    with torch.no_grad():
        reference, whole = exact(x.double())[0], model(x)[0]
        stream = Stream(streaming(model, x[:1]), 1)
        pieces = torch.cat([stream(piece)[0] for piece in x.split([1] * 1000 + [500] * 18)])
        stream = Stream(streaming(exact, x[:1].double()), 1)
        double = torch.cat([stream(piece)[0] for piece in x.double().split(500)])
    torchs, ours = (whole - reference).abs(), (pieces - reference).abs()
    assert ours.max() <= 2 * torchs.max() + torch.finfo(torch.float32).eps
    assert ours[-1000:].max() <= 2 * ours[:1000].max()  # it does not grow
    assert_same(double, reference)
