"""Gradients of each sample by Opacus, in all its modes, through the products of `plan="quantize"`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.checks import assert_same
from unroll import unroll

pytest.importorskip("opacus", reason="needs opacus: make test-heavy")
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import GradSampleModuleExpandedWeights
from opacus.validators import ModuleValidator

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]

MODES = {
    "hooks": GradSampleModule,
    "functorch": lambda module, **options: GradSampleModule(module, force_functorch=True, **options),
    "ew": GradSampleModuleExpandedWeights,
}


class Tagger(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 5, 2, batch_first=True, bidirectional=True, **options)
        self.head = nn.Linear(2 * (self.rnn.proj_size or 5), 2, bias=self.rnn.bias)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def torchs(name):
    """The name of a parameter in torch's layer, given that in the products: `rnn.hh_l0.weight`."""
    *place, product, kind = name.removeprefix("_module.").split(".")
    return f"rnn.{kind}_{product}" if place == ["rnn"] else ".".join([*place, product, kind])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "options"), [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("LSTM", {"proj_size": 2}), ("GRU", {"bias": False})]
)
def test_gradients_of_each_sample(mode, kind, options):
    model, x = Tagger(kind, **options).double(), torch.randn(4, 6, 3, dtype=torch.float64)
    unrolled = copy.deepcopy(unroll(model, plan="quantize"))
    assert ModuleValidator.validate(unrolled, strict=False) == []
    private = MODES[mode](unrolled, batch_first=True, loss_reduction="sum")
    private(x).square().sum().backward()
    names = dict(private.named_parameters())
    assert sorted(map(torchs, names)) == sorted(name for name, _ in model.named_parameters())
    for k in range(len(x)):
        model.zero_grad()
        model(x[k : k + 1]).square().sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        found = {torchs(name): p.grad_sample[k] for name, p in names.items()}
        assert_same({name: found[name] for name in expected}, expected)


@pytest.mark.parametrize("mode", ["hooks", "ew"])
def test_training(mode):
    model = unroll(Tagger("GRU"), plan="quantize")
    x = torch.randn(64, 6, 3)
    data = DataLoader(TensorDataset(x, (x.sum((1, 2)) > 0).long()), batch_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine = PrivacyEngine(accountant="rdp")
    private, optimizer, data = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=data,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )
    before = [p.detach().clone() for p in model.parameters()]
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(images), labels).backward()
        optimizer.step()
    assert all((p - b).abs().max() > 0 for p, b in zip(model.parameters(), before, strict=True))
    assert 0 < engine.get_epsilon(1e-5) < 100
