"""An unrolled module in the place of the original: its results, its parameters, its copies."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.cases import CHOSEN, EMPTY, LAYER_KINDS, PACKED, PLANS, Case, flat
from tests.checks import assert_equal, assert_same, gradients
from unroll import Unrolled, unroll

F64 = torch.float64
TWO_LAYERS = [Case(kind, num_layers=2, bidirectional=True, batch_first=True) for kind in LAYER_KINDS]
CELLS = [Case(kind) for kind in ("LSTMCell", "GRUCell", "RNNCell")]
EACH = TWO_LAYERS + CELLS


class Model(nn.Module):
    """A model with a layer under two names and one in a container."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rnn = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.5)
        self.same = self.rnn
        self.stack = nn.ModuleList([nn.GRU(10, 4, batch_first=True), nn.GRU(4, 4, batch_first=True)])
        self.cell = nn.GRUCell(4, 3)

    def forward(self, tokens):
        self.rnn.flatten_parameters()
        x, _ = self.rnn(self.embed(tokens))
        y, _ = self.same(self.embed(tokens))
        for layer in self.stack:
            x, _ = layer(x + y if layer is self.stack[0] else x)
        return self.cell(x[:, -1])


def tokens():
    return torch.randint(0, 11, (3, 7))


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", CHOSEN + EMPTY + PACKED, ids=str)
def test_result_is_torchs(case, plan):
    layer = case.layer(F64)
    assert_same(unroll(layer, plan=plan)(*case.args(F64)), layer(*case.args(F64)))


@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_gradients_are_torchs(case):
    layer = case.layer(F64)
    ours, theirs = (gradients(f, case.args(F64)) for f in (unroll(layer), layer))
    assert ours.keys() == theirs.keys()
    assert_same(ours, theirs)


@pytest.mark.parametrize("case", CHOSEN[:6] + PACKED, ids=str)
def test_keyword_arguments(case):
    layer = case.layer(F64)
    input, *hx = case.args(F64)
    assert_same(unroll(layer)(input=input, hx=hx[0] if hx else None), layer(*case.args(F64)))


def test_state_may_be_a_list_where_torch_takes_one():
    case = Case("LSTM", state=True)
    layer = case.layer(F64)
    input, state = case.args(F64)
    assert_same(unroll(layer)(input, list(state)), layer(input, list(state)))


def test_state_goes_round():
    """Two halves with the state carried over are the whole."""
    layer = unroll(nn.LSTM(6, 5, num_layers=2, dtype=F64))
    x = torch.randn(8, 3, 6, dtype=F64)
    first, state = layer(x[:4])
    second, state = layer(x[4:], state)
    whole, last = layer(x)
    assert_same((torch.cat([first, second]), state), (whole, last))


def test_model():
    model = Model().double().eval()
    assert_same(unroll(model)(tokens() * 0 + 3), model(tokens() * 0 + 3))


def test_any_length_and_batch_after_unrolling():
    layer = nn.GRU(6, 5, dtype=F64)
    ours = unroll(layer)
    for steps, batch in ((1, 1), (9, 2), (3, 0), (40, 5)):
        x = torch.randn(steps, batch, 6, dtype=F64)
        assert_same(ours(x), layer(x))


def test_input_without_grad_gives_results_without_grad():
    layer = unroll(nn.GRU(6, 5))
    x = torch.randn(2, 3, 6)
    assert layer(x)[0].requires_grad
    with torch.no_grad():
        assert not layer(x)[0].requires_grad
    with torch.inference_mode():
        assert layer(x)[0].is_inference()
    assert not layer.requires_grad_(False)(x)[0].requires_grad


@pytest.mark.parametrize("form", ["batched", "unbatched", "packed"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_results_own_their_memory(kind, steps, form):
    """What a model does in place to the output or to the state leaves the other alone, and the gradients right."""
    case = Case(kind, form=form, steps=steps, batch=1 if steps == 1 else 3)
    layer = case.layer(F64)

    def model(layer, work):
        output, state = layer(*case.args(F64))
        work(output.data if form == "packed" else output, state if isinstance(state, tuple) else (state,))
        return [*flat(output), *flat(state)]

    def to_output(output, states):
        output.mul_(2)

    def to_states(output, states):
        for state in states:
            state.mul_(2)

    def cut(output, states):
        for state in states:
            state.detach_()

    for work in (to_output, to_states) if form == "unbatched" else (to_output, to_states, cut):
        theirs, ours = model(layer, work), model(unroll(layer), work)
        assert_same(ours, theirs)
        for results in (theirs, ours):
            layer.zero_grad()
            results[0].sum().backward()
            results.append([p.grad.clone() for p in layer.parameters()])
        assert_same(ours[-1], theirs[-1])


# --- the same parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EACH, ids=str)
def test_parameters_are_the_same_objects(case):
    layer = case.layer()
    ours, theirs = dict(unroll(layer).named_parameters()), dict(layer.named_parameters())
    assert list(ours) == list(theirs)
    assert all(ours[name] is theirs[name] for name in ours)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_state_dict_loads_both_ways(case):
    layer = case.layer()
    ours = unroll(case.layer(seed=5))
    assert list(ours.state_dict()) == list(layer.state_dict())
    assert ours.load_state_dict(layer.state_dict(), strict=True) == ([], [])
    assert_equal(ours(*case.args()), unroll(layer)(*case.args()))
    back = case.layer(seed=7)
    assert back.load_state_dict(ours.state_dict(), strict=True) == ([], [])
    assert_equal(back(*case.args()), layer(*case.args()))


def test_two_names_stay_one_layer():
    ours = unroll(Model())
    assert ours.rnn is ours.same
    assert [name for name, m in ours.named_modules(remove_duplicate=False) if m is ours.rnn] == ["rnn", "same"]
    assert list(ours.state_dict()) == list(Model().state_dict())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.GRU(5, 5), nn.GRU(5, 5))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    ours = unroll(model)
    assert ours[1].weight_hh_l0 is ours[0].weight_hh_l0 is model[0].weight_hh_l0


def test_training_the_unrolled_trains_the_original():
    model = Model().eval()
    ours, input = unroll(model), tokens()
    before = model(input)
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    ours(input).square().sum().backward()
    optimizer.step()
    after = model(input)
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, ours(input))


def test_training_runs_alike():
    """Three steps of Adam on the original and on the unrolled copy end at the same weights."""
    model = Model().double()
    ours = unroll(copy.deepcopy(model))
    batches = [tokens() for _ in range(3)]
    for each in (model, ours):
        torch.manual_seed(3)
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01)
        for batch in batches:
            optimizer.zero_grad()
            each(batch).square().sum().backward()
            optimizer.step()
    assert_same(dict(ours.named_parameters()), dict(model.named_parameters()), rtol=1e-6)


def test_nothing_recurrent_is_left_and_the_original_is_untouched():
    model = Model()
    layers = [type(m) for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    ours = unroll(model)
    assert not any(isinstance(m, (nn.RNNBase, nn.RNNCellBase)) for m in ours.modules())
    assert sum(isinstance(m, Unrolled) for m in ours.modules()) == 4
    assert [type(m) for m in model.modules()] == layers
    assert_equal(model.state_dict(), weights)
    for name, m in model.named_modules():
        assert vars(m).keys() == attributes[name].keys()
        assert all(vars(m)[key] is value for key, value in attributes[name].items())


def test_unrolling_twice_changes_nothing_more():
    once = unroll(Model().double().eval())
    twice = unroll(once)
    assert str(twice) == str(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    input = tokens()
    assert_equal(twice(input), once(input))
    assert all(a is b for a, b in zip(twice.parameters(), once.parameters(), strict=True))


# --- copies and files -------------------------------------------------------------------------------------------------


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies(again):
    ours = unroll(Model().eval())
    other = again(ours)
    input = tokens()
    assert_equal(other(input), ours(input))
    assert not any(a is b for a, b in zip(other.parameters(), ours.parameters(), strict=True))
    assert other.rnn is other.same


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_converted_afterwards(dtype):
    case = TWO_LAYERS[0]
    ours = unroll(case.layer()).to(dtype)
    output, states = ours(*case.args(dtype))
    assert {output.dtype, *(s.dtype for s in states)} == {dtype}
    if dtype == F64:
        torch.testing.assert_close(output, case.layer(F64)(*case.args(F64))[0], rtol=1e-5, atol=1e-6)


def test_half_and_meta_afterwards():
    ours = unroll(nn.GRU(6, 5))
    assert ours.half()(torch.zeros(2, 3, 6).half())[0].dtype == torch.float16
    assert unroll(nn.GRU(6, 5)).to("meta")(torch.zeros(2, 3, 6, device="meta"))[0].shape == (2, 3, 5)
    assert unroll(nn.GRU(6, 5, device="meta"))(torch.zeros(2, 3, 6, device="meta"))[0].device.type == "meta"


def test_a_half_converted_original_converts_the_shared_parameters():
    layer = nn.GRU(6, 5)
    ours = unroll(layer)
    layer.double()
    assert ours(torch.zeros(2, 3, 6, dtype=F64))[0].dtype == F64
