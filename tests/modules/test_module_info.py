"""Torch's own samples for its recurrent modules, through the module frontend and `torch.export`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unroll import compare, unroll

common_modules = pytest.importorskip("torch.testing._internal.common_modules", exc_type=ImportError)

RECURRENT = [info for info in common_modules.module_db if issubclass(info.module_cls, (nn.RNNBase, nn.RNNCellBase))]


def samples(info, training):
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": False, "training": training}
    for sample in info.module_inputs_func(info, **options):
        made, given = sample.constructor_input, sample.forward_input
        yield info.module_cls(*made.args, **made.kwargs).train(training), given.args, given.kwargs


def test_all_recurrent_modules_are_there():
    assert {info.module_cls for info in RECURRENT} >= {nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", RECURRENT, ids=lambda info: info.name)
def test_modules(info, training):
    found = list(samples(info, training))
    assert found
    for layer, args, kwargs in found:
        layer = layer.double()
        compare(layer, unroll(layer), args, kwargs, gradients=training).check()


@pytest.mark.parametrize(
    "info",
    [pytest.param(i, marks=pytest.mark.heavy if i.module_cls in (nn.GRU, nn.RNN) else ()) for i in RECURRENT],
    ids=lambda info: info.name,
)
def test_programs(info):
    exported = 0
    for layer, args, kwargs in samples(info, False):
        if any(isinstance(arg, nn.utils.rnn.PackedSequence) for arg in args):
            continue  # torch.export refuses it
        program = torch.export.export(layer.double(), args, kwargs)
        compare(layer, unroll(program).module(), args, kwargs).check()
        exported += 1
    assert exported
