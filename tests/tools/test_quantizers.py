"""Real quantizers on `plan="quantize"`: those of PT2E, torchao's `quantize_`, and PyTorch's `quantize_dynamic`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.cases import Case
from unroll import check, trace, unroll

with warnings.catch_warnings():  # of what torchao does while it is loaded
    warnings.simplefilter("ignore")
    pytest.importorskip("torchao", reason="needs torchao: make test-heavy")
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack
    from torchao.utils import TorchAOBaseTensor

# Warnings of these libraries' own code are not ours.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]

QUANTIZERS = {
    "x86": lambda: x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config()),
    "xnnpack": lambda: xnnpack.XNNPACKQuantizer().set_global(xnnpack.get_symmetric_quantization_config(True)),
}

CASES = [
    Case("LSTM", num_layers=2, bidirectional=True, batch_first=True),
    Case("LSTM", proj_size=2, state=True),
    Case("GRU", bidirectional=True, bias=False),
    Case("RNN", num_layers=2, nonlinearity="relu"),
    Case("LSTMCell", state=True),
    Case("GRUCell"),
]


def converted(program, tensors, quantizer):
    """What PT2E makes of an exported program, calibrated with one input."""
    with torch.no_grad():
        prepared = prepare_pt2e(program.module(), QUANTIZERS[quantizer]())
        prepared(*tensors)
        return convert_pt2e(prepared)


def difference(quantized, model, tensors):
    """The largest difference, in units of the largest value, of which some must be there."""
    with torch.no_grad():
        pairs = [(q.float() - m.float(), m) for q, m in zip(quantized(*tensors), model(*tensors), strict=True)]
    return max((d.abs().max() / m.abs().max()).item() for d, m in pairs)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pt2e_reaches_all_products(case, quantizer):
    model, tensors = case.model().eval(), case.tensors()
    with torch.no_grad():
        program = torch.export.export(unroll(model, plan="quantize"), tensors)
    found = converted(program, tensors, quantizer)
    verdict = check(found, target="pt2e")
    assert verdict.ok, verdict
    passes = case.num_layers * (1 + case.bidirectional)
    assert verdict.nodes == passes * (1 + case.steps * (1 + bool(case.proj_size)) if not case.is_cell else 2)
    assert 0 < difference(found, model, tensors) < 0.2


class Rows(nn.Module):
    """Reads eight rows downwards and upwards, and gives scores: nine products each way, and one."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(8, 16, batch_first=True, bidirectional=True), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(torch.cat(tuple(self.rnn(x)[1]), 1))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize(("plan", "floats"), [("default", 18), ("quantize", 0)])
def test_pt2e_reaches_the_head_alone_by_other_plans(plan, floats, quantizer):
    """The row of PT2E in docs/training.md."""
    with torch.no_grad():
        program = torch.export.export(unroll(Rows().eval(), plan=plan), (torch.randn(4, 8, 8),))
    verdict = check(converted(program, (torch.randn(4, 8, 8),), quantizer), target="pt2e")
    assert str(verdict).startswith(f"pt2e: {floats} of 19 products are float")
    if floats:
        assert verdict.rows[0].operator == "aten.addmm.default"
        assert "plan='quantize'" in verdict.rows[0].fix


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("frontend", ["program", "graph"])
def test_pt2e_takes_unrolled_programs_and_graphs(frontend, kind):
    case = Case(kind, num_layers=2)
    model, tensors = case.model().eval(), case.tensors()
    with torch.no_grad():
        if frontend == "program":
            program = unroll(torch.export.export(model, tensors), plan="quantize")
        else:
            graph = trace(nn.Sequential(model.rnn))
            # of other exports the quantizer takes nn.Linear alone, and graphs call its function
            program = torch.export.export(unroll(graph, tensors, plan="quantize"), tensors, strict=True)
    verdict = check(converted(program, tensors, "x86"), target="pt2e")
    assert verdict.ok, verdict
    assert verdict.nodes >= 2 * case.steps


CONFIGS = {
    "int8 weights": Int8WeightOnlyConfig(),
    "int8 weights and activations": Int8DynamicActivationInt8WeightConfig(),
    "int4 weights": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
}


class Reader(nn.Module):
    """A bidirectional LSTM of two layers, and scores."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(32, 64, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("name", CONFIGS)
def test_torchao_reaches_all_weights(name):
    model, x = Reader().eval(), torch.randn(4, 8, 32)

    def share(plan):
        """The part of all numbers in matrices that are quantized, and the model."""
        quantized = unroll(copy.deepcopy(model), plan=plan)
        quantize_(quantized, CONFIGS[name])
        weights = [p for p in quantized.parameters() if p.dim() == 2]
        reached = sum(p.numel() for p in weights if isinstance(p, TorchAOBaseTensor))
        return reached / sum(p.numel() for p in weights), quantized

    assert share("default")[0] < 0.04
    reached, quantized = share("quantize")
    assert reached == 1
    with torch.no_grad():
        found = quantized(x)
        assert 0 < (found - model(x)).abs().max() < 0.1
        # checkpoints of quantized models have torch's names too
        again = unroll(Reader().eval(), plan="quantize")
        assert list(quantized.state_dict()) == list(model.state_dict())
        again.load_state_dict(quantized.state_dict(), assign=True)
        assert torch.equal(again(x), found)


def test_pytorchs_dynamic_quantization_reaches_all_layers():
    model, x = Reader().eval(), torch.randn(4, 8, 32)
    quantized = torch.ao.quantization.quantize_dynamic(unroll(model, plan="quantize"), {nn.Linear}, dtype=torch.qint8)
    kinds = [type(m) for m in quantized.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == 9 and nn.Linear not in kinds
    with torch.no_grad():
        assert 0 < (quantized(x) - model(x)).abs().max() < 0.05
