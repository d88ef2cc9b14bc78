"""Subclasses of recurrent layers, which of them can be honoured, and rules for the others."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.checks import assert_equal, assert_same, problems
from unroll import Unrolled, UnrollError, export_onnx, streaming, trace, unroll

F64 = torch.float64


def x():
    return torch.randn(4, 3, 6, dtype=F64)


def gru():
    return nn.GRU(6, 5, dtype=F64)


# --- subclasses -------------------------------------------------------------------------------------------------------


class WithLengths(nn.GRU):
    """Prepares its arguments and calls `super().forward`."""

    scale = 2

    def __init__(self, *args, name="", **kwargs):
        super().__init__(*args, **kwargs)
        self.label = name

    def forward(self, x, lengths=None, *, twice=False):
        x = x * self.scale
        if lengths is not None:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, h = super().forward(x)
        if lengths is not None:
            y, _ = nn.utils.rnn.pad_packed_sequence(y)
        return y * self.factor(twice), h

    def factor(self, twice):
        return 2 if twice else 1


class Deeper(WithLengths):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)[0]

    def factor(self, twice):
        return super().factor(twice) + 1


class Residual:
    """A mixin."""

    def forward(self, x, hx=None):
        y, h = super().forward(x, hx)
        return x + y, h


class ResidualLSTM(Residual, nn.LSTM):
    pass


class Sized(nn.LSTM):
    """Changes nothing about the computation."""

    def __init__(self, size, **kwargs):
        super().__init__(size, size, num_layers=2, **kwargs)

    @property
    def size(self):
        return self.hidden_size

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.bias_ih_l0[: self.hidden_size] += 1


class SkippingCell(nn.LSTMCell):
    def forward(self, x, state):
        h, c = super().forward(x, state)
        return h + state[0], c


@pytest.mark.parametrize("cls", [WithLengths, Deeper])
@pytest.mark.parametrize("kwargs", [{}, {"lengths": torch.tensor([2, 4, 3])}, {"twice": True}])
def test_subclass_that_calls_super(cls, kwargs):
    layer, input = cls(6, 5, name="mine", dtype=F64), x()
    ours = unroll(layer)
    assert_same(ours(input, **kwargs), layer(input, **kwargs))
    assert (type(ours).__name__, ours.label) == (cls.__name__, "mine")
    assert not isinstance(ours, nn.RNNBase) and isinstance(ours, Unrolled)


def test_mixins_and_plain_subclasses():
    for layer in (ResidualLSTM(6, 6, dtype=F64), Sized(6, dtype=F64)):
        ours, input = unroll(layer), x()
        assert_same(ours(input), layer(input))
    assert ours.size == 6
    with torch.no_grad():
        ours.reset_parameters()
    assert ours.bias_ih_l0[:6].min() > 0.5
    cell, input = SkippingCell(6, 5, dtype=F64), x()[0]
    state = torch.randn(2, 3, 5, dtype=F64).unbind()
    assert_same(unroll(cell)(input, state), cell(input, state))


def test_subclasses_copy_and_pickle():
    ours, input = unroll(nn.Sequential(Deeper(6, 5, dtype=F64))), x()
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other[0]) is type(ours[0])
        assert_equal(other(input), ours(input))


def test_subclass_with_parametrized_weights():
    layer = parametrizations.weight_norm(ResidualLSTM(6, 6, dtype=F64), "weight_hh_l0")
    input = x()
    assert_same(unroll(layer)(input), layer(input))


class Own(nn.LSTM):
    def forward(self, x):
        return torch.lstm(x, self.start, self.own_weights, True, 1, 0.0, False, False, False)


class Past(nn.LSTM):
    def forward(self, x):
        return super().forward(x) if x.dim() == 3 else nn.LSTM.forward(self, x)


class OldSuper(nn.LSTM):
    def forward(self, x):
        return super(OldSuper, self).forward(x)  # noqa: UP008


class OtherState(nn.GRU):
    def permute_hidden(self, hx, permutation):
        return hx


class Kernel:
    def forward(self, x, hx=None):
        return torch._VF.gru_cell(x, hx, self.weight_ih, self.weight_hh)


class MixedKernel(Kernel, nn.GRUCell):
    pass


class Registered(nn.GRU):
    def __init_subclass__(cls):
        raise AssertionError("a class was made behind the user's back")


class InProperty(nn.GRU):
    @property
    def described(self):
        return super().extra_repr()


class Explicit(nn.RNNBase):
    """Written out in Python, with methods and functions of its own; one has the name of a function of torch's."""

    def __init__(self, *sizes):
        super().__init__("RNN_TANH", *sizes, dtype=F64)

    @staticmethod
    def rnn_tanh(x, h, w_ih, w_hh):
        return torch.tanh(functional.linear(x, w_ih) + functional.linear(h, w_hh))

    @property
    def zeros(self):
        return torch.zeros(1, self.hidden_size, dtype=F64)

    def forward(self, x, hx=None):
        h, outputs = self.zeros, []
        if x.dim() != 3:
            raise ValueError(f"a sequence has three dimensions, not {x.dim()}")
        for x_t in x.unbind(1 if self.batch_first else 0):
            h = self.rnn_tanh(x_t, h, *(getattr(self, name) for name in self._all_weights[0][:2]))
            outputs += [scaled(part * h.sign().abs()) for part in [h]]
        return torch.stack(outputs), h


def scaled(x):
    return x * 2


class ExplicitCell(nn.RNNCellBase):
    def __init__(self):
        super().__init__(6, 5, bias=False, num_chunks=1, dtype=F64)

    def forward(self, x, h=None):
        y = x @ self.weight_ih.T
        return torch.tanh(y if h is None else y + h @ self.weight_hh.T)


class Holding(nn.LSTM):
    """Has nothing recurrent but a layer inside, which is unrolled where it is."""

    def __init__(self):
        super().__init__(6, 5, dtype=F64)
        self.inner = gru()

    def forward(self, x):
        return self.inner(x)


run = torch.gru


def reaches(self, x):
    return run(x, self.start, self.own_weights, True, 1, 0.0, False, False, False)


class ByAlias(nn.GRU):
    def forward(self, x):
        return reaches(self, x)


class ByName(nn.GRU):
    def forward(self, x):
        return getattr(torch, "gru")(x, self.start)  # noqa: B009


class ByOperator(nn.GRU):
    def forward(self, x):
        operators = torch.ops.aten
        return operators.gru.input(x, self.start)


class InLambda(nn.GRU):
    def forward(self, x):
        return (lambda self: nn.GRU.forward(self, x))(self)


class ByAttribute(nn.GRU):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.kernel = torch.gru

    def forward(self, x):
        return self.kernel(x, self.start)


@pytest.mark.parametrize("layer", [Explicit(6, 5), ExplicitCell(), Holding()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("beside", [False, True])
def test_layers_that_are_explicit_already_are_left_alone(layer, beside):
    model, input = nn.ModuleList([layer, *[gru()] * beside]), x()
    ours = unroll(model)
    assert type(ours[0]) is type(layer) and all(a is b for a, b in zip(ours.parameters(), model.parameters()))
    assert not beside or isinstance(ours[1], Unrolled)
    assert_same(ours[0](input), layer(input))
    if isinstance(layer, Holding):
        assert isinstance(ours[0].inner, Unrolled)


@pytest.mark.parametrize("kind", [ByAlias, ByName, ByOperator, InLambda, ByAttribute])
def test_layers_that_may_reach_torchs_functions_are_refused(kind):
    (problem,) = problems(unroll, nn.Sequential(kind(6, 5)))
    assert kind.__name__ in problem


OBJECTIONS = {
    "own": (Own(6, 5), "Own overrides forward without calling super().forward"),
    "past": (Past(6, 5), "Past reaches past super() in forward, by LSTM"),
    "old": (OldSuper(6, 5), "OldSuper names its own class in forward, where super() without arguments would do"),
    "state": (OtherState(6, 5), "OtherState overrides permute_hidden"),
    "kernel": (MixedKernel(6, 5), "MixedKernel overrides forward without calling super().forward"),
    "registered": (Registered(6, 5), "Registered overrides __init_subclass__"),
    "property": (InProperty(6, 5), "InProperty calls super() in described, a property"),
    "base": (nn.RNNBase("GRU", 6, 5), "RNNBase is no subclass of torch.nn.LSTM, GRU, RNN or their cells"),
}


def test_every_subclass_that_cannot_be_honoured_is_named_at_once():
    model = nn.ModuleDict({name: layer for name, (layer, _) in OBJECTIONS.items()} | {"fine": gru()})
    found = problems(unroll, model)
    for line, (name, (layer, objection)) in zip(found, OBJECTIONS.items(), strict=True):
        kind = type(layer).__name__
        assert line == (
            f"{name}: {type(layer).__module__}.{objection}; give a rule, "
            f"unroll(model, rules={{{kind}: function from the layer to a module}}), or leave it out by where="
        )
    with pytest.raises(UnrollError, match=f"^{len(OBJECTIONS)} problems\nown: "):
        unroll(model)


def test_refused_layers_may_be_left_out():
    ours = unroll(nn.ModuleDict({"own": Own(6, 5), "fine": gru()}), where="fine")
    assert type(ours["own"]) is Own and isinstance(ours["fine"], Unrolled)


# --- rules ------------------------------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """What stands in for an `Own`: another recurrent layer with something around it."""

    def __init__(self, own):
        super().__init__()
        self.rnn = nn.GRU(own.input_size, own.hidden_size, dtype=F64)

    def forward(self, x):
        return self.rnn(x)[0] * 2


def test_rules():
    made = []

    def rule(own):
        made.append(Doubling(own))
        return made[-1]

    own = Own(6, 5, dtype=F64)
    ours = unroll(nn.ModuleList([own, own, gru()]), rules={Own: rule})
    assert len(made) == 1 and ours[0] is ours[1]
    assert isinstance(ours[0].rnn, Unrolled) and isinstance(ours[2], Unrolled)
    assert ours[0].rnn.weight_hh_l0 is made[0].rnn.weight_hh_l0
    input = x()
    assert_same(ours[0](input), made[0](input))


def test_rules_for_wrappers_and_for_a_parametrized_class():
    class Wrapper(nn.Module):
        def forward(self, x):
            return x

    ours = unroll(nn.Sequential(Wrapper()), rules={Wrapper: lambda m: nn.Identity()})
    assert type(ours[0]) is nn.Identity
    own = parametrizations.weight_norm(Own(6, 5), "weight_hh_l0")
    assert type(unroll(nn.Sequential(own), rules={Own: Doubling})[0]) is Doubling


def test_a_rule_for_no_layer_is_refused():
    class Other(Own):
        pass

    model, fix = nn.Sequential(Own(6, 5), gru()), "leave it out, or name the very class of the layer"
    for function in (unroll, lambda *args, **kwargs: export_onnx(model.eval(), x(), "out.onnx", **kwargs)):
        (problem,) = problems(function, model, rules={Own: Doubling, nn.LSTM: Doubling})
        assert problem.startswith("rules={LSTM: ...}: is the class of no layer to unroll") and fix in problem
    assert "rules={Own: ...}" in problems(unroll, trace(nn.Sequential(gru())), x(), rules={Own: Doubling})[0]
    assert "rules={RNN: ...}" in problems(streaming, model, x(), rules={Own: Doubling, nn.RNN: Doubling})[0]
    assert "rules={Own: ...}" in problems(unroll, model, where="1", rules={Own: Doubling})[0]
    nested = unroll(model, rules={Own: lambda layer: nn.Sequential(Other(6, 5)), Other: Doubling})
    assert type(nested[0][0]) is Doubling


@pytest.mark.parametrize("rules", [{"x": Doubling}, {int: Doubling}, {Own: None}, [Own]], ids=str)
def test_what_is_no_rule_is_refused(rules):
    (problem,) = problems(unroll, nn.Sequential(Own(6, 5)), rules=rules)
    assert problem.startswith("rules=") and problem.endswith("give a dictionary from classes of modules to functions")


def test_rules_that_help_nothing_are_refused():
    model = nn.Sequential(Own(6, 5))
    assert problems(unroll, model, rules={Own: lambda m: None}) == [
        "0: the rule for Own returned NoneType; return an nn.Module"
    ]
    assert problems(unroll, model, rules={Own: lambda m: m}) == [
        "0: the rule for Own returned a layer of that class; return another module"
    ]
