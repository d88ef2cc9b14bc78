"""Finding layers wherever a model keeps them, and choosing among them."""

import collections
import functools
import threading
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.checks import assert_same, problems
from unroll import Plan, Unrolled, UnrollWarning, compare, compile, export_onnx, packing, streaming, unroll
from unroll.modules.find import is_recurrent

F64 = torch.float64


def x():
    return torch.randn(4, 3, 6, dtype=F64)


def gru():
    return nn.GRU(6, 5, dtype=F64)


class Held(nn.Module):
    """Runs what `get` finds in it."""

    def __init__(self, get, **attributes):
        super().__init__()
        self.get = get
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.get(self)(x)


class Plain:
    def __init__(self, layer):
        self.layer = layer


class Slotted:
    __slots__ = ("layer",)

    def __init__(self, layer):
        self.layer = layer


def from_list(m):
    return m.kept[0]


def from_dict(m):
    return m.kept["deep"][1]


def itself(m):
    return m.kept


def from_object(m):
    return m.kept.layer


HIDING = {
    "list": (from_list, lambda layer: [layer]),
    "deque": (from_list, lambda layer: collections.deque([layer])),
    "tuple": (from_list, lambda layer: (layer, 1)),
    "dictionary": (from_dict, lambda layer: {"deep": ("x", layer)}),
    "object": (from_object, Plain),
    "slots": (from_object, Slotted),
    "method": (itself, lambda layer: layer.__call__),
    "forward": (itself, lambda layer: layer.forward),
    "partial": (itself, lambda layer: functools.partial(layer, hx=None)),
    "closure": (itself, lambda layer: lambda x: layer(x)),
    "closure over a list": (itself, lambda layer: [f := [layer], lambda x: f[0](x)][1]),
    "closure over a method": (itself, lambda layer: (lambda run: lambda x: run(x))(layer.forward)),
    "default": (itself, lambda layer: lambda x, rnn=layer: rnn(x)),
    "keyword default": (itself, lambda layer: lambda x, *, rnn=layer: rnn(x)),
    "partial of a method": (itself, lambda layer: functools.partial(layer.forward, hx=None)),
}


@pytest.mark.parametrize("place", HIDING)
def test_layers_are_found_where_they_hide(place, monkeypatch):
    get, hide = HIDING[place]
    model = Held(get, kept=hide(gru()))
    ours, input = unroll(model), x()
    expected = model(input)

    def fused(*args):
        raise AssertionError("the fused kernel was called")

    monkeypatch.setattr(torch._VF, "gru", fused)
    assert_same(ours(input), expected)
    with pytest.raises(AssertionError, match="fused kernel"):
        model(input)


@pytest.mark.parametrize("within", [nullcontext, packing])
def test_a_forward_wrapped_in_place(within):
    """As libraries do that move weights or count calls: the old method kept aside, a new one on the instance."""
    model = nn.Sequential(gru())
    layer = model[0]
    layer.calls, layer.old_forward = [], layer.forward

    def counting(self, *args):
        self.calls.append(len(args))
        return self.old_forward(*args)

    layer.forward = types.MethodType(counting, layer)
    with within():
        ours, input = unroll(model), x()
    assert_same(ours(input), model(input))
    assert (layer.calls, ours[0].calls) == ([1], [1])
    assert ours[0].old_forward.__self__ is ours[0]


def test_a_function_that_captured_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls, nothing = gru(), [], None
            self.run = lambda x: self.layer(x, nothing)
            self.note = lambda: self.calls.append(1)

        def forward(self, x):
            self.note()
            return self.run(x)

    model = Model()
    model.run.label = "mine"
    ours, input = unroll(model), x()
    assert_same(ours(input), model(input))
    assert (model.calls, ours.calls, ours.run.label) == ([1], [1], "mine")


def test_functions_that_captured_nothing_recurrent_are_shared():
    model, seen = nn.Module(), []
    model.layer, model.note = gru(), lambda x: seen.append(x)
    assert unroll(model).note is model.note


@pytest.mark.parametrize("held", [False, True])
def test_weight_drop_by_a_closure(held):
    """As published: `forward` replaced on the instance by a function around the old one."""
    layer = gru()
    raw = nn.Parameter(layer.weight_hh_l0.data)
    del layer._parameters["weight_hh_l0"]
    layer.register_parameter("weight_hh_l0_raw", raw)
    old = layer.forward

    def forward(*args, **kwargs):
        dropped = nn.functional.dropout(layer.weight_hh_l0_raw, 0.5, layer.training)
        layer.weight_hh_l0 = nn.Parameter(dropped)
        return old(*args, **kwargs)

    layer.forward = forward
    model, input = nn.Sequential(layer) if held else layer, x()
    ours = unroll(model)
    for each in (model, ours):
        torch.manual_seed(2)
        each.result = each(input)
    assert_same(ours.result, model.result)
    assert dict(ours.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_cycles_and_back_references():
    model = nn.Module()
    model.layer = gru()
    object.__setattr__(model, "me", model)
    object.__setattr__(model.layer, "parent", model)
    model.table = {"all": model}
    ours = unroll(model)
    assert ours.me is ours and ours.table["all"] is ours and ours.layer.parent is ours


def test_other_state_is_copied_or_shared_as_it_must_be():
    model = nn.Module()
    model.layer, model.norm, model.words = gru(), nn.BatchNorm1d(3), ["a"]
    model.state = model.layer(x())[1]
    model.optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.1)
    ours = unroll(model)
    assert ours.norm is not model.norm and ours.norm.running_mean is model.norm.running_mean
    assert ours.words == model.words and ours.words is not model.words
    assert ours.state is model.state
    assert ours.optimizer.param_groups[0]["params"][0] is model.layer.weight_ih_l0
    ours.eval()
    assert model.training and model.norm.training and model.layer.training


# --- what no copy can replace ----------------------------------------------------------------------------------------


def test_layers_of_a_class_are_refused():
    class Model(nn.Module):
        layer = gru()

    (problem,) = problems(unroll, nn.Sequential(Model()))
    assert problem.startswith("0.layer: the class ") and problem.endswith("set it in __init__, on the instance")


def test_what_cannot_be_copied_is_refused():
    model = nn.Module()
    model.layer, model.lock = gru(), threading.Lock()
    (problem,) = problems(unroll, model)
    assert problem == (
        "Module: cannot be copied (TypeError: cannot pickle '_thread.lock' object); "
        "take what cannot be copied out of its attributes"
    )


class Rebuilt(nn.Module):
    """Pickles what its constructor needs, and builds its layers anew from that."""

    def __init__(self, size):
        super().__init__()
        self.size, self.layer, self.head = size, nn.GRU(6, size, dtype=F64), nn.Linear(size, 2, dtype=F64)
        self.again = [self.layer]

    def forward(self, x):
        return self.head(self.layer(x)[0])

    def __getstate__(self):
        return {"size": self.size, "weights": self.state_dict()}

    def __setstate__(self, state):
        made = type(self)(state["size"])
        made.load_state_dict(state["weights"])
        self.__dict__.update(made.__dict__)
        self.eval()


class Reduced(Rebuilt):
    def __reduce__(self):
        return type(self), (self.size,)


class CopiedByItself(Rebuilt):
    def __deepcopy__(self, memo):
        return type(self)(self.size)


class Kept:
    """An object that is never copied."""

    def __init__(self, layer):
        self.layer = layer

    def __deepcopy__(self, memo):
        return self


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = Kept(gru())

    def forward(self, x):
        return self.kept.layer(x)[0]


@pytest.mark.parametrize("kind", [Rebuilt, Reduced, CopiedByItself])
@pytest.mark.parametrize("freeze", [False, True])
def test_models_that_build_their_layers_anew_where_they_are_copied(kind, freeze):
    model, x = nn.Sequential(kind(5)), torch.randn(4, 3, 6, dtype=F64)
    ours = unroll(model, freeze=freeze)
    assert type(ours[0]) is kind and ours[0].again[0] is ours[0].layer and ours[0].head.weight is model[0].head.weight
    assert isinstance(ours[0].layer, Unrolled) and ours.training
    assert_same(ours(x), model(x))


def test_objects_that_are_never_copied():
    model, x = Holder(), torch.randn(4, 3, 6, dtype=F64)
    ours = unroll(model)
    assert isinstance(ours.kept.layer, Unrolled) and type(model.kept.layer) is nn.GRU
    assert_same(ours(x), model(x))


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 5)

    def forward(self, x):
        return self.gru(x)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_inside_of_a_module_is_unrolled_where_it_stands():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scripted = torch.jit.script(Outputs())
            self.traced = torch.jit.trace(nn.Sequential(nn.LSTM(5, 4)), torch.zeros(2, 3, 5))
            self.harmless = torch.jit.script(nn.Linear(4, 2))

        def forward(self, x):
            return self.harmless(self.traced(self.scripted(x))[0])

    model = Model()
    ours = unroll(model)
    compare(model, ours, (torch.randn(2, 3, 6),), reference=False).check()
    assert not any(is_recurrent(module) for module in ours.modules())
    kept = unroll(model, where="traced")
    assert is_recurrent(kept.scripted)
    assert not is_recurrent(kept.traced)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_quantized_and_compiled_modules_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = {nn.LSTM, nn.GRU, nn.GRUCell}
        quantized = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.LSTM(6, 5), nn.GRU(6, 5), nn.GRUCell(6, 5)), kinds
        )
    assert [line.split(" is ")[1] for line in problems(unroll, quantized)] == [
        "quantized; unroll the float module, then quantize the result"
    ] * 3

    fix = "is compiled already; unroll the module, then compile the result"
    compiled, in_place = torch.compile(nn.Sequential(gru())), nn.Sequential(gru())
    in_place.compile()
    assert problems(unroll, compiled) == [f"OptimizedModule: {fix}"]
    assert problems(unroll, in_place) == [f"Sequential: {fix}"]


# --- where ------------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(6, 5), "back": nn.GRU(6, 5)})
        self.decoder = nn.GRU(6, 5)
        self.alias = self.decoder
        self.cells = [nn.LSTMCell(6, 5)]


@pytest.mark.parametrize(
    ("where", "chosen"),
    [
        (None, {"encoder.rnn", "encoder.back", "decoder", "cells"}),
        ("encoder.rnn", {"encoder.rnn"}),
        ("encoder.*", {"encoder.rnn", "encoder.back"}),
        ("*rnn", {"encoder.rnn"}),
        ("alias", {"decoder"}),
        ("cells[0]", {"cells"}),
        (["decoder", "cells*"], {"decoder", "cells"}),
        (("encoder.r?n",), {"encoder.rnn"}),
        (iter(["decoder"]), {"decoder"}),
        ([], set()),
        (lambda name, layer: isinstance(layer, nn.GRU), {"encoder.back", "decoder"}),
        (lambda name, layer: name == "alias", {"decoder"}),
        (lambda name, layer: False, set()),
    ],
)
def test_where(where, chosen):
    ours = unroll(Named(), where=where)
    layers = {**{f"encoder.{k}": m for k, m in ours.encoder.items()}, "decoder": ours.decoder, "cells": ours.cells[0]}
    assert {name for name, layer in layers.items() if isinstance(layer, Unrolled)} == chosen
    assert ours.alias is ours.decoder


def test_where_that_names_nothing_is_refused():
    known = "the recurrent layers are: encoder.rnn, encoder.back, decoder, alias, cells[0]"
    assert problems(unroll, Named(), where=["encoder.*", "nothing", "e?"]) == [
        f"where='nothing': names no recurrent layer; {known}",
        f"where='e?': names no recurrent layer; {known}",
    ]
    assert problems(unroll, nn.Linear(2, 2), where="rnn") == [
        "where='rnn': names no recurrent layer; the recurrent layers are: none"
    ]


def test_where_that_is_neither_names_nor_a_function_is_refused():
    for function in (unroll, streaming, compile, export_onnx):
        args = {streaming: (x(),), export_onnx: (x(), "out.onnx")}.get(function, ())
        assert problems(function, Named(), *args, where=nn.GRU) == [
            "where=GRU: is a class; give names, or for modules a function: lambda name, layer: isinstance(layer, GRU)"
        ]
    found = problems(unroll, Named(), where=(nn.GRU, "encoder.*", 3))
    assert [problem.partition(";")[0] for problem in found] == ["where=GRU: is a class", "where=3: is of type int"]
    assert problems(unroll, Named(), where=3)[0].startswith("where=3: is of type int; give a name or shell pattern")


def test_where_may_name_a_layer_unrolled_before():
    once = unroll(Named(), where="decoder")
    assert isinstance(unroll(once, where=["decoder", "encoder.rnn"]).encoder.rnn, Unrolled)


def test_unrolling_in_two_parts_is_unrolling_at_once():
    model = Named()
    parts = unroll(unroll(model, where="encoder.*"), where=["decoder", "cells*"])
    assert repr(parts) == repr(unroll(model))
    assert isinstance(parts.cells[0], Unrolled)


def test_a_model_without_recurrent_layers_is_copied():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(UnrollWarning, match="has no recurrent layer"):
        ours = unroll(model)
    assert ours is not model and ours[0].weight is model[0].weight


def test_each_part_keeps_its_plan():
    model = unroll(unroll(Named(), where="decoder", plan=Plan(gates="split")), plan=Plan(gates="paired"))
    assert (model.decoder.plan.gates, model.encoder.rnn.plan.gates) == ("split", "paired")


def test_a_plan_reaches_layers_wherever_they_are():
    class Scattered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.GRU(3, 4)
            self.second = self.first
            self.hidden = [nn.GRU(3, 4)]

    unrolled = unroll(Scattered())
    assert unroll(unrolled, where="second", plan="gates=split").second.plan.gates == "split"
    assert unroll(unrolled, plan="gates=split").hidden[0].plan.gates == "split"
