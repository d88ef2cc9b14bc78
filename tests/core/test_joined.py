"""`Plan(gradients="joined")`: gradients of weights as one product, through every transform, and less wrong."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import unroll
from tests.cases import CHOSEN, DROPOUT, LAYER_KINDS, PACKED, Case, flat
from tests.checks import assert_same, gradients
from unroll import Plan, UnrollError

# of torch's own jit, which forward mode loads
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

F64 = torch.float64
JOINED = Plan(gradients="joined")
LAYERS = [case for case in CHOSEN + PACKED if not case.is_cell]


def joined(case, dtype=F64, **choices):
    return unroll.unroll(case.layer(dtype), plan=Plan(gradients="joined", **choices))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_gradients_are_those_of_the_steps(case):
    layer, ours = case.layer(F64), joined(case)
    expected, found = gradients(layer, case.args(F64)), gradients(ours, case.args(F64))
    assert found.keys() == expected.keys()
    for name in expected:
        assert_same(found[name], expected[name])
    for a, b in zip(flat(ours(*case.args(F64))), flat(layer(*case.args(F64))), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("choices", [{"gates": "split"}, {"gates": "paired"}, {"products": "sums"}], ids=str)
@pytest.mark.parametrize("directions", ["separate", "stacked"])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_other_plans(kind, directions, choices):
    case = Case(kind, num_layers=2, bidirectional=True, state=True)
    expected = gradients(case.layer(F64), case.args(F64))
    found = gradients(joined(case, directions=directions, **choices), case.args(F64))
    for name in expected:
        assert_same(found[name], expected[name])


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_between_layers(case):
    results = []
    for plan in (JOINED, Plan(gradients="stepwise")):
        torch.manual_seed(5)
        results.append(gradients(unroll.unroll(case.layer(F64), plan=plan), case.args(F64)))
    for name in results[0]:
        assert_same(results[0][name], results[1][name])


def functions(case):
    """The layer's output as a function of its input and weights, joined and as torch has it."""
    layer, ours = case.layer(F64), joined(case)
    names, weights = zip(*layer.named_parameters(), strict=True)
    (x,) = case.args(F64)

    def of(module):
        return lambda x, *weights: functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    return of(ours), of(layer), (x.requires_grad_(), *(w.detach().requires_grad_() for w in weights))


TRANSFORMED = [
    Case("LSTM", proj_size=2),
    Case("GRU", bidirectional=True),
    Case("RNN"),
    Case("LSTM", bidirectional=True),
]


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
def test_second_derivatives_and_forward_mode(case):
    ours, _, inputs = functions(case)
    assert gradcheck(ours, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(ours, inputs, fast_mode=True)


@pytest.mark.parametrize("case", TRANSFORMED, ids=str)
def test_transforms(case):
    ours, layer, inputs = functions(case)
    plain = functions_of_steps(case)
    along = tuple(torch.randn_like(i) for i in inputs)
    for a, b in zip(jvp(ours, inputs, along), jvp(plain, inputs, along), strict=True):
        assert_same(a, b)
    many = torch.randn(3, *inputs[0].shape, dtype=F64)
    weights = tuple(w.detach() for w in inputs[1:])
    assert_same(vmap(lambda x: ours(x, *weights))(many), torch.stack([layer(x, *weights) for x in many]))
    of = [vmap(grad(lambda x, f=f: f(x, *weights).sin().sum()))(many) for f in (ours, plain)]
    assert_same(*of)


def functions_of_steps(case):
    names = [name for name, _ in case.layer().named_parameters()]
    steps = unroll.unroll(case.layer(F64), plan=Plan(gradients="stepwise"))
    return lambda x, *weights: functional_call(steps, dict(zip(names, weights, strict=True)), (x,))[0]


def errors(layer, plan, x, direction, exact, run=lambda model: model):
    """The largest error of each gradient, of the largest value."""
    ours = run(unroll.unroll(layer, plan=plan))
    x = x.detach().requires_grad_()
    wanted = [x, *layer.parameters()]
    found = torch.autograd.grad(ours(x)[0], wanted, direction)
    return [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]


def long(kind, dtype, steps=64):
    """A layer of many steps, its input, a direction, and the gradients in float64."""
    layer = getattr(nn, kind)(32, 32, dtype=dtype)
    x, direction = torch.randn(steps, 16, 32).to(dtype), torch.randn(steps, 16, 32).to(dtype)
    wide = getattr(nn, kind)(32, 32, dtype=F64)
    wide.load_state_dict(layer.state_dict())
    y = x.double().requires_grad_()
    return layer, x, direction, torch.autograd.grad(wide(y)[0], [y, *wide.parameters()], direction.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_half_precision_is_less_wrong(kind, dtype):
    given = long(kind, dtype)
    stepwise, ours = (errors(given[0], Plan(gradients=how), *given[1:]) for how in ("stepwise", "joined"))
    hh = [name for name, _ in given[0].named_parameters()].index("weight_hh_l0") + 1
    assert ours[hh] < 0.6 * stepwise[hh]
    assert ours[hh] < 8 * torch.finfo(dtype).eps
    assert errors(given[0], None, *given[1:]) == ours  # the default


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_float32_is_no_more_wrong(kind):
    given = long(kind, torch.float32)
    stepwise, ours = (errors(given[0], Plan(gradients=how), *given[1:]) for how in ("stepwise", "joined"))
    assert errors(given[0], None, *given[1:]) == stepwise  # the default
    for a, b in zip(ours, stepwise, strict=True):
        assert a <= 2 * b + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)])
@pytest.mark.parametrize("case", [*TRANSFORMED, Case("GRU", num_layers=2, state=True)], ids=str)
def test_compiled(case, backend):
    torch.compiler.reset()
    ours = joined(case)
    ours.compile(fullgraph=True, backend=backend)
    expected, found = gradients(case.layer(F64), case.args(F64)), gradients(ours, case.args(F64))
    for name in expected:
        assert_same(found[name], expected[name])


def test_a_model_that_stays_as_it_is():
    torch.compiler.reset()
    layer = nn.GRU(6, 5, dtype=F64)
    ours = unroll.compile(layer, plan=JOINED, backend="aot_eager")
    x = torch.randn(4, 3, 6, dtype=F64)
    expected, found = (torch.autograd.grad(f(x)[0].sin().sum(), layer.weight_hh_l0)[0] for f in (layer, ours))
    assert_same(found, expected)


def test_what_cannot_be_joined_is_refused(tmp_path):
    layer, x = nn.LSTM(3, 5), torch.randn(4, 2, 3)
    model = nn.Sequential(layer)
    refused = {
        "layers": lambda: Plan(gradients="joined", layers="wavefront"),
        "products": lambda: Plan(gradients="joined", products="linear"),
        "graph": lambda: unroll.unroll(unroll.trace(model), (x,), plan=JOINED),
        "program": lambda: unroll.unroll(torch.export.export(model, (x,)), plan=JOINED),
        "script": lambda: unroll.unroll(torch.jit.script(layer), plan=JOINED),
        "scripted": lambda: torch.jit.script(unroll.unroll(layer, plan=JOINED)),
        "traced": lambda: torch.jit.trace(unroll.unroll(layer, plan=JOINED), (x,)),
        "exported": lambda: torch.export.export(unroll.unroll(model, plan=JOINED), (x,)),
        "decompositions": lambda: unroll.decompositions(JOINED),
    }
    for refuse in refused.values():
        with pytest.raises(UnrollError, match="gradients"):
            refuse()
    half = unroll.unroll(nn.LSTM(3, 5, dtype=torch.bfloat16))  # the default is not asked for, and honoured where it can
    torch.export.export(half, (x.bfloat16(),))


def test_autocast():
    """What torch runs in one type is joined in it; of others the gradients are refused."""
    lstm, gru, x = nn.LSTM(6, 5), nn.GRU(6, 5), torch.randn(4, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(unroll.unroll(lstm, plan=JOINED)(x)[0].float().sum(), lstm.weight_hh_l0)
        with pytest.raises(UnrollError, match="autocast"):
            unroll.unroll(gru, plan=JOINED)(x)
    (exact,) = torch.autograd.grad(lstm(x)[0].sum(), lstm.weight_hh_l0)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
