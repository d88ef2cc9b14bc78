"""An unrolled module in the place of the original: what a model and its user may do with it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import unroll as package
from tests.cases import CHOSEN, EMPTY, LAYER_KINDS, PACKED, PLANS, Case, flat
from tests.checks import assert_equal, assert_same, gradients
from unroll import Unrolled, UnrollError, unroll

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


# --- what models do to their layers -----------------------------------------------------------------------------------


LAYER_ATTRIBUTES = "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size training"


@pytest.mark.parametrize("case", TWO_LAYERS, ids=str)
def test_attributes_of_layers(case):
    layer = case.layer()
    ours = unroll(layer)
    for name in LAYER_ATTRIBUTES.split():
        assert getattr(ours, name) == getattr(layer, name)
    assert ours.flatten_parameters() is None
    assert repr(ours) == repr(layer).replace(f"{case.kind}(", "UnrolledLayer(")
    assert [list(map(id, group)) for group in ours.all_weights] == [list(map(id, g)) for g in layer.all_weights]
    assert list(map(id, ours._flat_weights)) == list(map(id, layer._flat_weights))


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_attributes_of_cells(case):
    layer = case.layer()
    ours = unroll(layer)
    names = ["input_size", "hidden_size", "bias", *(["nonlinearity"] if case.kind == "RNNCell" else [])]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(layer, name) for name in names}
    assert repr(ours) == repr(layer).replace(f"{case.kind}(", "UnrolledCell(")


@pytest.mark.parametrize("case", EACH, ids=str)
def test_reset_parameters_draws_as_torch_does(case):
    layer = case.layer()
    ours = unroll(case.layer())
    for each in (layer, ours):
        torch.manual_seed(4)
        each.reset_parameters()
    assert_equal(dict(ours.named_parameters()), dict(layer.named_parameters()))


def test_options_changed_afterwards_are_heeded():
    layer = nn.GRU(6, 5, num_layers=2, dropout=0.5, dtype=F64)
    ours = unroll(layer)
    x = torch.randn(4, 3, 6, dtype=F64)
    for each in (layer, ours):
        each.batch_first, each.dropout = True, 0.0
    assert_same(ours(x), layer(x))


def test_weights_changed_in_place_are_heeded():
    layer = nn.GRU(6, 5, dtype=F64)
    ours = unroll(layer)
    x = torch.randn(4, 3, 6, dtype=F64)
    layer.weight_hh_l0.data.mul_(2)
    assert_same(ours(x), layer(x))
    ours.bias_ih_l0.data = torch.ones_like(ours.bias_ih_l0)
    assert_same(ours(x), layer(x))


def test_weights_replaced_afterwards_are_heeded():
    layer = nn.GRU(6, 5, dtype=F64)
    ours = unroll(layer)
    x = torch.randn(4, 3, 6, dtype=F64)
    for each in (layer, ours):
        each.weight_hh_l0 = nn.Parameter(torch.ones(15, 5, dtype=F64) / 7)
    assert_same(ours(x), layer(x))


def test_a_weight_that_is_missing_is_named():
    ours = unroll(nn.GRU(6, 5))
    del ours.weight_hh_l0
    with pytest.raises(UnrollError) as caught:
        ours(torch.zeros(4, 3, 6))
    assert str(caught.value) == "GRU: has no weight_hh_l0; set it before the call, as a parameter or a tensor"


def test_flat_weights_may_be_set():
    layer = nn.GRU(6, 5, dtype=F64)
    ours = unroll(nn.GRU(6, 5, dtype=F64))
    ours._flat_weights = layer._flat_weights
    x = torch.randn(4, 3, 6, dtype=F64)
    assert_same(ours(x), layer(x))


def test_weight_drop_by_hand():
    """The old way: the raw weight kept aside, the layer's replaced at each call."""

    class WeightDrop(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 5, dtype=F64)
            weight = self.rnn.weight_hh_l0
            del self.rnn._parameters["weight_hh_l0"]
            self.rnn.register_parameter("weight_hh_l0_raw", nn.Parameter(weight.data))

        def forward(self, x):
            raw = self.rnn.weight_hh_l0_raw
            self.rnn.weight_hh_l0 = nn.functional.dropout(raw, 0.5, self.training)
            return self.rnn(x)

    model, x = WeightDrop(), torch.randn(4, 3, 6, dtype=F64)
    with torch.no_grad():
        model.rnn.weight_hh_l0 = model.rnn.weight_hh_l0_raw * 1
    results = []
    for each in (model, unroll(model)):
        torch.manual_seed(2)
        results.append(each(x))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("case", [TWO_LAYERS[0], CELLS[1]], ids=str)
def test_hooks(case):
    layer, said = case.layer(F64), []
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    layer.register_forward_hook(lambda m, args, out: said.append((type(m).__name__, args[0].shape)))
    layer.register_full_backward_hook(lambda m, into, out: said.append(len(out)))
    ours = unroll(layer)
    assert_same(gradients(ours, case.args(F64)), gradients(layer, case.args(F64)))
    assert len(said) == 4
    assert [name for name, _ in said[::2]] == [type(ours).__name__, case.kind]
    assert said[1] == said[3]


def test_hooks_added_and_removed_afterwards():
    ours = unroll(nn.GRU(6, 5))
    handle = ours.register_forward_hook(lambda m, args, out: ("changed", out[1]))
    assert ours(torch.zeros(2, 3, 6))[0] == "changed"
    handle.remove()
    assert ours(torch.zeros(2, 3, 6))[0].shape == (2, 3, 5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "how", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
@pytest.mark.parametrize("case", [TWO_LAYERS[0], TWO_LAYERS[1], CELLS[0]], ids=str)
def test_parametrized_weights(case, how, when):
    layer = case.layer(F64)
    name = "weight_hh" if case.is_cell else "weight_hh_l1"
    if when == "before":
        ours = unroll(how(layer, name))
        layer.eval(), ours.eval()
        assert list(ours.state_dict()) == list(layer.state_dict())
        assert all(a is b for a, b in zip(ours.parameters(), layer.parameters(), strict=True))
    else:
        ours = unroll(copy.deepcopy(layer))
        for each in (layer, ours):
            torch.manual_seed(1)
            how(each, name).eval()
    assert parametrize.is_parametrized(ours, name)
    assert_same(ours(*case.args(F64)), layer(*case.args(F64)))
    for each in (layer, ours) if when == "after" else (layer,):
        with torch.no_grad():
            for p in each.parametrizations[name].parameters():
                p.mul_(1.5)
    assert_same(ours(*case.args(F64)), layer(*case.args(F64)))
    assert_same(gradients(ours, case.args(F64)), gradients(layer, case.args(F64)))
    assert_same(copy.deepcopy(ours)(*case.args(F64)), layer(*case.args(F64)))


def test_parametrization_removed_afterwards():
    ours = unroll(parametrizations.weight_norm(nn.GRU(6, 5), "weight_hh_l0"))
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert isinstance(ours.weight_hh_l0, nn.Parameter)
    assert type(ours) is package.modules.UnrolledLayer
    ours(torch.zeros(2, 3, 6))


def test_weight_norm_of_old():
    layer = nn.LSTM(6, 5, dtype=F64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer, "weight_hh_l0")
    ours, x = unroll(layer), torch.randn(4, 3, 6, dtype=F64)
    assert_same(ours(x), layer(x))
    with torch.no_grad():
        layer.weight_hh_l0_g.mul_(2)
    assert_same(ours(x), layer(x))
    assert list(ours.state_dict()) == list(layer.state_dict())
    nn.utils.remove_weight_norm(ours, "weight_hh_l0")
    assert_same(ours(x), layer(x))


def test_pruned_weights():
    layer = nn.GRU(6, 5, dtype=F64)
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)
    ours, x = unroll(layer), torch.randn(4, 3, 6, dtype=F64)
    assert_same(ours(x), layer(x))
    with torch.no_grad():
        layer.weight_hh_l0_orig.mul_(2)
    assert_same(ours(x), layer(x))
    prune.remove(ours, "weight_hh_l0")
    assert (ours.weight_hh_l0 == 0).sum() == 38
    assert_same(ours(x), layer(x))


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
