"""Autocast on a CPU: the dtypes of torch's layers for outputs and states, packed and not, with every plan."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as pytree

from unroll import unroll

LAYERS = {
    "LSTM": lambda **options: nn.LSTM(3, 4, **options),
    "projection": lambda **options: nn.LSTM(3, 4, proj_size=2, **options),
    "GRU": lambda **options: nn.GRU(3, 4, **options),
    "RNN": lambda **options: nn.RNN(3, 4, **options),
    "relu": lambda **options: nn.RNN(3, 4, nonlinearity="relu", **options),
}
CELLS = {"LSTMCell": nn.LSTMCell(3, 4), "GRUCell": nn.GRUCell(3, 4), "RNNCell": nn.RNNCell(3, 4)}
CELLS["relu"] = nn.RNNCell(3, 4, bias=False, nonlinearity="relu")
PLANS = ["default", "gates=split", "gates=paired,products=sums", "products=sums", "directions=stacked"]
PLANS += ["directions=stacked,products=sums", "layers=wavefront", "layers=wavefront,products=sums", "products=linear"]
LENGTHS = [[1], [3], [1, 1], [3, 3], [3, 1], [3, 3, 2]]

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def packed(lengths):
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), 3), torch.tensor(lengths))


INPUTS = [torch.randn(3, 2, 3), torch.randn(1, 2, 3), torch.randn(3, 3), torch.randn(3, 2, 3).bfloat16()]
INPUTS += [torch.randn(3, 0, 3), *map(packed, LENGTHS)]


def assert_as_torch(model, ours, *args):
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (pytree.tree_leaves(m(*args)) for m in (model, ours))
    # of a packed sequence its data alone
    expected, actual = (
        [t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()] for found in (expected, actual)
    )
    assert [t.dtype for t in actual] == [t.dtype for t in expected]
    # both have rounded to 8 bits at each step
    assert all(torch.allclose(a.float(), e.float(), atol=0.05) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, plan):
    for options in ({}, {"bidirectional": True}, {"num_layers": 2}, {"bias": False}):
        layer = LAYERS[kind](**options)
        ours = unroll(layer, plan=plan)
        for input in INPUTS:
            assert_as_torch(layer, ours, input)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_with_states(kind, dtype):
    layer = LAYERS[kind]()
    for plan in ("default", "products=sums"):
        for lengths in LENGTHS:
            h, c = (torch.randn(1, len(lengths), size, dtype=dtype) for size in (2 if kind == "projection" else 4, 4))
            state = (h, c) if isinstance(layer, nn.LSTM) else h
            assert_as_torch(layer, unroll(layer, plan=plan), packed(lengths), state)


@pytest.mark.parametrize("plan", ["default", "products=sums", "gates=split,products=sums"])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind, plan):
    ours = unroll(CELLS[kind], plan=plan)
    for input in (torch.randn(2, 3), torch.randn(3), torch.randn(2, 3).bfloat16()):
        assert_as_torch(CELLS[kind], ours, input)
        state = torch.randn(*input.shape[:-1], 4)
        assert_as_torch(CELLS[kind], ours, input, (state, state * 2) if kind == "LSTMCell" else state)
