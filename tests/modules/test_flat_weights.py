"""The list `_flat_weights`, with which torch's layers run: replaced, changed, and set at each call."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

import unroll as package
from tests.cases import LAYER_KINDS
from tests.checks import assert_equal, assert_same, gradients, problems
from unroll import Plan, export_onnx, streaming, trace, unroll

F64 = torch.float64


class Adapted(nn.GRU):
    """Sets its list at each call."""

    def forward(self, x, hx=None):
        self._flat_weights = [getattr(self, name) * 0.9 for name in self._flat_weights_names]
        return super().forward(x, hx)


class Wrapper(nn.Module):
    """Changes the list of a layer at each call."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, 2, dtype=F64)

    def forward(self, x, hx=None):
        self.rnn._flat_weights[5] = self.rnn.weight_hh_l1 * 0.5
        return self.rnn(x, hx)


def x():
    return torch.randn(4, 3, 6, dtype=F64)


def replaced(kind="LSTM", **options):
    """A model with a layer whose list has another weight than the layer, that has gradients of its own."""
    model = nn.Sequential(getattr(nn, kind)(6, 5, dtype=F64, **options)).eval()
    weight = model[0].weight_hh_l0
    model[0]._flat_weights[1] = weight.detach().mul(3).requires_grad_()
    return model


def adapted():
    return nn.Sequential(Adapted(6, 5, dtype=F64)).eval()


def wrapper():
    return Wrapper().eval()


def run_before(make):
    def made():
        model = make()
        model(x())
        return model

    return made


MODELS = {"replaced": replaced, "adapted": adapted, "wrapper": wrapper}
MODELS |= {f"{name}, run before": run_before(make) for name, make in MODELS.items()}
each = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@each
def test_runs_with_the_list(make):
    model, input = make(), x()
    ours = unroll(model)
    for candidate in (ours, unroll(ours), unroll(unroll(model), plan=Plan(gates="split"))):
        for _ in range(3):
            assert_same(candidate(input), model(input))
        assert_same(gradients(candidate, (input,)), gradients(model, (input,)))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}], ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_kinds_of_layers(kind, options):
    model = replaced(kind, **options)
    ours, packed = unroll(model), pack_sequence([x()[:, 0], x()[:2, 1]])
    assert_same(ours(x().zero_()), model(x().zero_()))
    assert_same(ours(packed), model(packed))


def both():
    layer = nn.GRU(6, 5, dtype=F64)
    return layer, unroll(copy.deepcopy(layer))


def weights():
    return [torch.ones(15, 6, dtype=F64) / 6, torch.ones(15, 5, dtype=F64) / 5, *torch.ones(2, 15, dtype=F64)]


def change(layer):
    layer._flat_weights[1] = weights()[1]


def set_whole(layer):
    layer._flat_weights = weights()


def set_list_and_weight(layer):
    set_whole(layer)
    layer.weight_hh_l0 = nn.Parameter(weights()[1] * 2)


def set_without_names(layer):
    del layer.weight_hh_l0
    change(layer)


def convert(layer):
    set_whole(layer)
    layer.to(F64)


def keep_list(layer):
    kept = layer._flat_weights
    kept[:] = weights()


def same_again(layer):
    layer._flat_weights[:2] = weights()[:2]
    layer.weight_hh_l0 = layer.weight_hh_l0


def load(layer):
    change(layer)
    layer.load_state_dict(nn.GRU(6, 5, dtype=F64).state_dict())


def load_assigned(layer):
    change(layer)
    layer.load_state_dict({name: p.detach() * 2 for name, p in layer.named_parameters()}, assign=True)


def set_while_called_with_others(layer):
    set_whole(layer)
    torch.func.functional_call(layer, {"weight_hh_l0": weights()[1] * 4}, (torch.ones(2, 3, 6, dtype=F64),))


def parametrize(layer):
    set_whole(layer)
    parametrizations.weight_norm(layer, "weight_hh_l0")


def init_anew(layer):
    set_whole(layer)
    layer._init_flat_weights()


HABITS = (change, set_whole, set_list_and_weight, set_without_names, convert, keep_list, same_again, load)
HABITS += (load_assigned, set_while_called_with_others, parametrize, init_anew)


@pytest.mark.parametrize("habit", HABITS, ids=lambda f: f.__name__)
def test_when_the_list_is_run_with_and_when_it_is_dropped(habit):
    pair, input = both(), x()
    with torch.random.fork_rng():
        for layer in pair:
            torch.manual_seed(3)
            habit(layer)
    layer, ours = pair
    assert_same(ours(input), layer(input))
    if habit is not parametrize:  # torch cannot copy what was computed
        assert_same(copy.deepcopy(ours)(input), copy.deepcopy(layer)(input))
        assert_same(pickle.loads(pickle.dumps(ours))(input), pickle.loads(pickle.dumps(layer))(input))
    assert_same(ours(input), layer(input))


def test_functional_calls_of_a_layer_that_sets_its_list():
    model, input = adapted(), x()
    ours = unroll(model)
    others = {name: p.detach() * 2 for name, p in model.named_parameters()}
    for _ in range(2):
        assert_same(
            torch.func.functional_call(ours, others, (input,)), torch.func.functional_call(model, others, (input,))
        )
        for _ in range(2):
            assert_same(ours(input), model(input))


def test_a_list_that_nobody_reaches_for_is_not_kept():
    ours = unroll(nn.LSTM(6, 5, dtype=F64))
    ours(x())
    assert ours.listed is None and "listed" not in [key for key, value in vars(ours).items() if value is not None]


def test_frozen_layers_have_folded_the_list():
    model, input = replaced(), x()
    assert_same(unroll(model, freeze=True)(input), model(input))
    ours = unroll(nn.Sequential(nn.GRU(6, 5, dtype=F64)))
    ours[0]._flat_weights = weights()
    assert_same(unroll(ours, freeze=True)(input), ours(input))
    (problem,) = problems(unroll, adapted(), freeze=True)
    assert problem == "0: Adapted reaches for _flat_weights in its own code; leave the layer out by where="


@each
def test_streams_run_with_the_list(make):
    model, input = make(), x()
    streamed = streaming(model, input)
    (first, _), state = streamed(input[:3])
    (second, _), _ = streamed(input[3:], state=state)
    assert_same(torch.cat([first, second]), model(input)[0])


@each
@pytest.mark.filterwarnings("ignore:A model attribute .* requires gradient")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_have_the_list_or_it_is_named(make, strict):
    model, input = make(), x()
    ours = unroll(model)
    if isinstance(model, nn.Sequential) and type(model[0]) is nn.LSTM and not strict:
        (problem,) = problems(torch.export.export, ours, (input,), strict=False)
        assert "_flat_weights" in problem
        return
    program = torch.export.export(ours, (input,), strict=strict)
    assert_same(program.module()(input), model(input))
    for _ in range(2):
        assert_same(ours(input), model(input))


@each
def test_compiled_models_run_with_the_list(make):
    model, input = make(), x()
    torch._dynamo.reset()
    for compiled in (
        torch.compile(unroll(model), fullgraph=True, backend="aot_eager"),
        package.compile(model, backend="aot_eager"),
    ):
        for _ in range(2):
            assert_same(compiled(input), model(input))
    torch._dynamo.reset()


@each
def test_files_have_the_list_or_it_is_named(make, tmp_path):
    model, input = make().float(), x().float()
    if isinstance(model, nn.Sequential) and type(model[0]) is nn.LSTM:
        model[0]._flat_weights[1] = model[0].weight_hh_l0.detach() * 3
        (problem,) = problems(export_onnx, model, (input,), tmp_path / "m.onnx")
        assert "_flat_weights" in problem
    else:
        export_onnx(model, (input,), tmp_path / "m.onnx")


class Dropped(nn.LSTM):
    """Gives a weight its name at each call alone, so that the list alone has it before the first."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.raw = nn.Parameter(self._parameters.pop("weight_hh_l0"))

    def forward(self, x, hx=None):
        self.weight_hh_l0 = self.raw.sin()
        return super().forward(x, hx)


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_a_name_that_gets_its_weight_in_the_call_is_exported(tmp_path):
    model, input = nn.Sequential(Dropped(6, 5, dtype=F64)).eval(), x()
    assert not hasattr(model[0], "weight_hh_l0")
    export_onnx(model, input, tmp_path / "m.onnx")  # its check compares the file with the model
    program = torch.export.export(unroll(model), (input,), strict=False)
    assert_same(program.module()(input), model(input))


@each
def test_graphs_name_the_list(make):
    model = make()
    found = problems(unroll, trace(model), x())
    assert any("_flat_weights" in problem or "has a forward of its own" in problem for problem in found)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripts_name_the_list():
    ours = unroll(replaced())
    (problem,) = problems(torch.jit.script, ours)
    assert "_flat_weights" in problem
    ours[0]._init_flat_weights()
    torch.jit.script(ours)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each
def test_traces_run_with_the_list(make):
    model, input = make().requires_grad_(False), x()
    if isinstance(model, nn.Sequential) and type(model[0]) is nn.LSTM:
        model[0]._flat_weights[1] = model[0]._flat_weights[1].detach()
    with torch.no_grad():
        assert_same(torch.jit.trace(unroll(model), (input,))(input), model(input))


def test_lists_that_do_not_fit_are_refused():
    ours = unroll(nn.GRU(6, 5, dtype=F64))
    for bad in (weights()[:3], [*weights()[:3], None], weights()[::-1]):
        ours._flat_weights = bad
        (problem,) = problems(ours, x())
        assert problem.startswith("GRU: _flat_weights: holds tensors of shapes")


def test_the_list_as_torch_gives_it():
    layer, ours = both()
    assert_equal(ours._flat_weights, layer._flat_weights)
    assert ours._flat_weights is ours._flat_weights and ours._flat_weights_names == layer._flat_weights_names
    for each_layer in (layer, ours):
        each_layer.weight_hh_l0 = nn.Parameter(weights()[1])
        assert each_layer._flat_weights[1] is each_layer.weight_hh_l0
