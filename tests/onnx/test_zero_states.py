"""Zeros as initial states are left out of the first step only where they surely have the rows of the sequence."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from tests.onnx import standard
from unroll import unroll

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from onnx import helper, numpy_helper  # noqa: E402

PLANS = [None, "time=2"]


def session(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model, feeds):
    """The results of a model in ONNX Runtime, or None if it refuses."""
    try:
        return session(model).run(None, feeds)
    except Exception as error:
        if "ONNXRuntimeError" not in str(error):
            raise
        return None


def assert_alike(model, plans, feeds):
    """Both give the same or both refuse; tells which."""
    expected = run(model, feeds)
    for plan in plans:
        actual = run(unroll(model, plan=plan), feeds)
        assert (expected is None) == (actual is None)
        for left, right in zip(expected or (), actual or (), strict=True):
            np.testing.assert_allclose(left, right, atol=1e-5)
    return expected is not None


def with_zeros(kind, opset, nodes, stored, inputs=()):
    """A recurrent node with an open batch whose initial states are `zeros`, made by nodes that may read `X`."""
    drawn = standard.draw(kind, {}, optional=("initial_h",), dtype=np.float32, batch=3, size=4)
    model = standard.model(kind, {}, drawn, dynamic=("batch",), known=("W", "R"), opset=opset)
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "initial_h"))
    model.graph.node[0].input[5] = "zeros"
    for made in reversed(nodes):
        model.graph.node.insert(0, made)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items())
    model.graph.input.extend(inputs)
    return model, drawn


def products(model):
    return [node.op_type for node in unroll(model).graph.node].count("Gemm")


def shape_of_x():
    """Nodes that make the shape `[1, B, H]` of a state from that of `X`."""
    node = helper.make_node
    return [
        node("Shape", ["X"], ["shape"]),
        node("Gather", ["shape", "one"], ["batch"], axis=0),
        node("Concat", ["one", "batch", "hidden"], ["wanted"], axis=0),
    ]


NUMBERS = {"one": np.array([1]), "zero": np.zeros(1, np.float32)}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("opset", [13, 22])
def test_zeros_of_another_batch_are_refused_as_the_operator_does(kind, opset):
    hidden = 4
    for nodes, stored in (
        ([], {"zeros": np.zeros((1, 2, hidden), np.float32)}),
        ([helper.make_node("ConstantOfShape", ["wanted"], ["zeros"])], {"wanted": np.array([1, 2, hidden])}),
        ([helper.make_node("Expand", ["zero", "wanted"], ["zeros"])], NUMBERS | {"wanted": np.array([1, 2, hidden])}),
    ):
        model, drawn = with_zeros(kind, opset, nodes, stored)
        size = drawn["X"].shape
        for batch in (1, 2, 3):
            x = np.random.default_rng(0).standard_normal((size[0], batch, size[2])).astype(np.float32)
            assert assert_alike(model, PLANS, {"X": x}) == (batch == 2)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("opset", [13, 22])
def test_zeros_of_a_size_that_is_an_input(kind, opset):
    make = helper.make_node("ConstantOfShape", ["wanted"], ["zeros"])
    model, drawn = with_zeros(kind, opset, [make], {}, [helper.make_tensor_value_info("wanted", 7, [3])])
    given = {"X": drawn["X"]}
    for batch in (1, 2, 3, 4):
        assert assert_alike(model, PLANS, given | {"wanted": np.array([1, batch, 4])}) == (batch == 3)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_zeros_of_the_rows_of_the_sequence_cost_nothing(kind):
    stored = NUMBERS | {"hidden": np.array([4])}
    for last in (
        helper.make_node("ConstantOfShape", ["wanted"], ["zeros"]),
        helper.make_node("Expand", ["zero", "wanted"], ["zeros"]),
    ):
        model, drawn = with_zeros(kind, 22, [*shape_of_x(), last], stored)
        assert assert_alike(model, PLANS, {"X": drawn["X"]})
        bare = standard.model(kind, {}, {k: v for k, v in drawn.items() if k != "initial_h"}, dynamic=("batch",))
        assert products(model) == products(bare)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.layer = nn.Embedding(9, 3), nn.LSTM(3, 4, batch_first=True)

    def forward(self, words):
        return self.layer(self.words(words))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_zeros_by_torchs_older_exporter():
    """It writes zeros of a size read from the sequence behind an embedding and a transpose."""
    words = torch.zeros(2, 5, dtype=torch.long)
    written = io.BytesIO()
    torch.onnx.export(
        Tagger().eval(), (words,), written, dynamo=False, input_names=["words"], dynamic_axes={"words": {0: "B"}}
    )
    model = onnx.load_from_string(written.getvalue())
    assert "ConstantOfShape" in [node.op_type for node in model.graph.node]
    for batch in (1, 2, 3):
        assert assert_alike(model, PLANS, {"words": np.zeros((batch, 5), np.int64)})
    bare = onnx.load_from_string(written.getvalue())
    node = next(node for node in bare.graph.node if node.op_type == "LSTM")
    del node.input[5:]
    assert products(model) == products(bare)
