"""One layer of each kind in every frontend: the first thing to know of a card, in half a minute."""

import pytest
import torch
from torch import nn

from tests.cases import LAYER_KINDS, Case
from tests.gpu.device import DEVICE, model_of, tensors_of, wide
from tests.gpu.test_results import FORMS
from unroll import compare, unroll
from unroll import compile as compile_as_it_is

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_every_frontend(kind, form):
    case = wide(Case(kind, num_layers=2, bidirectional=True), 4)
    model, args = model_of(case, torch.float32), tensors_of(case, torch.float32)
    compare(model, form(model, args), args, gradients=True).check()


def test_joined_gradients_in_half_precision():
    layer = nn.LSTM(16, 16).to(DEVICE, torch.bfloat16)
    compare(layer, unroll(layer), (torch.randn(64, 64, 16).to(DEVICE, torch.bfloat16),), gradients=True).check()


@pytest.mark.filterwarnings("ignore:Not enough SMs", "ignore:TensorFloat32 tensor cores")
def test_compile_with_its_own_mode_and_plan():
    layer, x = nn.GRU(16, 16).to(DEVICE), torch.randn(9, 1, 16).to(DEVICE)
    ours = compile_as_it_is(layer)
    with torch.no_grad():
        expected = layer(x)[0]
        for _ in range(3):
            torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)
