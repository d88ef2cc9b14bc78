"""Products of eight bits that ONNX Runtime's quantizers make of unrolled files, and of files as torch writes them."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

from tests.onnx.test_models import run_ort
from unroll import export_onnx

STEPS, LAYER = 12, {"input_size": 16, "hidden_size": 32}

# Products with x, once for all steps, and with h, from the second step on: one each, or one for each of four gates.
MERGED, SPLIT = 1 + STEPS - 1, 4 * (1 + STEPS - 1)


class Calibration(CalibrationDataReader):
    def __init__(self, arrays):
        self.arrays = iter(arrays)

    def get_next(self):
        array = next(self.arrays, None)
        return None if array is None else {"input": array}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a file of an LSTM for a plan, after the quantizer's own preparation, with fusions or without."""
    folder = tmp_path_factory.mktemp("quantized")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.LSTM(**LAYER).eval()

    def make(plan, fused=False):
        path, ready = folder / f"{plan}.onnx", folder / f"{plan}.{fused}.onnx"
        if not path.exists():
            export_onnx(model, torch.zeros(STEPS, 2, 16), path, plan=plan)
        quant_pre_process(path, ready, skip_symbolic_shape=True, skip_optimization=not fused)
        return ready

    return make


def inputs(count=4):
    random = np.random.default_rng(0)
    return [random.normal(size=(STEPS, 2, 16)).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize(
    ("plan", "fused", "found"),
    [
        ("gates=split", False, {"QGemm": 4, "Gemm": 4 * (STEPS - 1)}),
        ("gates=merged", False, {"QGemm": 1, "Gemm": STEPS - 1}),
        ("npu", False, {"QLinearMatMul": SPLIT}),
        ("gates=merged,runtime=npu", False, {"QLinearMatMul": MERGED}),
        ("products=linear", False, {"QLinearMatMul": MERGED}),
        # ONNX Runtime's fusions put the projected input back into the products
        ("npu", True, {"QGemm": 4, "Gemm": 4 * (STEPS - 1)}),
    ],
)
def test_static_quantization(plan, fused, found, exported, tmp_path):
    path, given = tmp_path / "quantized.onnx", exported(plan, fused)
    quantize_static(
        given,
        path,
        Calibration(inputs()),
        quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    counted = Counter(node.op_type for node in onnx.load(path).graph.node)
    products = ("QGemm", "QLinearMatMul", "MatMulInteger", "Gemm", "MatMul")
    assert {kind: counted[kind] for kind in products if counted[kind]} == found
    (x,) = inputs(1)
    quantized, exact = (run_ort(onnx.load(p), {"input": x})[0] for p in (path, given))
    assert np.abs(quantized - exact).max() < 0.05


def test_fusions_put_one_bias_into_all_products(exported, tmp_path):
    """docs/runtimes.md says to prepare files without them."""
    path = tmp_path / "quantized.onnx"
    quantize_static(exported("products=linear", True), path, Calibration(inputs()), quant_format=QuantFormat.QOperator)
    products = [node for node in onnx.load(path).graph.node if node.op_type == "QGemm"]
    assert len(products) == MERGED and len({node.input[6] for node in products[1:]}) == 1
    with pytest.raises(Exception, match="bias_hh_quantized"):
        run_ort(onnx.load(path), {"input": inputs(1)[0]})


@pytest.mark.parametrize(
    ("plan", "format"),
    [
        ("gates=merged,runtime=npu", QuantFormat.QOperator),
        ("default", QuantFormat.QDQ),
        ("default", QuantFormat.QOperator),
    ],
)
def test_one_bias_of_a_gru_has_the_scale_of_one_step(plan, format, tmp_path):
    """docs/runtimes.md tells which form and which format keep the scales apart."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.GRU(**LAYER).eval()
    path, quantized = tmp_path / "model.onnx", tmp_path / "quantized.onnx"
    export_onnx(model, torch.zeros(STEPS, 2, 16), path, plan=plan)
    quant_pre_process(path, path, skip_symbolic_shape=True, skip_optimization=True)
    quantize_static(path, quantized, Calibration(inputs()), quant_format=format, weight_type=QuantType.QInt8)
    products = [node for node in onnx.load(quantized).graph.node if node.op_type == "QGemm"]
    shared = len(products) - len({node.input[6] for node in products})
    (x,) = inputs(1)
    found, exact = (run_ort(onnx.load(p), {"input": x})[0] for p in (quantized, path))
    worst = np.abs(found - exact).max()
    assert shared == (STEPS - 2 if plan == "default" and format == QuantFormat.QOperator else 0)
    assert worst < 0.025 if not shared else worst > 0.04


@pytest.mark.parametrize(("plan", "count"), [("gates=split", SPLIT), ("npu", SPLIT), ("products=linear", MERGED)])
def test_dynamic_quantization_reaches_every_product(plan, count, exported, tmp_path):
    path, given = tmp_path / "quantized.onnx", exported(plan)
    quantize_dynamic(given, path, weight_type=QuantType.QInt8)
    counted = Counter(node.op_type for node in onnx.load(path).graph.node)
    products = ("QGemm", "QLinearMatMul", "MatMulInteger", "Gemm", "MatMul")
    assert {kind: counted[kind] for kind in products if counted[kind]} == {"MatMulInteger": count}
    (x,) = inputs(1)
    quantized, exact = (run_ort(onnx.load(p), {"input": x})[0] for p in (path, given))
    assert np.abs(quantized - exact).max() < 0.05


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
