"""Files that are broken are refused, and what is rare and valid comes out valid."""

from __future__ import annotations

import itertools
import os
import re

import numpy as np
import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import unroll
from tests.onnx import standard
from tests.onnx.test_models import assert_close, operators, run_ort
from unroll import UnrollError
from unroll.core.errors import Problems
from unroll.onnx import files, reading

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

VALUES = {
    FieldDescriptor.CPPTYPE_STRING: st.sampled_from(["", "Y", "W", "x y", "LSTM", "é"]),
    FieldDescriptor.CPPTYPE_INT32: st.sampled_from([-1, 0, 1, 7, 8, 99]),
    FieldDescriptor.CPPTYPE_INT64: st.sampled_from([-(2**40), -1, 0, 1, 3, 2**40, 2**62]),
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from([0.0, -1.0, float("nan"), float("inf")]),
}


def messages(message):
    """The message and all in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from messages(inner)


def drawn(draw, field):
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.sampled_from([b"", b"\xff", b"Tanh", b"forward"]))
    if field.enum_type is not None:
        return draw(st.sampled_from([value.number for value in field.enum_type.values]))
    return draw(VALUES.get(field.cpp_type, st.just(0)))


def break_at_random(draw, model):
    """Change one field of one message in a model."""
    message = draw(st.sampled_from(list(messages(model))))
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields)))
    value, kind = getattr(message, field.name), draw(st.sampled_from(["clear", "set", "twice", "swap"]))
    if kind == "clear":
        message.ClearField(field.name)
    elif field.is_repeated and kind == "swap":
        kept = list(value)[::-1]
        del value[:]
        value.extend(kept)
    elif field.is_repeated and kind == "twice" and len(value):
        value.append(draw(st.sampled_from(list(value))))
    elif field.message_type is not None:
        (value.add() if field.is_repeated else value).SetInParent()
    elif field.is_repeated:
        value.append(drawn(draw, field))
    else:
        setattr(message, field.name, drawn(draw, field))


@st.composite
def broken(draw):
    """A model of one node, in the main graph, a branch or a function, with one to three faults."""
    kind = draw(st.sampled_from(["LSTM", "GRU", "RNN"]))
    attributes = {"direction": draw(st.sampled_from(["forward", "bidirectional"])), "clip": 1.0}
    attributes["activations"] = standard.DEFAULTS[kind] * len(standard.directions(attributes))
    optional = ("B", "sequence_lens", "initial_h", *(["initial_c", "P"] if kind == "LSTM" else []))
    inputs = standard.draw(kind, attributes, optional=optional, dtype=np.float32, steps=2, batch=2)
    model = standard.model(kind, attributes, inputs, dynamic=draw(st.sampled_from([(), ("steps", "batch")])))
    for _ in range(draw(st.integers(1, 3))):
        break_at_random(draw, model)
    return model


@given(broken())
@settings(max_examples=400, deadline=None)
def test_broken_models_are_refused_or_go_through(model):
    problems = Problems()
    with problems:
        assert isinstance(unroll.unroll(model), onnx.ModelProto)
    assert all(problem.finding and problem.fix for problem in problems)


def lstm(inputs=("x", "W", "R"), change=None, **attributes):
    node = helper.make_node("LSTM", inputs, ["y"], name="n", **{"hidden_size": 4, **attributes})
    weights = [numpy_helper.from_array(np.ones((1, 16, k), "f4"), name) for name, k in (("W", 2), ("R", 4))]
    x, y = (helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", [3, 2, 2]), ("y", [3, 1, 2, 4])))
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    if change:
        change(model)
    return model


def set_weights(kind):
    return lambda model: model.graph.initializer[0].CopyFrom(
        helper.make_tensor("W", kind, [1, 16, 2], [b"a"] * 32 if kind == TensorProto.STRING else [1] * 32)
    )


def unsorted(model):
    model.graph.node.insert(0, helper.make_node("Relu", ["y"], ["z"]))


BROKEN = {
    "a node twice": (lstm(change=lambda m: m.graph.node.append(m.graph.node[0])), "is not valid ONNX"),
    "no W": (lstm(["x", "", "R"]), "n: is not valid ONNX"),
    "no R": (lstm(["x", "W", ""]), "n: is not valid ONNX"),
    "no inputs": (lstm([]), "n: is not valid ONNX"),
    "no x": (lstm(["", "W", "R"]), "n: is not valid ONNX"),
    "hidden_size a list": (lstm(hidden_size=[4, 4]), "hidden_size"),
    "hidden_size a text": (lstm(hidden_size="x"), "hidden_size"),
    "activations a number": (lstm(activations=1.5), "activations"),
    "clip a text": (lstm(clip="x"), "clip"),
    "an attribute of another": (lstm(linear_before_reset=1), "linear_before_reset"),
    "W of texts": (lstm(change=set_weights(TensorProto.STRING)), "W: is of STRING; it must be of FLOAT"),
    "W of int4": (lstm(change=set_weights(TensorProto.INT4)), "W: is of INT4; it must be of FLOAT"),
    "W of another float": (lstm(change=set_weights(TensorProto.DOUBLE)), "W: is of DOUBLE; it must be of FLOAT"),
    "an input from nowhere": (lstm(["x", "W", "R", "b"]), "b: is read before anything gives it a value"),
    "not sorted": (lstm(change=unsorted), "y: is read before anything gives it a value"),
    "an output from nowhere": (
        lstm(change=lambda m: m.graph.output.append(helper.make_tensor_value_info("q", 1, [2]))),
        "q: is read before",
    ),
    "short data": (
        lstm(change=lambda m: setattr(m.graph.initializer[0], "raw_data", b"1234")),
        "W: its data cannot be read",
    ),
    "training": (lstm(change=lambda m: m.training_info.add()), "training_info"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name):
    model, text = BROKEN[name]
    with pytest.raises(UnrollError, match=re.escape(text)):
        unroll.unroll(model)
    if name not in ("a node twice", "an output from nowhere", "training"):  # which onnx_ir has no form for
        with pytest.raises(UnrollError):
            unroll.unroll(ir.from_proto(model))


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "link/w.bin"])
def test_data_outside_of_the_folder(tmp_path, location):
    inside, model = tmp_path / "inside", lstm()
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    (tmp_path / "w.bin").write_bytes(model.graph.initializer[0].raw_data)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (inside / "m.onnx").write_bytes(model.SerializeToString())
    for source in (model, inside / "m.onnx"):
        if source is model and location == "link/w.bin":
            continue
        with pytest.raises(UnrollError, match=r"W: its data is in .* outside of the folder"):
            unroll.unroll(source)


def test_missing_data_of_other_nodes(tmp_path):
    model = lstm(change=lambda m: m.graph.node.append(helper.make_node("Identity", ["c"], ["d"])))
    tensor = model.graph.initializer.add(name="c", data_type=1, dims=[3])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="none.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnrollError, match="weights cannot be read"):
        files.save(unroll.unroll(tmp_path / "m.onnx"), tmp_path / "n.onnx")


def sparse(array, name, *, flat):
    found = np.argwhere(array)
    indices = np.ravel_multi_index(tuple(found.T), array.shape) if flat else found
    made = onnx.SparseTensorProto(dims=array.shape)
    made.values.CopyFrom(numpy_helper.from_array(array[tuple(found.T)], name))
    made.indices.CopyFrom(numpy_helper.from_array(indices.astype(np.int64), f"{name}_places"))
    return made


@pytest.mark.parametrize("where", ["initializer", "constant", "branch"])
@pytest.mark.parametrize("flat", [True, False])
def test_sparse_weights(where, flat):
    inputs = standard.draw("RNN", {}, dtype=np.float32)
    inputs["R"] = np.where(np.abs(inputs["R"]) > 0.7, inputs["R"], 0)
    dense = standard.model("RNN", {}, inputs, known=("W",), outputs=["Y"])
    del dense.graph.input[1]
    weight = sparse(inputs["R"], "R", flat=flat)
    rest = list(dense.graph.node)
    if where == "initializer":
        dense.graph.sparse_initializer.append(weight)
    else:
        rest.insert(0, helper.make_node("Constant", [], ["R"], sparse_value=weight))
    if where == "branch":
        branches = [helper.make_graph(rest, name, [], [dense.graph.output[0]]) for name in ("then", "else")]
        yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
        rest = [
            yes,
            helper.make_node("If", ["yes"], ["out"], then_branch=branches[0], else_branch=branches[1]),
        ]
        dense.graph.output[0].name = "out"
    del dense.graph.node[:]
    dense.graph.node.extend(rest)
    onnx.checker.check_model(dense)
    unrolled = unroll.unroll(dense)
    onnx.checker.check_model(unrolled)
    assert not operators(unrolled) & {"RNN"}
    assert_close(run_ort(unrolled, inputs), standard.evaluate("RNN", {}, inputs)[:1], rtol=1e-5)


def test_sparse_weights_that_are_broken_or_huge():
    for change, text in (
        (lambda s: s.dims.__setitem__(0, 2**40), "R: is sparse, and of"),
        (lambda s: s.indices.CopyFrom(numpy_helper.from_array(np.array([-3, 9]), "R_places")), "R: is no valid sparse"),
    ):
        model = lstm(["x", "W", "R"])
        del model.graph.initializer[1]
        made = model.graph.sparse_initializer.add(dims=[1, 16, 4])
        made.values.CopyFrom(numpy_helper.from_array(np.ones(2, np.float32), "R"))
        made.indices.CopyFrom(numpy_helper.from_array(np.array([3, 9]), "R_places"))
        change(made)
        with pytest.raises(UnrollError, match=text):
            unroll.unroll(model)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_old_files_whose_weights_are_inputs(kind):
    inputs = standard.draw(kind, {}, dtype=np.float32)
    model = standard.model(kind, {}, inputs, opset=13, known=())
    model.ir_version = 3
    model.graph.initializer.extend(numpy_helper.from_array(inputs[name], name) for name in ("W", "R"))
    onnx.checker.check_model(model)
    unrolled = unroll.unroll(model)
    onnx.checker.check_model(unrolled)
    assert [v.name for v in unrolled.graph.input] == [v.name for v in model.graph.input]
    expected = standard.evaluate(kind, {}, inputs)
    assert_close(run_ort(unrolled, {"X": inputs["X"]}), expected, rtol=1e-5)
    assert_close(run_ort(unrolled, inputs), expected, rtol=1e-5)


def test_an_old_file_without_recurrent_nodes_stays_as_it_is():
    x, y = (helper.make_tensor_value_info(name, 1, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=3)
    assert unroll.unroll(model).ir_version == 3


PLANS = [
    f"gates={gates},products={products},directions={directions},time={time}"
    for gates, products, directions, time in itertools.product(
        ("merged", "paired", "split"), ("matrix", "sums"), ("separate", "stacked"), ("explicit", "2")
    )
]


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_weights_that_are_no_constants_in_every_plan(kind):
    attributes = {"direction": "bidirectional", **({"linear_before_reset": 1} if kind == "GRU" else {})}
    optional = ("B", *(["P"] if kind == "LSTM" else []))
    inputs = standard.draw(kind, attributes, optional=optional)
    expected = standard.evaluate(kind, attributes, inputs)
    for plan in PLANS:
        for known in ((), ("W", "R")):
            unrolled = unroll.unroll(standard.model(kind, attributes, inputs, known=known), plan=plan)
            onnx.checker.check_model(unrolled, full_check=True)
            assert_close(run_ort(unrolled, inputs), expected)


@pytest.mark.parametrize("attributes", [{}, {"mode": "LSTM"}, {"mode": 1, "batched": "x"}])
def test_a_node_called_as_those_on_their_way_through_torch(attributes):
    node = helper.make_node("Recurrence", ["x"], ["y"], domain="unroll", name="theirs", **attributes)
    values = [helper.make_tensor_value_info(name, 1, [3, 2, 2]) for name in "xy"]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("unroll", 1)]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]), opset_imports=opsets)
    with pytest.raises(UnrollError, match="theirs: is an unroll::Recurrence, which no file can hold"):
        unroll.unroll(model)


@pytest.mark.parametrize("name", ["Recurrence", "Other"])
def test_functions_and_operators_of_the_same_domain_stay(name):
    model = lstm(change=lambda m: m.graph.node.append(helper.make_node(name, ["y"], ["z"], domain="unroll")))
    model.opset_import.append(helper.make_opsetid("unroll", 1))
    relu = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(helper.make_function("unroll", name, ["a"], ["b"], [relu], model.opset_import))
    model.graph.output[0].name = "z"
    unrolled = unroll.unroll(model)
    onnx.checker.check_model(unrolled)
    x = np.ones((3, 2, 2), "f4")
    assert_close(run_ort(unrolled, {"x": x}), run_ort(model, {"x": x}), rtol=1e-5)


def test_reading_leaves_what_it_is_given(tmp_path, monkeypatch):
    model = lstm()
    before = model.SerializeToString()
    assert reading.read_model(model).graph.name == "g"
    assert model.SerializeToString() == before
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "m.onnx")
    assert reading.read_model("m.onnx").graph.name == reading.read_model(os.path.abspath("m.onnx")).graph.name
    with pytest.raises(UnrollError, match=r"unroll\(model\): got builtins.int"):
        reading.read_model(3)


@pytest.mark.parametrize("operator", ["DynamicQuantizeLSTM", "AttnLSTM"])
def test_recurrent_operators_of_onnx_runtime(operator):
    opset = helper.make_opsetid("com.microsoft", 1)
    node = helper.make_node(operator, ["y"], ["z"], domain="com.microsoft", name="theirs")
    model = lstm(change=lambda m: (m.graph.node.append(node), m.opset_import.append(opset)))
    with pytest.raises(UnrollError, match=f"theirs: is recurrent, and ONNX Runtime's own com.microsoft::{operator}"):
        unroll.unroll(model)
    with pytest.raises(UnrollError, match="theirs: is recurrent"):
        unroll.unroll(model, where="theirs")
    assert operators(unroll.unroll(model, where="n")) >= {operator}
