"""Frozen layers on their way to ONNX files: with the weights and the plan that were laid out in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cases import Case, replace
from tests.checks import assert_same
from unroll import UnrollError, export_onnx, streaming, unroll

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from tests.export.test_onnx_export import run

CASES = [
    (Case("LSTM", num_layers=2, bidirectional=True, proj_size=2, state=True), "gates=paired"),
    (Case("LSTM", bidirectional=True, batch_first=True), "directions=stacked"),
    pytest.param(Case("GRU", num_layers=3), "layers=wavefront", marks=pytest.mark.heavy),
    (Case("GRU", bias=False), "gates=split,time=3"),
    pytest.param(Case("RNN", num_layers=2, bidirectional=True), "default", marks=pytest.mark.heavy),
    (Case("LSTM", form="packed"), "gates=paired"),
]


@pytest.mark.parametrize(("case", "plan"), CASES, ids=str)
def test_layers(case, plan, tmp_path):
    model, args = case.model(torch.float64).eval(), case.tensors(torch.float64)
    frozen = unroll(model, freeze=True, plan=plan)
    export = export_onnx(frozen, args, tmp_path / "m.onnx")
    plain = export_onnx(model, args, tmp_path / "plain.onnx", plan=plan, check=False)
    assert export.operators == plain.operators and not {"LSTM", "GRU", "RNN"} & set(export.operators)
    with torch.no_grad():
        assert_same(run(export.path, *args), model(*args))


def test_any_length_and_batch(tmp_path):
    case = Case("LSTM", num_layers=2, bidirectional=True)
    model, args = case.model(torch.float64).eval(), case.tensors(torch.float64)
    frozen = unroll(model, freeze=True, plan="gates=split")
    export = export_onnx(frozen, args, tmp_path / "m.onnx", dynamic_shapes={"input": {0: "time", 1: "batch"}})
    assert export.operators["Scan"] == 4
    other = replace(case, steps=9, batch=1).tensors(torch.float64)
    with torch.no_grad():
        assert_same(run(export.path, *other), model(*other))


def test_a_plan_of_its_own(tmp_path):
    case = Case("GRU")
    frozen, args = unroll(case.model().eval(), freeze=True, plan="npu"), case.tensors()
    for options in ({}, {"plan": "npu"}, {"where": "rnn"}):
        assert export_onnx(frozen, args, tmp_path / "m.onnx", **options).operators["MatMul"] == 3 * case.steps
    with pytest.raises(
        UnrollError, match=r"rnn: plan='gates=paired': was frozen with 'gates=split,runtime=npu'; leave"
    ):
        export_onnx(frozen, args, tmp_path / "m.onnx", plan="onnxruntime")


def test_another_dtype_than_it_was_frozen_in(tmp_path):
    frozen = unroll(nn.Sequential(nn.GRUCell(3, 5)).eval(), freeze=True)
    assert export_onnx(frozen, torch.randn(2, 3), tmp_path / "m.onnx").report.ok
    with pytest.raises(UnrollError, match=r"0: was frozen in torch\.float32, and now runs in torch\.float64"):
        export_onnx(frozen.double(), torch.randn(2, 3).double(), tmp_path / "m.onnx")


def test_streaming(tmp_path):
    model, x = nn.Sequential(nn.GRU(3, 5, num_layers=2)).eval(), torch.randn(6, 2, 3)
    export = export_onnx(streaming(unroll(model, freeze=True), x), x, tmp_path / "m.onnx")
    assert {"0.h.next"} < set(export.differences)
    state = torch.randn(2, 2, 5)
    with torch.no_grad():
        y, h = model[0](x, state)
    found = run(export.path, x, state)
    assert_same((found[0], found[-1]), (y, h), rtol=1e-5)
