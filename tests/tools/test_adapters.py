"""Low-rank adapters of peft in the products of `plan="quantize"`, found by names of modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.checks import assert_same
from unroll import unroll

pytest.importorskip("peft", reason="needs peft: make test-heavy")
from peft import LoraConfig, get_peft_model

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]

PRODUCTS = r".*rnn\.(ih|hh)_l\d+(_reverse)?"


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_lora(kind):
    model, x = Tagger(kind), torch.randn(4, 6, 3)
    before, names = copy.deepcopy(model), list(model.state_dict())
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["rnn"]))
    adapted = get_peft_model(unroll(model, plan="quantize"), LoraConfig(r=2, target_modules=PRODUCTS))
    assert_same(adapted(x), before(x), rtol=1e-5)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 16 and all("lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    found = adapted(x)
    assert (found - before(x)).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    assert_same(merged(x), found, rtol=1e-5)
    # and back into torch's own layer
    fused = Tagger(kind)
    assert list(merged.state_dict()) == names
    fused.load_state_dict(merged.state_dict())
    assert_same(fused(x), found, rtol=1e-5)
