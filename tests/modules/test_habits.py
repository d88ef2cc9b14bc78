"""What models do to their recurrent layers, done to unrolled ones."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases import LAYER_KINDS, Case
from tests.checks import assert_equal, assert_same, gradients
from unroll import Plan, Unrolled, UnrollError, compile, export_onnx, packing, unroll

F64 = torch.float64
TWO_LAYERS = [Case(kind, num_layers=2, bidirectional=True, batch_first=True) for kind in LAYER_KINDS]
CELLS = [Case(kind) for kind in ("LSTMCell", "GRUCell", "RNNCell")]
EACH = TWO_LAYERS + CELLS


# --- what models do to their layers -----------------------------------------------------------------------------------


LAYER_ATTRIBUTES = "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size training"


@pytest.mark.parametrize("case", TWO_LAYERS, ids=str)
def test_attributes_of_layers(case):
    layer = case.layer()
    ours = unroll(layer)
    for name in LAYER_ATTRIBUTES.split():
        assert getattr(ours, name) == getattr(layer, name)
    assert ours.flatten_parameters() is None
    assert repr(ours) == f"{repr(layer)[:-1]}, unrolled)"
    assert [list(map(id, group)) for group in ours.all_weights] == [list(map(id, g)) for g in layer.all_weights]
    assert list(map(id, ours._flat_weights)) == list(map(id, layer._flat_weights))


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_attributes_of_cells(case):
    layer = case.layer()
    ours = unroll(layer)
    names = ["input_size", "hidden_size", "bias", *(["nonlinearity"] if case.kind == "RNNCell" else [])]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(layer, name) for name in names}
    assert repr(ours) == f"{repr(layer)[:-1]}, unrolled)"


@pytest.mark.parametrize("case", EACH, ids=str)
def test_every_public_name_of_the_layers_is_there(case):
    layer = case.layer()
    ours = unroll(layer)
    assert [name for name in dir(layer) if not name.startswith("_") and name not in dir(ours)] == []
    frozen = unroll(layer, freeze=True)
    gone = [name for name in dir(layer) if not name.startswith("_") and name not in dir(frozen)]
    assert set(gone) <= {"all_weights", *ours.recurrence.flat_names}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("case", [*TWO_LAYERS, Case("LSTM", proj_size=2)], ids=str)
def test_checks_and_sizes_of_torchs_layers(case, freeze):
    layer = case.layer()
    ours = unroll(layer, freeze=freeze)
    x, sizes = torch.randn(3, 4, 6), torch.tensor([4, 3])
    expected = layer.get_expected_hidden_size(x, None)
    for each in (layer, ours):
        assert each.get_expected_hidden_size(x, None) == expected
        assert each.get_expected_hidden_size(x, sizes) == layer.get_expected_hidden_size(x, sizes)
        state = torch.randn(expected)
        state = state if case.kind != "LSTM" else (state, torch.randn(layer.get_expected_cell_size(x, None)))
        each.check_forward_args(x, state, None)
        permuted = each.permute_hidden(state, torch.tensor([1, 0, 2]))
        assert_equal(permuted, layer.permute_hidden(state, torch.tensor([1, 0, 2])))
        for bad, error in ((x[..., :5], RuntimeError), (x[0], RuntimeError), (x.double(), ValueError)):
            with pytest.raises(error, match=r"input"):
                each.check_input(bad, None)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            each.check_hidden_size(x, expected, "Expected hidden {}, got {}")
    assert ours.proj_size == layer.proj_size
    if not freeze:
        assert ours.listed is None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", EACH, ids=str)
def test_names_of_classes(case):
    ours = unroll(nn.Sequential(case.layer(F64)))
    by_pickle = pickle.loads(pickle.dumps(ours))
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    torch.jit.script(ours)
    for each in (ours, by_pickle, copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert type(each[0]).__name__ == each[0]._get_name() == case.kind
        assert isinstance(each[0], Unrolled) and not isinstance(each[0], (nn.RNNBase, nn.RNNCellBase))
        assert_equal(each[0](*case.args(F64)), ours[0](*case.args(F64)))


def test_repr_tells_all_options():
    layer = nn.LSTM(3, 4)
    assert repr(unroll(layer, plan=Plan(gates="split"), freeze=True)) == "LSTM(3, 4, unrolled, gates=split, frozen)"
    plan = Plan(directions="stacked", time=4, products="sums")
    assert repr(unroll(nn.GRU(3, 4, 2, bidirectional=True), plan=plan)) == (
        "GRU(3, 4, num_layers=2, bidirectional=True, unrolled, directions=stacked, time=4, products=sums)"
    )
    cell = nn.RNNCell(3, 4, nonlinearity="relu")
    assert repr(unroll(cell, freeze=True)) == "RNNCell(3, 4, nonlinearity=relu, unrolled, frozen)"
    normed = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert repr(unroll(normed)).startswith("ParametrizedLSTM(\n  3, 4, unrolled\n  (parametrizations)")


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
    assert type(ours) is type(unroll(nn.GRU(6, 5)))
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


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5, batch_first=True)

    def forward(self, x):
        packed = pack_padded_sequence(x, torch.tensor([3, 5]), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused_in_words(layout, tmp_path):
    rows = torch.nested.nested_tensor([torch.randn(3, 3), torch.randn(5, 3)], layout=layout)
    model = nn.Sequential(nn.GRU(3, 5, batch_first=True)).eval()
    calls = [
        lambda: unroll(model)(rows),
        lambda: unroll(nn.GRUCell(3, 5))(rows),
        lambda: export_onnx(model, rows, tmp_path / "model.onnx"),
        packing(eager=True)(lambda: unroll(Packing())(rows)),
    ]
    if layout is torch.jagged:  # Dynamo takes no others
        calls += [
            lambda: torch.compile(unroll(model), backend="eager", fullgraph=True)(rows),
            lambda: compile(model, backend="eager")(rows),
        ]
    for refused in calls:
        torch.compiler.reset()
        # from a compiled model it is told by Dynamo's error
        with pytest.raises((UnrollError, torch._dynamo.exc.Unsupported), match="is a nested tensor, of rows of"):
            refused()


@pytest.mark.parametrize("plan", [Plan(), Plan(products="linear")], ids=str)
def test_parameters_are_swapped_on_conversion(plan):
    """With `set_swap_module_params_on_conversion` they stay the objects that they are, in every dtype."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        # torch's own layer holds weak references to its weights, and they cannot be swapped while it is there
        unrolled, x = unroll(nn.Sequential(nn.GRU(3, 5)), plan=plan), torch.randn(4, 2, 3)
        parameters = list(unrolled.parameters())
        with torch.no_grad():
            for dtype in (torch.float64, torch.bfloat16, torch.float32):
                unrolled.to(dtype)
                assert unrolled(x.to(dtype))[0].dtype == dtype
                assert all(a is b for a, b in zip(unrolled.parameters(), parameters, strict=True))
            unrolled.load_state_dict(nn.Sequential(other := nn.GRU(3, 5)).state_dict())
            assert_same(unrolled(x), other(x), rtol=1e-5)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
