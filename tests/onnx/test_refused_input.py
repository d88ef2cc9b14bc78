"""What ONNX Runtime's recurrent operators refuse, the unrolled file refuses too; what they take, it computes alike."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from onnx import helper, numpy_helper

import unroll
from tests.onnx import standard
from tests.onnx.test_models import assert_close, run_ort
from unroll import UnrollError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

KINDS = ("LSTM", "GRU", "RNN")


def ran(model, inputs):
    try:
        return run_ort(model, inputs)
    except Exception:  # of many classes
        return None


def assert_alike(model, plan, inputs):
    """Both give the same, or neither gives anything; tell which."""
    theirs, ours = ran(model, inputs), ran(unroll.unroll(model, plan=plan), inputs)
    assert (theirs is None) == (ours is None), (inputs, "refused by the original" if theirs is None else "by ours")
    if theirs is not None:
        assert_close(ours, theirs, rtol=1e-5)
    return theirs is not None


def opened(model, *names):
    """Leave all sizes of inputs open."""
    for value in model.graph.input:
        if value.name in names:
            for k, dim in enumerate(value.type.tensor_type.shape.dim):
                dim.dim_param = f"{value.name}_{k}"
    return model


LENGTHS = {
    (0, 3, 1): True,
    (4, 0, 0): True,
    (0, 0, 0): True,
    (5, 1, 1): False,
    (4, -1, 2): False,
    (-5, 4, 4): False,
    (2**31 - 1, 1, 1): False,
    (-(2**31), 1, 1): False,
}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lengths(kind, direction):
    attributes = {"direction": direction}
    states = ["initial_h", *(["initial_c"] if kind == "LSTM" else [])]
    for dynamic, opset, optional, plan in itertools.product(
        ((), ("steps", "batch")), (13, 22), ((), states), ("onnxruntime", "time=3")
    ):
        inputs = standard.draw(kind, attributes, optional=("B", "sequence_lens", *optional), dtype=np.float32)
        model = standard.model(kind, attributes, inputs, dynamic=dynamic, opset=opset)
        for lengths, good in LENGTHS.items():
            assert assert_alike(model, plan, inputs | {"sequence_lens": np.array(lengths, np.int32)}) == good


@pytest.mark.parametrize("kind", KINDS)
def test_known_lengths(kind):
    inputs = standard.draw(kind, {}, optional=("sequence_lens", "initial_h"), dtype=np.float32)
    for lengths, good in LENGTHS.items():
        inputs["sequence_lens"] = np.array(lengths, np.int32)
        model = standard.model(kind, {}, inputs, known=("W", "R", "sequence_lens"))
        if good:
            unrolled = unroll.unroll(model)
            assert_close(run_ort(unrolled, inputs), run_ort(model, inputs), rtol=1e-5)
            assert "Gather" not in {node.op_type for node in unrolled.graph.node}
        else:
            with pytest.raises(UnrollError, match=r"rnn: sequence_lens: is .*; give whole numbers from 0"):
                unroll.unroll(model)
        open_ = standard.model(kind, {}, inputs, known=("W", "R", "sequence_lens"), dynamic=("steps",))
        if min(lengths) < 0:
            with pytest.raises(UnrollError, match="sequence_lens"):
                unroll.unroll(open_)
        else:
            assert assert_alike(open_, None, inputs) == good


def orders(shape):
    """Other shapes of as many numbers."""
    size = int(np.prod(shape))
    found = [s for s in itertools.product(range(1, size + 1), repeat=len(shape)) if np.prod(s) == size]
    return sorted({*found, *itertools.permutations(shape)} - {tuple(shape)})[::3]


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["initial_h", "W", "R", "B", "P", "initial_c"])
def test_as_many_numbers_in_another_order(kind, name):
    if kind != "LSTM" and name in ("P", "initial_c"):
        pytest.skip("an LSTM's alone")
    optional = ("B", "initial_h", *(["P", "initial_c"] if kind == "LSTM" else []))
    for direction, opset, plan in (("forward", 22, None), ("bidirectional", 13, None), ("bidirectional", 22, "time=2")):
        attributes = {"direction": direction}
        inputs = standard.draw(kind, attributes, optional=optional, dtype=np.float32, batch=2, size=2)
        model = opened(
            standard.model(kind, attributes, inputs, known=(), dynamic=("steps", "batch"), opset=opset), name
        )
        assert assert_alike(model, plan, inputs)
        for shape in orders(inputs[name].shape):
            assert not assert_alike(model, plan, inputs | {name: inputs[name].reshape(shape)})


@pytest.mark.parametrize("kind", KINDS)
def test_computed_states_in_another_order(kind):
    inputs = standard.draw(kind, {}, optional=("initial_h",), dtype=np.float32, batch=3, size=3)
    model = standard.model(kind, {}, inputs, dynamic=("batch",))
    model.graph.node.insert(0, helper.make_node("Reshape", ["initial_h", "to"], ["moved"]))
    model.graph.node[1].input[5] = "moved"
    model.graph.input.append(helper.make_tensor_value_info("to", 7, [3]))
    assert assert_alike(model, None, inputs | {"to": np.array([1, 3, 3])})
    for to in ([3, 1, 3], [3, 3, 1], [1, 9, 1], [9, 1, 1], [1, 1, 9]):
        assert not assert_alike(model, None, inputs | {"to": np.array(to)})


@pytest.mark.parametrize("kind", KINDS)
def test_states_and_weights_of_known_sizes_cost_nothing(kind):
    inputs = standard.draw(kind, {}, optional=("B", "initial_h"), dtype=np.float32)
    known = unroll.unroll(standard.model(kind, {}, inputs, known=(), dynamic=("batch",)))
    names = [node.name for node in known.graph.node if node.op_type == "Split" and len(node.output) == 1]
    assert not names
    constants = {t.name: numpy_helper.to_array(t) for t in known.graph.initializer}
    assert all(array.size < 10 for array in constants.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_of_unknown_rank(kind):
    inputs = standard.draw(kind, {}, dtype=np.float32, batch=2, size=2)
    model = standard.model(kind, {}, inputs, known=("W", "R"))
    given = next(value for value in model.graph.input if value.name == "X")
    given.type.tensor_type.ClearField("shape")
    x = inputs["X"]
    for plan in (None, "time=2"):
        assert assert_alike(model, plan, inputs)
        for shape in ((*x.shape[:2], 1, x.shape[2]), (*x.shape, 1), (*x.shape, 2), x.shape[:2]):
            wrong = np.resize(x, shape)
            assert not assert_alike(model, plan, inputs | {"X": wrong})
