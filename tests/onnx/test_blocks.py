"""Blocks of steps in a loop of an ONNX file: any number of steps, in a file whose size depends on the block alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.export import Dim

from tests.cases import Case, replace
from tests.checks import assert_same
from tests.onnx import standard
from tests.onnx.test_models import DIRECTIONS, KINDS, assert_close, run_ort, run_reference, unrolled
from unroll import Plan, export_onnx

OPEN = ("steps", "batch")


def body(model):
    """The graph inside of the only loop."""
    (loop,) = (node for node in model.graph.node if node.op_type == "Scan")
    return next(a.g for a in loop.attribute if a.name == "body")


def scans(model):
    return [node for node in model.graph.node if node.op_type == "Scan"]


TORCH = [
    (Case("LSTM", num_layers=2, bidirectional=True, proj_size=2, state=True), 1),
    (Case("LSTM", num_layers=2, bidirectional=True, proj_size=2, state=True), 3),
    (Case("LSTM", num_layers=2, batch_first=True), 8),
    (Case("GRU", bidirectional=True, batch_first=True, state=True), 3),
    (Case("RNN", num_layers=2, nonlinearity="relu", bias=False), 8),
    (Case("LSTM", bidirectional=True, form="packed"), 3),
]


@pytest.mark.parametrize(("case", "block"), TORCH, ids=str)
def test_every_length_of_a_layer_of_torch(case, block, tmp_path):
    model, args = case.model(torch.float64).eval(), case.tensors(torch.float64)
    time = 1 if case.batch_first else 0
    batch = None if case.packed else Dim("B", min=1)
    shapes = {"input": {time: Dim("T", min=1), 1 - time: batch}}
    if len(args) > 1:
        shapes["rest"] = tuple({0 if case.packed else 1: batch} for _ in args[1:])
    export = export_onnx(model, args, tmp_path / "m.onnx", dynamic_shapes=shapes, plan=Plan(time=block), check=False)
    assert export.operators["Scan"] == case.num_layers * (1 + case.bidirectional)
    file = onnx.load(export.path)
    for steps in range(1, 2 * block + 2):
        other = replace(case, steps=steps, batch=1 + steps % 3 if batch else case.batch).tensors(torch.float64)
        feed = {value.name: tensor.numpy() for value, tensor in zip(file.graph.input, other, strict=True)}
        with torch.no_grad():
            assert_same(tuple(map(torch.from_numpy, run_ort(file, feed))), model(*other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_length_and_batch(kind, direction):
    attributes, optional = {"direction": direction}, ("B", "initial_h", "sequence_lens")
    inputs = standard.draw(kind, attributes, optional=optional)
    plain = {name: array for name, array in inputs.items() if name != "sequence_lens"}
    for given_ in (inputs, plain):
        result = unrolled(standard.model(kind, attributes, given_, dynamic=OPEN), plan=Plan(time=3))
        for steps in range(1, 8):
            other = standard.draw(kind, attributes, optional=optional, steps=steps, batch=1 + steps % 3, seed=steps)
            other = given_ | {name: other[name] for name in ("X", "initial_h", "sequence_lens") if name in given_}
            assert_close(run_ort(result, other), standard.evaluate(kind, attributes, other))


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_none(kind, block, opset):
    """From version 18 on, ONNX Runtime refuses a Split of no rows; its own operators end the process."""
    attributes = {"direction": "bidirectional"}
    optional = ("B", "initial_h", "sequence_lens")
    inputs = standard.draw(kind, attributes, optional=optional)
    result = unrolled(standard.model(kind, attributes, inputs, dynamic=OPEN, opset=opset), plan=Plan(time=block))
    steps, hidden = len(inputs["X"]), inputs["R"].shape[2]
    feed = {"X": inputs["X"][:, :0], "initial_h": inputs["initial_h"][:, :0]}
    found = run_ort(result, inputs | feed | {"sequence_lens": inputs["sequence_lens"][:0]})
    assert [value.shape for value in found[:2]] == [(steps, 2, 0, hidden), (2, 0, hidden)]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(DIRECTIONS),
    st.integers(1, 20),
    st.integers(1, 9),
    st.sets(st.sampled_from(OPEN)),
    st.booleans(),
)
def test_any_length_in_any_block(kind, direction, steps, block, dynamic, ragged):
    attributes = {"direction": direction}
    inputs = standard.draw(kind, attributes, optional=("B", *["sequence_lens"] * ragged), steps=steps, seed=steps)
    result = unrolled(standard.model(kind, attributes, inputs, dynamic=tuple(dynamic)), plan=Plan(time=block))
    expected = standard.evaluate(kind, attributes, inputs)
    for run in (run_ort, run_reference):
        assert_close(run(result, inputs), expected)


def test_a_thousand_steps():
    attributes = {"direction": "bidirectional"}
    inputs = standard.draw("LSTM", attributes, optional=("B", "initial_c"), steps=1000)
    result = unrolled(standard.model("LSTM", attributes, inputs, dynamic=OPEN), plan=Plan(time=16))
    assert_close(run_ort(result, inputs), standard.evaluate("LSTM", attributes, inputs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 4])
def test_size_does_not_depend_on_the_steps(kind, block):
    def nodes(steps, dynamic):
        inputs = standard.draw(kind, {}, optional=("B", "sequence_lens"), steps=steps)
        result = unrolled(standard.model(kind, {}, inputs, dynamic=dynamic), plan=Plan(time=block))
        return len(result.graph.node) + len(body(result).node), result.ByteSize()

    for dynamic in ((), ("batch",), OPEN):
        count, size = nodes(1001, dynamic)  # as many digits, which names of sizes have
        assert (count, pytest.approx(size, abs=32)) == nodes(9003, dynamic)


def test_what_a_block_is_made_of():
    """One Split of the input and one Concat of the output, and a step's gates between them."""
    block, size = 4, 3
    inputs = standard.draw("LSTM", {}, optional=("B",), dtype=np.float32)
    result = unrolled(
        standard.model("LSTM", {}, inputs, outputs=["Y"], dynamic=OPEN), plan=Plan(gates="merged", time=block)
    )
    inner = body(result)
    assert {kind: sum(node.op_type == kind for node in inner.node) for kind in {n.op_type for n in inner.node}} == {
        "Split": 1 + 2 * block,  # of the block, of the product, of the gates
        "Gemm": block,
        "Sigmoid": block,
        "Tanh": 2 * block,
        "Mul": 3 * block,
        "Add": block,
        "Concat": 1,  # c of every step is not read
    }
    assert {"rnn.l0.t0.forget", "rnn.l0.t3.c"} <= {name for node in inner.node for name in node.output}
    assert [d.dim_value for d in inner.input[2].type.tensor_type.shape.dim] == [0, 4 * size]


@pytest.mark.parametrize(("steps", "block", "length"), [(4, 8, 4), (8, 4, 4), (9, 4, 4), (1, 4, 1)])
def test_known_length(steps, block, length):
    """A block is no longer than the sequence; rows are filled up only where they must be."""
    inputs = standard.draw("GRU", {}, steps=steps)
    result = unrolled(standard.model("GRU", {}, inputs), plan=Plan(time=block))
    assert sum(node.op_type == "Tanh" for node in body(result).node) == length
    assert ("Slice" in {node.op_type for node in result.graph.node}) == bool(steps % length)
    assert_close(run_ort(result, inputs), standard.evaluate("GRU", {}, inputs))


def test_what_nobody_reads_is_not_computed():
    inputs = standard.draw("LSTM", {}, dtype=np.float32)
    for outputs, left in ((["Y"], 3), (["", "Y_h"], 3), (["", "", "Y_c"], 4)):
        model = standard.model("LSTM", {}, inputs, outputs=outputs, dynamic=OPEN)
        result = unrolled(model, plan=Plan(time=3))
        assert [len(node.output) for node in scans(result)] == [left]
        assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_batch_of_zero(direction):
    attributes = {"direction": direction}
    inputs = standard.draw("LSTM", attributes, optional=("B",), dtype=np.float32)
    # from version 18 on ONNX Runtime refuses to split no rows into pieces
    result = unrolled(standard.model("LSTM", attributes, inputs, dynamic=OPEN, opset=17), plan=Plan(time=3))
    shapes = [array.shape for array in run_ort(result, {"X": inputs["X"][:, :0]})]
    count = len(standard.directions(attributes))
    assert shapes == [(4, count, 0, 3), (count, 0, 3), (count, 0, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_opset(kind):
    inputs = standard.draw(kind, {}, optional=("B",), dtype=np.float32)
    expected = standard.evaluate(kind, {}, inputs)
    for opset in range(13, onnx.defs.onnx_opset_version() + 1):
        result = unrolled(standard.model(kind, {}, inputs, dynamic=OPEN, opset=opset), plan=Plan(time=3))
        assert_close(run_reference(result, inputs), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_rounding(kind, dtype, tmp_path):
    """At most twice as far from the exact result as the original."""
    torch.manual_seed(0)
    exact = kind(8, 16, bidirectional=True).eval()
    x = torch.randn(50, 3, 8, dtype=dtype)
    low = kind(8, 16, bidirectional=True).to(dtype).eval()
    low.load_state_dict(exact.state_dict())
    exact.double().load_state_dict(low.state_dict())
    shapes = {"input": {0: Dim("T"), 1: Dim("B")}}
    export = export_onnx(low, x, tmp_path / "m.onnx", dynamic_shapes=shapes, plan=Plan(time=16), check=False)
    file = onnx.load(export.path)
    results = run_ort(file, {file.graph.input[0].name: x.numpy()})
    with torch.no_grad():
        (y, states), (wanted, finals) = low(x), exact(x.double())
    states, finals = ((s,) if isinstance(s, torch.Tensor) else s for s in (states, finals))
    for ours, theirs, right in zip(results, (y, *states), (wanted, *finals), strict=True):
        worst = (theirs.double() - right).abs().max().item()
        assert (torch.from_numpy(ours).double() - right).abs().max().item() <= 2 * worst
