"""The pass on ONNX models: the standard's own tests, every attribute, every place a node can be in."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_scan

from tests.by_version import SHAPES_LSTM_STATES
from tests.onnx import standard
from unroll import Plan, UnrollError, unroll
from unroll.core import cells
from unroll.export.counting import inspect_model
from unroll.onnx import files
from unroll.onnx import standard as reader
from unroll.onnx.rewrite import unroll_model

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")
KINDS = ("LSTM", "GRU", "RNN")


def operators(model):
    """The operators of a model, also of the graphs in its nodes and of its functions."""
    found = set()

    def look(nodes):
        for node in nodes:
            found.add(node.op_type)
            for attribute in node.attribute:
                look(attribute.g.node)

    look(model.graph.node)
    for function in model.functions:
        look(function.node)
    return found


class Scan(op_scan.Scan):
    """The reference evaluator's, which knows no directions, with what goes in and comes out turned round by hand."""

    def __init__(self, node, run_params):
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        kept = [a for a in node.attribute if not a.name.endswith("directions")]
        self.backwards = len(kept) < len(node.attribute)
        del plain.attribute[:]
        plain.attribute.extend(kept)
        super().__init__(plain, run_params)

    def _run(self, *args, **kwargs):
        first = len(args) - self.num_scan_inputs
        if not self.backwards:
            return super()._run(*args, **kwargs)
        results = super()._run(*args[:first], *(a[::-1] for a in args[first:]), **kwargs)
        return (*results[:first], *(r[::-1] for r in results[first:]))


def run_reference(model, inputs):
    names = {value.name for value in model.graph.input}
    with np.errstate(over="ignore"):  # its Elu and Sigmoid compute more than they return
        return ReferenceEvaluator(model, new_ops=[Scan]).run(
            None, {name: v for name, v in inputs.items() if name in names}
        )


def run_ort(model, inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in inputs.items() if name in names})


def assert_close(actual, expected, rtol=1e-9):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * max(1.0, np.abs(e).max(initial=0)))


def unrolled(model, **options):
    """Unrolled, valid, and with nothing recurrent left."""
    before = model.SerializeToString()
    result = unroll_model(model, **options)
    assert model.SerializeToString() == before
    onnx.checker.check_model(result, full_check=True)
    assert not operators(result) & {"LSTM", "GRU", "RNN"}
    return result


def node_tests():
    """The tests of recurrent nodes that the onnx package brings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in ("lstm", "gru", "rnn"):
            importlib.import_module(f"onnx.backend.test.case.node.{module}")
    from onnx.backend.test.case.node import _NodeTestCases

    cases = {case.name: case for case in _NodeTestCases if case.model.graph.node[0].op_type in KINDS}
    assert len(cases) >= 18
    return [cases[name] for name in sorted(cases)]


@pytest.mark.parametrize("case", node_tests(), ids=lambda case: case.name)
def test_node_test_of_the_standard(case):
    result = unrolled(case.model)
    ((inputs, outputs),) = case.data_sets
    feed = {value.name: array for value, array in zip(case.model.graph.input, inputs, strict=True)}
    for run in (run_reference, run_ort):
        assert_close(run(result, feed), outputs, rtol=1e-5)


DIRECTIONS = ("forward", "reverse", "bidirectional")


@st.composite
def nodes(draw):
    """A node by its kind, attributes, the optional inputs it has and the sizes."""
    kind = draw(st.sampled_from(KINDS))
    attributes = {"direction": draw(st.sampled_from(DIRECTIONS)), "layout": draw(st.sampled_from((0, 1)))}
    if draw(st.booleans()):
        count = len(standard.directions(attributes))
        names = draw(
            st.lists(
                st.sampled_from(list(standard.FUNCTIONS)),
                min_size=count * len(standard.DEFAULTS[kind]),
                max_size=count * len(standard.DEFAULTS[kind]),
            )
        )
        attributes["activations"] = names
        for which, takers in (("alpha", standard.ALPHAS), ("beta", standard.BETAS)):
            taking = [name for name in names if name in takers]
            needed = max((k + 1 for k, name in enumerate(taking) if name in ("Affine", "ScaledTanh")), default=0)
            values = draw(st.lists(st.sampled_from((0.125, 0.25, 0.5)), min_size=needed, max_size=len(taking)))
            if values:
                attributes[f"activation_{which}"] = values
    if draw(st.booleans()):
        attributes["clip"] = 0.5
    optional = ["B", "sequence_lens", "initial_h"]
    if kind == "LSTM":
        optional += ["initial_c", "P"]
        attributes["input_forget"] = draw(st.sampled_from((0, 1)))
    if kind == "GRU":
        attributes["linear_before_reset"] = draw(st.sampled_from((0, 1)))
    chosen = tuple(name for name in optional if draw(st.booleans()))
    sizes = {"steps": draw(st.integers(1, 4)), "batch": draw(st.integers(1, 3))}
    return kind, attributes, chosen, sizes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    nodes(),
    st.sets(st.sampled_from(("steps", "batch"))),
    st.booleans(),
    st.sampled_from((13, 17, 18, 22)),
    st.sampled_from(("merged", "paired", "split")),
    st.sampled_from(("explicit", 1, 2, 3)),
)
def test_every_attribute(drawn, dynamic, weights_known, opset, gates, time):
    kind, attributes, optional, sizes = drawn
    opset = max(opset, 14 if attributes["layout"] else 0)
    inputs = standard.draw(kind, attributes, optional=optional, **sizes)
    known = ("W", "R", "B", "P") if weights_known else ()
    model = standard.model(kind, attributes, inputs, known=known, dynamic=tuple(dynamic), opset=opset)
    result = unrolled(model, plan=Plan(gates=gates, time=time))
    assert ("Scan" in operators(result)) == ("steps" in dynamic or time != "explicit")
    assert result.opset_import[0].version == opset
    assert_close(run_reference(result, inputs), standard.evaluate(kind, attributes, inputs))


RUNS_IN_ORT = [
    ("LSTM", {"direction": "bidirectional", "clip": 0.4}, ("B", "sequence_lens", "initial_h", "initial_c", "P")),
    ("LSTM", {"direction": "reverse", "input_forget": 1}, ("B", "sequence_lens")),
    ("LSTM", {"activations": ["HardSigmoid", "Softsign", "Relu"]}, ("B", "initial_c")),
    ("GRU", {"direction": "bidirectional", "linear_before_reset": 1}, ("B", "sequence_lens", "initial_h")),
    ("GRU", {"direction": "reverse", "linear_before_reset": 0, "clip": 0.3}, ("B", "sequence_lens")),
    (
        "GRU",
        {"activations": ["HardSigmoid", "LeakyRelu"], "activation_alpha": [0.25, 0.125], "activation_beta": [0.5]},
        ("B",),
    ),
    (
        "RNN",
        {
            "direction": "bidirectional",
            "activations": ["Elu", "ScaledTanh"],
            "activation_alpha": [0.5, 0.75],
            "activation_beta": [1.5],
        },
        ("B", "sequence_lens", "initial_h"),
    ),
    ("RNN", {"activations": ["ThresholdedRelu"], "activation_alpha": [0.25]}, ("B",)),
    ("RNN", {"activations": ["Softplus"], "clip": 1.0}, ()),
    (
        "RNN",
        {"direction": "reverse", "activations": ["Affine"], "activation_alpha": [0.5], "activation_beta": [0.25]},
        ("B",),
    ),
]


@pytest.mark.parametrize(("kind", "attributes", "optional"), RUNS_IN_ORT)
@pytest.mark.parametrize("dynamic", [(), ("steps", "batch")], ids=["fixed", "dynamic"])
def test_same_as_the_original_in_onnx_runtime(kind, attributes, optional, dynamic):
    inputs = standard.draw(kind, attributes, optional=optional, dtype=np.float32)
    model = standard.model(kind, attributes, inputs, dynamic=dynamic)
    assert_close(run_ort(unrolled(model), inputs), run_ort(model, inputs), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_length_and_batch(kind, direction):
    attributes = {"direction": direction}
    inputs = standard.draw(kind, attributes, optional=("B", "initial_h"))
    result = unrolled(standard.model(kind, attributes, inputs, dynamic=("steps", "batch")))
    for steps, batch in ((1, 1), (1, 4), (2, 3), (9, 1), (40, 2)):
        other = standard.draw(kind, attributes, optional=("initial_h",), steps=steps, batch=batch, seed=steps)
        other = inputs | {"X": other["X"], "initial_h": other["initial_h"]}
        assert_close(run_ort(result, other), standard.evaluate(kind, attributes, other))


def test_batch_of_zero():
    inputs = standard.draw("GRU", {}, optional=("B",), dtype=np.float32)
    result = unrolled(standard.model("GRU", {}, inputs, dynamic=("steps", "batch")))
    shapes = [array.shape for array in run_ort(result, {"X": inputs["X"][:, :0]})]
    assert shapes == [(4, 1, 0, 3), (1, 0, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_opset(kind):
    inputs = standard.draw(kind, {}, optional=("B",), dtype=np.float32)
    expected = standard.evaluate(kind, {}, inputs)
    for opset in range(13, onnx.defs.onnx_opset_version() + 1):
        for dynamic in ((), ("steps",)):
            result = unrolled(standard.model(kind, {}, inputs, dynamic=dynamic, opset=opset))
            assert result.opset_import[0].version == opset
            assert_close(run_reference(result, inputs), expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_low_precision(kind, name):
    dtype = {"float16": np.float16, "bfloat16": pytest.importorskip("ml_dtypes").bfloat16}[name]
    inputs = standard.draw(kind, {}, optional=("B", "initial_h"), dtype=dtype)
    exact = standard.evaluate(kind, {}, {key: value.astype(np.float64) for key, value in inputs.items()})
    step = float(onnx.numpy_helper.ml_dtypes.finfo(dtype).eps)
    for dynamic in ((), ("steps",)):
        result = run_reference(unrolled(standard.model(kind, {}, inputs, dynamic=dynamic)), inputs)
        for a, e in zip(result, exact, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(a.astype(np.float64), e, atol=4 * step * max(1.0, np.abs(e).max()))


def test_weights_that_are_computed():
    """Weights may come from other nodes, and then go on to."""
    inputs = standard.draw("LSTM", {}, optional=("B", "P"))
    model = standard.model("LSTM", {}, inputs, known=("P",))
    scale = onnx.helper.make_node("Mul", ["R", "R"], ["R2"])
    model.graph.node.insert(0, scale)
    model.graph.node[1].input[2] = "R2"
    for dynamic in ((), ("steps",)):
        if dynamic:
            model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "T"
        squared = inputs | {"R": inputs["R"] ** 2}
        assert_close(run_reference(unrolled(model), inputs), standard.evaluate("LSTM", {}, squared))


def test_initializer_that_is_also_an_input_stays_one():
    inputs = standard.draw("GRU", {}, dtype=np.float32)
    model = standard.model("GRU", {}, inputs)
    model.graph.input.append(onnx.helper.make_tensor_value_info("W", 1, list(inputs["W"].shape)))
    result = unrolled(model)
    other = inputs | {"W": inputs["W"] * 2}
    assert_close(run_ort(result, other), run_ort(model, other), rtol=1e-5)
    assert_close(run_ort(result, {"X": inputs["X"]}), run_ort(model, {"X": inputs["X"]}), rtol=1e-5)


def node_counts(model):
    return {kind: sum(node.op_type == kind for node in model.graph.node) for kind in operators(model)}


def test_what_a_step_is_made_of():
    """Weights stored once and transposed already, one Split and one Concat, nothing that nobody reads."""
    steps, size = 7, 3
    inputs = standard.draw("LSTM", {}, optional=("B",), steps=steps, dtype=np.float32)
    model = standard.model("LSTM", {}, inputs, outputs=["Y"])
    result = unrolled(model)
    assert node_counts(result) == {
        "Reshape": 2,  # rows, and Y
        "Gemm": 2 * steps,  # two products with the input, two a step but the first, whose h is zero
        "Split": 2 + steps,
        "Sigmoid": steps,
        "Tanh": 2 * steps,
        "Mul": 3 * steps - 1,
        "Add": steps - 1,
        "Concat": 1,
    }
    shapes = {tuple(i.dims) for i in result.graph.initializer if len(i.dims) > 1}
    assert shapes == {(2, 3 * size), (2, size), (size, 3 * size), (size, size)}
    names = {name for node in result.graph.node for name in node.output}
    assert {"rnn.l0.t6.forget", "rnn.l0.t0.cell", "rnn.l0.t3.c", "rnn.l0.t3.h", "Y"} <= names
    read = {name for node in result.graph.node for name in node.input} | {"Y"}
    assert all(read & set(node.output) for node in result.graph.node)
    assert {i.name for i in result.graph.initializer} <= read


def test_what_nobody_reads_is_not_computed():
    attributes = {"direction": "bidirectional"}
    inputs = standard.draw("GRU", attributes, dtype=np.float32)
    for dynamic in ((), ("steps",)):
        model = standard.model("GRU", attributes, inputs, outputs=["", "Y_h"], dynamic=dynamic)
        result = unrolled(model)
        assert "Y" not in {name for node in result.graph.node for name in node.output}
        scans = [node for node in result.graph.node if node.op_type == "Scan"]
        assert [len(node.output) for node in scans] == [1, 1] * bool(dynamic)
        assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)
    # Y's last step of the forward direction needs nothing of the other one
    model = standard.model("GRU", attributes, inputs, outputs=["", "Y_h"])
    index = onnx.numpy_helper.from_array(np.array(0), "index")
    model.graph.initializer.append(index)
    model.graph.node.append(onnx.helper.make_node("Gather", ["Y_h", "index"], ["first"], axis=0))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("first", 1, [3, 3]))
    assert_close(run_ort(unrolled(model), inputs), run_ort(model, inputs), rtol=1e-5)


def test_zeros_that_are_written_out_cost_nothing():
    inputs = standard.draw("LSTM", {}, optional=("initial_h", "initial_c"), dtype=np.float32)
    inputs |= {"initial_h": inputs["initial_h"] * 0, "initial_c": inputs["initial_c"] * 0}
    given = unrolled(standard.model("LSTM", {}, inputs, known=("W", "R", "initial_h", "initial_c")))
    without = {name: inputs[name] for name in ("X", "W", "R")}
    assert node_counts(given) == node_counts(unrolled(standard.model("LSTM", {}, without)))


def inside(model, place):
    """The model of one node, with the node inside a branch, a loop, a scan or a function."""
    graph, helper = model.graph, onnx.helper
    (node,), outputs = graph.node, list(graph.output)
    body = [node]
    if place == "If":
        inner = [helper.make_tensor_value_info(f"in_{o.name}", 1, None) for o in outputs]
        node.output[:] = [o.name for o in inner]
        other = [helper.make_node("Identity", ["initial_h"], [o.name + "_else"]) for o in outputs]
        other_outputs = [helper.make_tensor_value_info(o.name + "_else", 1, None) for o in outputs]
        condition = helper.make_node("Less", ["zero", "one"], ["condition"])
        branch = helper.make_node(
            "If",
            ["condition"],
            [o.name for o in outputs],
            then_branch=helper.make_graph(body, "then", [], inner),
            else_branch=helper.make_graph(other, "else", [], other_outputs),
        )
        new = [condition, branch]
    elif place == "Loop":
        # h = node(X, h) three times
        node.input[5], node.output[:] = "h", ["", "h_out"]
        keep = helper.make_node("Identity", ["go"], ["go_out"])
        info = [
            helper.make_tensor_value_info(n, k, s) for n, k, s in (("i", 7, []), ("go", 9, []), ("h", 1, [1, 3, 3]))
        ]
        made = [helper.make_tensor_value_info("go_out", 9, []), helper.make_tensor_value_info("h_out", 1, [1, 3, 3])]
        loop = helper.make_graph([keep, *body], "body", info, made)
        new = [helper.make_node("Loop", ["three", "", "initial_h"], ["Y_h"], body=loop)]
    elif place == "function":
        names, made = [n for n in node.input if n], [n for n in node.output if n]
        function = helper.make_function("local", "Encoder", names, made, body, [helper.make_opsetid("", 22)], ["width"])
        attribute = next(a for a in function.node[0].attribute if a.name == "hidden_size")
        attribute.ref_attr_name = "width"
        attribute.ClearField("i")
        outer = helper.make_function(
            "local",
            "Outer",
            names,
            made,
            [helper.make_node("Encoder", names, made, domain="local", width=3)],
            [helper.make_opsetid("local", 1), helper.make_opsetid("", 22)],
        )
        model.functions.extend([function, outer])
        model.opset_import.append(helper.make_opsetid("local", 1))
        new = [helper.make_node("Outer", names, made, domain="local")]
    for name, value in (("zero", np.float32(0)), ("one", np.float32(1)), ("three", np.int64(3))):
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    del graph.node[:]
    graph.node.extend(new)
    return model


@pytest.mark.parametrize("place", ["If", "Loop", "function"])
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("dynamic", [(), ("steps",)], ids=["fixed", "dynamic"])
def test_inside(place, kind, dynamic):
    inputs = standard.draw(kind, {}, optional=("B", "initial_h"), dtype=np.float32)
    model = inside(standard.model(kind, {}, inputs, outputs=["", "Y_h"], dynamic=dynamic), place)
    onnx.checker.check_model(model)
    result = unrolled(model)
    assert {"If", "Loop"} & operators(model) <= operators(result)
    assert not result.functions
    assert ("Scan" in operators(result)) == bool(dynamic)
    assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)


def test_inspection_sees_into_functions():
    inputs = standard.draw("GRU", {}, optional=("B", "initial_h"), dtype=np.float32)
    model = ir.from_proto(inside(standard.model("GRU", {}, inputs, outputs=["", "Y_h"]), "function"))
    found = inspect_model(model)
    (layer,) = found.layers
    assert not found.problems and (layer.kind, layer.steps) == ("GRU", 4) and layer.nodes > 20
    assert len(model.functions) == 2


def test_inspection_shows_what_can_be_read():
    model, _ = two_layers()
    model.graph.node[2].attribute.append(onnx.helper.make_attribute("direction", "up"))
    found = inspect_model(ir.from_proto(model))
    assert [layer.name for layer in found.layers] == ["first"]
    assert [problem.place for problem in found.problems] == ["second"]


def two_layers(names=("first", "second")):
    """Two GRUs that share their weights, one after the other."""
    inputs = standard.draw("GRU", {}, optional=("B",), features=3, dtype=np.float32)
    model = standard.model("GRU", {}, inputs, outputs=["Y"])
    first = model.graph.node[0]
    axes = onnx.numpy_helper.from_array(np.array([1]), "axes")
    model.graph.initializer.append(axes)
    second = onnx.NodeProto()
    second.CopyFrom(first)
    first.name, second.name = names
    first.output[:], second.input[0] = ["Y1"], "X2"
    model.graph.node.extend([onnx.helper.make_node("Squeeze", ["Y1", "axes"], ["X2"]), second])
    return model, inputs


def test_inspection_counts_the_nodes_of_each_layer_once():
    model, _ = two_layers(("rnn", "rnn.1"))
    first, second = inspect_model(ir.from_proto(model)).layers
    assert first.nodes and abs(first.nodes - second.nodes) < second.nodes / 2
    apart = inspect_model(ir.from_proto(two_layers()[0])).layers
    assert (first.nodes, second.nodes) == tuple(layer.nodes for layer in apart)


def test_shared_weights_are_stored_once():
    model, inputs = two_layers()
    result = unrolled(model)
    assert sum(len(i.dims) == 2 for i in result.graph.initializer) == 4
    assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)


@pytest.mark.parametrize("names", [("same", "same"), ("", ""), ("axes", "X2")])
def test_names_that_are_taken(names):
    model, inputs = two_layers(names)
    assert_close(run_reference(unrolled(model), inputs), run_reference(model, inputs), rtol=1e-5)


def test_where():
    model, inputs = two_layers()
    result = unroll_model(model, where="sec*")
    assert [node.name for node in result.graph.node if node.op_type == "GRU"] == ["first"]
    assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)
    with pytest.raises(UnrollError, match="names no recurrent node; the recurrent nodes are: first, second"):
        unroll_model(model, where="third")


def test_steps():
    inputs = standard.draw("LSTM", {}, dtype=np.float32)
    model = standard.model("LSTM", {}, inputs, dynamic=("steps", "batch"))
    for steps in (4, {"rnn": 4}):
        result = unrolled(model, steps=steps)
        assert "Scan" not in operators(result)
        assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)
    # another length would give other numbers, if it did not fail
    for length in (2, 8):
        other = standard.draw("LSTM", {}, steps=length, batch=2, dtype=np.float32)
        with pytest.raises(Exception, match="Split"):
            run_ort(result, {"X": other["X"]})
    fixed = standard.model("LSTM", {}, inputs)
    with pytest.raises(UnrollError, match="rnn: has 4 time steps; leave out steps=5 or make it 4"):
        unroll_model(fixed, steps=5)
    with pytest.raises(UnrollError, match=r"steps\['typo'\]: names no recurrent layer; .*: rnn"):
        unroll_model(model, steps={"rnn": 4, "typo": 4})
    with pytest.raises(UnrollError, match="is a dict; give a Plan"):
        unroll_model(model, plan={"gates": "split"})
    with pytest.raises(UnrollError, match="whole number from 1"):
        unroll_model(model, steps=0)


def test_wrong_shapes_inside_a_model_are_not_believed():
    inputs = standard.draw("GRU", {}, dtype=np.float32)
    model = standard.model("GRU", {}, inputs, dynamic=("steps", "batch"))
    model.graph.node.insert(0, onnx.helper.make_node("Relu", ["X"], ["X2"]))
    model.graph.node[1].input[0] = "X2"
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("X2", 1, [4, None, 2]))
    result = unroll_model(model)
    assert "Scan" not in operators(result)
    assert_close(run_ort(result, inputs), run_ort(model, inputs), rtol=1e-5)
    with pytest.raises(Exception, match="Split"):
        run_ort(result, {"X": np.concatenate([inputs["X"]] * 2)})


def with_shape(model, name, shape):
    """The model, with other sizes of an input; None for an open one."""
    value = next(i for i in model.graph.input if i.name == name)
    value.CopyFrom(onnx.helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, shape))
    return model


def test_negative_sizes_are_open():
    inputs = standard.draw("GRU", {}, dtype=np.float32)
    model = standard.model("GRU", {}, inputs)
    original = with_shape(standard.model("GRU", {}, inputs), "X", [None, 3, 2])
    for shape in ([-1, 3, 2], [-1, -1, -1]):
        result = unrolled(with_shape(model, "X", shape))
        assert "Scan" in operators(result)
        assert_close(run_ort(result, inputs), run_ort(original, inputs), rtol=1e-5)


def test_both_names_of_the_standard():
    inputs = standard.draw("LSTM", {})
    model = standard.model("LSTM", {}, inputs)
    expected = unroll_model(model)
    model.opset_import[0].domain = model.graph.node[0].domain = "ai.onnx"
    assert unroll_model(model) == expected


def test_no_steps_at_all():
    model = standard.model("RNN", {}, standard.draw("RNN", {}))
    with pytest.raises(UnrollError, match="rnn: has 0 time steps; give it a sequence of at least one"):
        unroll_model(with_shape(model, "X", [0, 3, 2]))


@pytest.mark.parametrize("layout", [0, 1])
def test_open_features_are_checked_in_a_run(layout):
    attributes = {"layout": layout}
    inputs = standard.draw("LSTM", attributes, dtype=np.float32)
    model = standard.model("LSTM", attributes, inputs)
    result = unroll_model(with_shape(model, "X", [3, 4, None] if layout else [4, 3, None]))
    assert_close(run_ort(result, inputs), standard.evaluate("LSTM", attributes, inputs), rtol=1e-5)
    with pytest.raises(Exception, match="Split"):
        run_ort(result, {"X": np.concatenate([inputs["X"]] * 2, 2)})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("X", [4, 3, 4], r"X: has shape \[4, 3, 4\]; it must be \[steps, 3, 2\]"),
        ("X", [None, None, 4], r"X: has shape \[\?, \?, 4\]; it must be \[steps, batch, 2\]"),
        ("X", [4, 2], r"X: has shape \[4, 2\]; it must be"),
        ("initial_h", [1, 1, 3], r"initial_h: has shape \[1, 1, 3\]; it must be \[1, 3, 3\]"),
        ("initial_c", [1, 3, 1], r"initial_c: has shape \[1, 3, 1\]; it must be \[1, 3, 3\]"),
        ("sequence_lens", [1], r"sequence_lens: has shape \[1\]; it must be \[3\]"),
        ("P", [1, 3], r"P: has shape \[1, 3\]; it must be \[1, 9\]"),
    ],
)
def test_inputs_of_other_shapes_are_refused(name, shape, message):
    inputs = standard.draw("LSTM", {}, optional=("B", "sequence_lens", "initial_h", "initial_c", "P"))
    model = standard.model("LSTM", {}, inputs, known=("W", "R", "B"))
    with pytest.raises(UnrollError, match=message):
        unroll_model(with_shape(model, name, shape))


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


# By torch's older exporter, and by its newer one, which knows neither a dynamic length nor the other operators.
FILES = [(kind, dynamic, False) for kind in KINDS for dynamic in (False, True)] + [("LSTM", False, True)]


@pytest.mark.parametrize(("kind", "dynamic", "dynamo"), FILES)
def test_files_of_other_exporters(kind, dynamic, dynamo, tmp_path):
    layer = getattr(torch.nn, kind)(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    model, x = Wrapped(layer).eval(), torch.randn(2, 6, 3)
    path = tmp_path / "model.onnx"
    axes = {"dynamic_axes": {"x": {0: "N", 1: "T"}}} if dynamic else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], external_data=False, **axes)
    original = onnx.load(path)
    assert operators(original) & set(KINDS)
    if not SHAPES_LSTM_STATES:
        for value in (*original.graph.value_info, *original.graph.output):  # the file itself is refused for them
            value.type.tensor_type.ClearField("shape")
    result = unrolled(original)
    assert ("Scan" in operators(result)) == dynamic
    for shape in ((2, 6, 3), (1, 9, 3), (4, 1, 3)) if dynamic else ((2, 6, 3),):
        inputs = {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
        assert_close(run_ort(result, inputs), run_ort(original, inputs), rtol=1e-5)


def test_same_kind_comes_out(tmp_path):
    inputs = standard.draw("RNN", {})
    model = standard.model("RNN", {}, inputs)
    assert isinstance(unroll(model), onnx.ModelProto)
    as_ir = ir.from_proto(model)
    result = unroll(as_ir)
    assert isinstance(result, ir.Model)
    assert [node.op_type for node in as_ir.graph] == ["RNN"]
    onnx.save(model, tmp_path / "model.onnx")
    for path in (tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        assert ir.to_proto(unroll(path)) == ir.to_proto(result)
    assert unroll(unroll(model)) == unroll(model)


def test_external_data(tmp_path):
    inputs = standard.draw("LSTM", {}, optional=("B",), dtype=np.float32)
    model = standard.model("LSTM", {}, inputs)
    place = tmp_path / "there" / "model.onnx"
    place.parent.mkdir()
    onnx.save(model, place, save_as_external_data=True, size_threshold=0, location="weights")
    for largest, beside in ((10**9, False), (100, True)):
        target = tmp_path / f"{largest}.onnx"
        with files.write_then_move(unroll(place), target, largest=largest) as draft:
            assert draft.exists() and not target.exists()
        assert target.with_name(target.name + ".data").exists() == beside
        assert_close(run_ort(target, inputs), run_ort(place, inputs), rtol=1e-5)
    (tmp_path / "full.onnx.data").mkdir()
    delivery = files.write_then_move(unroll(place), tmp_path / "full.onnx", largest=100)
    with pytest.raises(UnrollError, match=r"full\.onnx: cannot be written"), delivery:
        pass
    assert not (tmp_path / "full.onnx").exists()
    weights = place.with_name("weights")
    weights.write_bytes(weights.read_bytes()[:8])
    with pytest.raises(UnrollError, match="its data is in a file that cannot be read"):
        unroll(place)
    with pytest.raises(UnrollError, match="its data is in a file that cannot be read"):
        unroll(onnx.load(place, load_external_data=False))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"activations": ["Sigmoid", "Swish", "Gelu"]}, "(?s)'Swish' is unknown.*'Gelu' is unknown"),
        ({"activations": ["Sigmoid", "Tanh"]}, "has 2 activations for 1 direction"),
        (
            {"activations": ["Sigmoid", "Affine", "ScaledTanh"], "activation_alpha": [1.0]},
            "(?s)Affine has no beta.*ScaledTanh has no alpha; give activation_alpha a value",
        ),
        ({"direction": "sideways"}, "direction is 'sideways'; it is forward, reverse or bidirectional"),
        ({"layout": 2}, "layout is 2; it is 0 or 1"),
        ({"activation_alpha": [0.5]}, "activation_alpha has 1 more values than Sigmoid, Tanh, Tanh take"),
        ({"hidden_size": 4}, r"(?s)rnn: W: has shape \[1, 12, 2\]; it must be \[1, 16, 2\].*rnn: R"),
    ],
)
def test_refused(attributes, message):
    inputs = standard.draw("LSTM", {})
    model = standard.model("LSTM", {}, inputs)
    node = standard.node("LSTM", {"hidden_size": 3} | attributes, inputs)
    model.graph.node[0].CopyFrom(node)
    with pytest.raises(UnrollError, match=message):
        unroll_model(model)


def test_all_problems_at_once():
    model, _ = two_layers()
    for node in model.graph.node:
        if node.op_type == "GRU":
            node.attribute.append(onnx.helper.make_attribute("direction", "up"))
    with pytest.raises(UnrollError) as caught:
        unroll_model(model)
    assert [problem.place for problem in caught.value.problems] == ["first", "second"]


def test_other_refusals():
    inputs = standard.draw("RNN", {})
    with pytest.raises(UnrollError, match="uses version 12 of the ONNX operators; convert it"):
        unroll_model(standard.model("RNN", {}, inputs, opset=12))
    with pytest.raises(UnrollError, match=r"got onnx.*GraphProto; give an onnx\.ModelProto"):
        unroll(standard.model("RNN", {}, inputs).graph)
    with pytest.raises(UnrollError, match=r"args.*leave args out"):
        unroll(standard.model("RNN", {}, inputs), (1,))


def test_broken_files(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UnrollError, match=r"cannot be read \(No such file"):
        unroll(path)
    whole = standard.model("LSTM", {}, standard.draw("LSTM", {})).SerializeToString()
    for broken in (b"", b"no model at all", whole[: len(whole) // 2], whole[:-3], whole[20:]):
        path.write_bytes(broken)
        with pytest.raises(UnrollError, match="is not an ONNX file"):
            unroll(path)


MUTANTS = {
    "input and forget gates swapped": lambda patch: patch.setitem(
        reader.GATES, "LSTM", ("forget", "output", "input", "cell")
    ),
    "update and reset gates swapped": lambda patch: patch.setitem(reader.GATES, "GRU", ("reset", "update", "new")),
    "reset after the product": lambda patch: patch.setitem(cells.ONNX_CELLS, "GRU_RESETTING_FIRST", cells.CELLS["GRU"]),
    "peepholes of the last c for the output gate": lambda patch: patch.setattr(
        cells, "_peek", lambda gate, c, weight: gate
    ),
    "padding that steps on": lambda patch: patch.setattr(reader.StandardCall, "lengths", None),
    "no clip": lambda patch: patch.setattr(cells.torch, "clamp", lambda x, low, high: x),
    "forward for reverse": lambda patch: patch.setattr(reader.Recurrence, "directions", ("", "")),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch):
    """The comparison sees each of these mistakes in one of these models."""
    attributes = {"direction": "bidirectional", "clip": 0.5}
    optional = ("B", "sequence_lens", "initial_h", "initial_c", "P")
    drawn = {k: standard.draw(k, attributes, optional=optional[: 5 if k == "LSTM" else 3]) for k in ("LSTM", "GRU")}
    models = {kind: standard.model(kind, attributes, inputs) for kind, inputs in drawn.items()}
    MUTANTS[mutant](monkeypatch)
    caught = 0
    for kind, inputs in drawn.items():
        try:
            assert_close(run_reference(unroll_model(models[kind]), inputs), standard.evaluate(kind, attributes, inputs))
        except AssertionError:
            caught += 1
    assert caught
