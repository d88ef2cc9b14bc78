"""The pass on ONNX models: the standard's own tests, every attribute, every place a node can be in."""

from __future__ import annotations

import importlib
import warnings

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_scan

from tests import onnx_standard as standard
from unroll.onnx.models import unroll_model

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
    return ReferenceEvaluator(model, new_ops=[Scan]).run(None, {name: v for name, v in inputs.items() if name in names})


def run_ort(model, inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
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
            room = sum(name in takers for name in names)
            values = draw(st.lists(st.sampled_from((0.125, 0.25, 0.5)), max_size=room))
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


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    nodes(),
    st.sets(st.sampled_from(("steps", "batch"))),
    st.booleans(),
    st.sampled_from((13, 17, 18, 22)),
    st.sampled_from(("merged", "paired", "split")),
)
def test_every_attribute(drawn, dynamic, weights_known, opset, gates):
    from unroll import Plan

    kind, attributes, optional, sizes = drawn
    opset = max(opset, 14 if attributes["layout"] else 0)
    inputs = standard.draw(kind, attributes, optional=optional, **sizes)
    known = ("W", "R", "B", "P") if weights_known else ()
    model = standard.model(kind, attributes, inputs, known=known, dynamic=tuple(dynamic), opset=opset)
    result = unrolled(model, plan=Plan(gates=gates))
    assert ("Scan" in operators(result)) == ("steps" in dynamic)
    assert result.opset_import[0].version == opset
    assert_close(run_reference(result, inputs), standard.evaluate(kind, attributes, inputs))
