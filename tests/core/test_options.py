"""No option of torch's constructors is ignored, and none that torch adds later goes unnoticed."""

import inspect

import pytest
import torch
from torch import nn

from tests.checks import assert_same
from unroll import unroll
from unroll.core.recurrence import Recurrence, read_cell, read_layer

F64 = torch.float64
SIZES = {"input_size": 6, "hidden_size": 5}

# For each option a value that is not the default. A name that torch adds must be added here, and honoured.
OTHER = {
    "input_size": 4,
    "hidden_size": 7,
    "num_layers": 2,
    "bias": False,
    "batch_first": True,
    "dropout": 0.5,
    "bidirectional": True,
    "proj_size": 3,
    "nonlinearity": "relu",
    "device": "meta",
    "dtype": torch.float32,
}


def options(cls):
    """Names in the signature of a constructor, of `nn.RNNBase` where it hides behind `*args`."""
    names = list(inspect.signature(cls.__init__).parameters)[1:]
    if "args" in names:
        names = list(inspect.signature(nn.RNNBase.__init__).parameters)[2:]
        names.remove("proj_size") if cls is not nn.LSTM else None
        names += ["nonlinearity"] if cls is nn.RNN else []
    return names


LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)
ALL = [(cls, name) for cls in LAYERS + CELLS for name in options(cls)]


def build(cls, **changed):
    torch.manual_seed(0)
    return cls(**(SIZES | {"dtype": F64} | changed))


def run(module, cls, size):
    """The result for one seed, so that dropout draws alike."""
    torch.manual_seed(1)
    weight = next(module.parameters())
    input = torch.randn(*((3,) if cls in CELLS else (4, 3)), size, dtype=F64).to(weight)
    torch.manual_seed(2)
    return module(input)


@pytest.mark.parametrize(("cls", "name"), ALL, ids=lambda v: getattr(v, "__name__", v))
def test_changing_an_option_changes_our_result_as_it_changes_torchs(cls, name):
    assert name in OTHER, f"{cls.__name__} has an option that is not known here: {name}"
    changed = {name: OTHER[name]} | ({"num_layers": 2} if name == "dropout" else {})
    plain, other = build(cls), build(cls, **changed)
    size = changed.get("input_size", SIZES["input_size"])
    theirs, ours = run(other, cls, size), run(unroll(other), cls, size)
    if name == "device":
        assert [t.shape for t in torch.utils._pytree.tree_leaves(ours)] == [
            t.shape for t in torch.utils._pytree.tree_leaves(theirs)
        ]
        return
    assert_same(ours, theirs, rtol=1e-5 if name == "dtype" else 1e-9)
    before = run(plain, cls, SIZES["input_size"])
    with pytest.raises(AssertionError):
        assert_same(ours, before)


def test_the_table_has_no_option_that_torch_has_not():
    assert set(OTHER) == {name for _, name in ALL}


@pytest.mark.parametrize("cls", LAYERS)
def test_positional_arguments_are_torchs(cls):
    rest = ("relu",) if cls is nn.RNN else ()
    layer = cls(6, 5, 2, *rest, True, True, 0.25, True, dtype=F64)
    assert_same(unroll(layer.eval())(torch.ones(3, 4, 6, dtype=F64)), layer(torch.ones(3, 4, 6, dtype=F64)))


def test_recurrence_has_the_options_that_change_a_result():
    """The reader copies each of them; `device` and `dtype` are those of the tensors, `nonlinearity` is in the mode."""
    elsewhere = {"device", "dtype", "nonlinearity"}
    assert set(OTHER) - elsewhere <= set(Recurrence.__dataclass_fields__)
    for cls in LAYERS:
        names = set(options(cls)) - elsewhere
        changed = {name: OTHER[name] for name in names}
        found = read_layer(cls(**changed))
        assert {name: getattr(found, name) for name in names} == changed
    found = read_cell(nn.RNNCell(4, 7, bias=False, nonlinearity="relu"), "RNN")
    assert found == Recurrence("RNN_RELU", 4, 7, bias=False, is_cell=True)
