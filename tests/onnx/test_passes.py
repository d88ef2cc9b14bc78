"""The pass on ONNX models among others, in a pipeline of `onnx_ir`."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx_ir.passes import PassManager, Sequential, common

from tests.onnx import standard
from tests.onnx.test_models import assert_close, run_ort
from unroll import UnrollError
from unroll.onnx import UnrollPass


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_among_other_passes(kind):
    attributes = {"direction": "bidirectional"}
    inputs = standard.draw(kind, attributes)
    model = ir.from_proto(standard.model(kind, attributes, inputs))
    pipeline = Sequential(
        common.CheckerPass(), UnrollPass(plan="time=2"), common.RemoveUnusedNodesPass(), common.CheckerPass()
    )
    result = pipeline(model)
    assert result.modified
    assert result.model is model
    assert kind not in {node.op_type for node in model.graph}
    assert_close(run_ort(ir.to_proto(model), inputs), standard.evaluate(kind, attributes, inputs))
    assert not UnrollPass()(model).modified


def test_until_nothing_changes():
    inputs = standard.draw("GRU", {})
    model = ir.from_proto(standard.model("GRU", {}, inputs))
    assert PassManager([UnrollPass()], steps=3)(model).modified


def test_refusals():
    inputs = standard.draw("GRU", {})
    model = ir.from_proto(standard.model("GRU", {}, inputs))
    with pytest.raises(UnrollError, match="is no plan"):
        UnrollPass(plan="tensort")
    with pytest.raises(Exception, match="names no recurrent node"):
        UnrollPass(where="nothing")(model)
    with pytest.raises(Exception, match="limit of 2"):
        UnrollPass(limit=2)(model)
