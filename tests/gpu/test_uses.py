"""What is done with unrolled layers on a GPU: streaming, autocast, second derivatives, `vmap`, ensembles."""

import pytest
import torch
from torch import nn
from torch.autograd import gradgradcheck

from tests.cases import KINDS, LAYER_KINDS, Case, flat
from tests.checks import assert_same, check_vmap_over_inputs, check_vmap_over_weights
from tests.gpu.device import DEVICE, F64, ON_GPU, there, wide
from unroll import Stream, streaming, unroll

LOW = [torch.float16, torch.bfloat16] if ON_GPU else [torch.bfloat16]
"""Not every processor has the original's layers in float16."""


# --- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[1, 7, 4], [12], [1] * 12], ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_pieces_are_the_whole(kind, pieces):
    model = nn.Sequential(Case(kind, num_layers=2).layer(F64)).to(DEVICE)
    (x,) = there(Case(kind, steps=12).args(F64))
    stream = Stream(streaming(model, x[:1]))
    assert all(state.device.type == DEVICE.type for state in stream.state.values())
    outputs = [stream(piece)[0] for piece in x.split(pieces)]
    with torch.no_grad():
        assert_same(torch.cat(outputs), model(x)[0])


def test_a_streaming_program():
    model = nn.Sequential(nn.LSTM(6, 5, num_layers=2)).to(DEVICE, F64)
    (x,) = there(Case("LSTM", steps=12).args(F64))
    program = streaming(torch.export.export(model, (x[:3],)))
    stream = Stream(unroll(program))
    outputs = [stream(piece)[0] for piece in x.split(3)]
    with torch.no_grad():
        assert_same(torch.cat(outputs), model(x)[0])


# --- autocast ---------------------------------------------------------------------------------------------------------


def assert_as_close(ours, theirs, exact, dtype):
    """At most twice as far from the float64 result as the original is, and a rounding."""
    for a, b, e in zip(ours, theirs, exact, strict=True):
        assert (a.shape, a.device) == (b.shape, b.device)
        limit = 2 * (b - e).abs().max() + torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= limit


def runs_in_float16(case):
    """Whether PyTorch runs the original in float16 under autocast, whatever type is asked for; ours is in that type."""
    return ON_GPU and not case.is_cell


@pytest.mark.parametrize("state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind, dtype, state):
    case = wide(Case(kind, state=state), 16)
    layer = case.layer().to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype), torch.no_grad():
        ours, theirs = (list(flat(each(*there(case.args())))) for each in (unroll(layer), layer))
    theirs_in = {torch.float16} if runs_in_float16(case) else {result.dtype for result in ours}
    assert {result.dtype for result in theirs} == theirs_in
    if runs_in_float16(case):
        assert {result.dtype for result in ours} == {dtype}
        theirs = flat(case.layer(dtype).to(DEVICE)(*there(case.args(dtype))))
    assert_as_close(ours, theirs, flat(case.layer(F64).to(DEVICE)(*there(case.args(F64)))), dtype)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_autocast_backward(kind, dtype):
    case = wide(Case(kind, num_layers=2, bidirectional=True), 4)
    layer = case.layer().to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        ours, theirs = (directed(each, there(case.args())) for each in (unroll(layer), layer))
    assert {name: grad.dtype for name, grad in ours.items()} == {name: grad.dtype for name, grad in theirs.items()}
    if runs_in_float16(case) and dtype != torch.float16:
        theirs = directed(case.layer(dtype).to(DEVICE), there(case.args(dtype)))
    exact = directed(case.layer(F64).to(DEVICE), there(case.args(F64)))
    assert_as_close(ours.values(), theirs.values(), exact.values(), dtype)


def directed(function, args):
    """Gradients of a fixed direction of the output, by the input and every parameter."""
    (x,) = args
    x = x.requires_grad_()
    wanted = {"input": x, **dict(function.named_parameters())}
    output = function(x)[0].double()
    direction = torch.linspace(-1, 1, output.numel(), dtype=F64).reshape(output.shape).to(DEVICE)
    return dict(zip(wanted, torch.autograd.grad((output * direction).sum(), list(wanted.values())), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_float64_alone(kind):
    case = Case(kind, state=True)
    layer = case.layer(F64).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert_same(unroll(layer)(*there(case.args(F64))), layer(*there(case.args(F64))))


# --- what cuDNN refuses -----------------------------------------------------------------------------------------------


def second(layer, x):
    """The derivative of the squared gradient."""
    (first,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)


@pytest.mark.skipif(not ON_GPU, reason="cuDNN needs a CUDA device")
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_second_derivatives_that_cudnn_refuses(kind):
    case = Case(kind)
    layer, (x,) = case.layer(F64).to(DEVICE), there(case.args(F64))
    with pytest.raises(RuntimeError, match="CuDNN"):
        second(layer, x.requires_grad_())
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=False):
        expected = second(layer, x)
    assert_same(second(unroll(layer), x), expected)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_second_derivatives_against_finite_differences(kind):
    case = Case(kind, steps=2, batch=1)
    layer = unroll(case.layer(F64).to(DEVICE))
    (x,) = there(case.args(F64))
    assert gradgradcheck(lambda x: layer(x)[0], (x.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_inputs(kind):
    check_vmap_over_inputs(Case(kind), DEVICE)


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_weights(kind):
    check_vmap_over_weights(Case(kind), DEVICE)
