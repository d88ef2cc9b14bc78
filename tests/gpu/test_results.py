"""Every layer on a GPU, in every form: at most twice as far from the float64 result as cuDNN is, and some roundings.

The rule is that of `unroll.compare`. On a GPU, PyTorch runs the original layers by cuDNN and the original cells by
kernels of its own; the float64 result is that of the original too.
"""

import pytest
import torch
from torch import nn

from tests.cases import ALL_PLANS, CHOSEN, DROPOUT, EMPTY, LAYER_KINDS, PACKED, PLANS, Case, replace
from tests.gpu.device import DEVICE, DTYPES, F64, LAYERS, ON_GPU, model_of, tensors_of, there, wide
from unroll import UnrollError, compare, packing, trace, unroll

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def as_module(model, args, plan=None):
    return unroll(model, plan=plan)


def as_graph(model, args, plan=None):
    return unroll(trace(model), args, plan=plan)


def as_program(model, args, plan=None):
    return unroll(torch.export.export(model, args, strict=False), plan=plan).module()


def as_script(model, args, plan=None):
    return unroll(torch.jit.script(model), args, plan=plan)


FORMS = [as_module, as_graph, as_program, as_script]

LONG, SHORT = 16, 4
"""Steps. In half precision gradients are compared over a few: a product a step, as PyTorch differentiates it, adds a
rounding a step to the gradient of the weight, where cuDNN adds up in float32."""


def differentiable(case, dtype):
    """Whether gradients can be held against float64's: relu's jump where a rounding carries a value over zero."""
    return dtype == torch.float32 or case.nonlinearity != "relu"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_outputs_states_and_gradients(case, dtype, form):
    case = wide(case, SHORT)
    model, args = model_of(case, dtype), tensors_of(case, dtype)
    if form is as_program and ON_GPU and case.kind == "LSTMCell" and not case.bias:
        # PyTorch's shape function of its fused cell reads the biases that are not there
        with pytest.raises(AttributeError, match="has no attribute 'device'"):
            form(model, args)
        ours = torch.export.export(unroll(model), args, strict=False).module()
    else:
        ours = form(model, args)
    compare(model, ours, args, gradients=differentiable(case, dtype)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_more_steps(case, dtype):
    case = wide(case, LONG)
    model = model_of(case, dtype)
    inputs = [tensors_of(case, dtype, seed=seed) for seed in range(3)]
    compare(model, unroll(model), inputs).check()


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_gradients_over_more_steps(case):
    case = wide(case, LONG)
    model = model_of(case, torch.float32)
    compare(model, unroll(model), tensors_of(case, torch.float32), gradients=True).check()


@pytest.mark.parametrize("case", CHOSEN + EMPTY, ids=str)
def test_float64(case):
    """Correct to 1e-9, an empty batch too."""
    model = model_of(case, F64)
    compare(model, unroll(model), tensors_of(case, F64), gradients=case.batch > 0).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("two", [False, True], ids=["one_direction", "two_directions"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_sizes_of_real_layers(kind, two, dtype):
    """Where cuDNN has kernels that keep the weights on the chip."""
    layer = getattr(nn, kind)(64, 256, num_layers=1 + two, bidirectional=two).to(DEVICE, dtype)
    x = torch.randn(32, 32, 64).to(DEVICE, dtype)
    compare(layer, unroll(layer), (x,)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("two", [False, True], ids=["one_direction", "two_directions"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_every_plan(plan, kind, two, dtype):
    case = wide(Case(kind, num_layers=2, bidirectional=two), SHORT)
    model, args = model_of(case, dtype), tensors_of(case, dtype)
    compare(model, unroll(model, plan=plan), args, gradients=True).check()


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("two", [False, True], ids=["one_direction", "two_directions"])
@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_plans_in_every_form(plan, two, form):
    case = Case("LSTM", num_layers=2, bidirectional=two)
    model, args = model_of(case, F64), tensors_of(case, F64)
    compare(model, form(model, args, plan), args, gradients=True).check()


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_draws_as_many_numbers(case):
    """cuDNN draws from a state of its own, so that results cannot be equal; what is dropped is as much."""
    case = wide(case, LONG)
    ours = unroll(case.layer(F64).to(DEVICE))
    args = there(case.args(F64))
    torch.manual_seed(5)
    first = ours(*args)[0]
    torch.manual_seed(5)
    assert torch.equal(first, ours(*args)[0])
    assert not torch.equal(first, ours(*args)[0])
    ours.eval()
    compare(case.layer(F64).to(DEVICE).eval(), ours, args).check()


@pytest.mark.parametrize("dtype", [F64, *DTYPES], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_batches(case, dtype):
    case = wide(case, LONG)
    model, args = model_of(case, dtype), tensors_of(case, dtype)
    compare(model, unroll(model), args, gradients=dtype in (F64, torch.float32)).check()


@pytest.mark.parametrize("form", [as_graph, as_program])
@pytest.mark.parametrize("case", PACKED[:4], ids=str)
def test_packed_batches_in_graphs(case, form):
    model, args = model_of(case, F64), tensors_of(case, F64)
    with packing():
        ours = unroll(trace(model), args) if form is as_graph else torch.export.export(unroll(model), args).module()
    shorter = (args[0], args[1].clamp(max=2), *args[2:])
    for given in (args, shorter) if form is as_program else (args,):
        compare(model, ours, given).check()


@pytest.mark.parametrize("case", LAYERS[:3], ids=str)
def test_a_script_of_any_length(case):
    model = model_of(case, F64)
    ours = unroll(torch.jit.script(model))
    for steps in (1, 4, 9):
        compare(model, ours, tensors_of(replace(case, steps=steps), F64)).check()


@pytest.mark.parametrize("what", ["input", "h_0", "c_0"])
def test_mixed_devices_are_refused(what):
    elsewhere = "cpu" if DEVICE.type == "cuda" else "meta"
    layer = unroll(nn.LSTM(3, 5).to(DEVICE))
    given = {"input": torch.zeros(4, 2, 3), "h_0": torch.zeros(1, 2, 5), "c_0": torch.zeros(1, 2, 5)}
    given = {name: tensor.to(elsewhere if name == what else DEVICE) for name, tensor in given.items()}
    message = f"{what}: is on {elsewhere}, the weights on {DEVICE.type}.*; give {DEVICE.type}"
    with pytest.raises(UnrollError, match=message):
        layer(given["input"], (given["h_0"], given["c_0"]))
