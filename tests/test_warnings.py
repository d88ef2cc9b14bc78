"""What was not done is said, with what to call for it."""

import copy
import warnings

import pytest
import torch
from torch import nn

import unroll as package
from unroll import UnrollWarning, unroll

VF = torch._VF


def helper(x, h, weights):
    return torch.lstm_cell(x, (h, h), *weights)


class Functional(nn.Module):
    """Runs a recurrence by a function, which it reaches by a way of its own."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.layer = nn.GRU(3, 4)
        self.gru = nn.Linear(4, 4)


class ByTorch(Functional):
    def forward(self, x, h):
        return torch.gru(x, h, self.layer._flat_weights, True, 1, 0.0, False, False, False)


class ByVF(Functional):
    def forward(self, x, h):
        return VF.gru(x, h, self.layer._flat_weights, True, 1, 0.0, False, False, False)


class ByOperator(Functional):
    def forward(self, x, h):
        return torch.ops.aten.gru.input(x, h, self.layer._flat_weights, True, 1, 0.0, False, False, False)


class ByHelper(Functional):
    def forward(self, x, h):
        return helper(x, h, [*self.parameters()])


class ByMethod(Functional):
    def forward(self, x, h):
        return [self.step(x, h) for _ in range(2)]

    def step(self, x, h):
        return torch.gru_cell(x, h, *self.layer.parameters())


class Named(Functional):
    """Has layers of the names of functions, and calls others."""

    def forward(self, x, h):
        return torch.relu(self.gru(self.layer(x, h)[0]))


@pytest.mark.parametrize(
    ("kind", "function"),
    [(ByTorch, "gru"), (ByVF, "gru"), (ByOperator, "gru"), (ByHelper, "lstm_cell"), (ByMethod, "gru_cell")],
)
def test_functions_in_place_of_layers(kind, function):
    model = nn.Sequential(kind(""))
    with pytest.warns(UnrollWarning, match=f"^0.forward: calls {function}.*unroll.trace, torch.export") as caught:
        unroll(model)
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UnrollWarning, match=f"^{kind.__name__}.forward: calls"):
        unroll(model[0])


def test_models_without_layers():
    with pytest.warns(UnrollWarning, match="Linear: has no recurrent layer, and nothing was unrolled") as caught:
        unroll(nn.Linear(3, 4))
    assert issubclass(UnrollWarning, UserWarning) and package.UnrollWarning is UnrollWarning
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UnrollWarning, match="Sequential: has no recurrent layer"):
        unroll(copy.deepcopy(nn.Sequential(nn.Linear(3, 4), nn.ReLU())), freeze=True)


def test_nothing_is_said_where_all_was_done():
    class Own(nn.Module):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (nn.Sequential(nn.GRU(3, 4)), Named(""), nn.LSTMCell(3, 4)):
            unroll(unroll(model))
        unroll(unroll(nn.GRU(3, 4), freeze=True))
        unroll(Own(), rules={Own: lambda _: nn.Linear(3, 4)})
        unroll(ByTorch(""), where=lambda name, layer: False)
