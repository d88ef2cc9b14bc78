"""The forms of ONNX files for runtimes: other operators for the same results."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from tests.checks import problems
from tests.onnx import standard
from tests.onnx.test_models import DIRECTIONS, KINDS, assert_close, run_ort, run_reference, unrolled
from unroll import Plan, export_onnx, unroll
from unroll.core.forms import FORMS
from unroll.core.plan import PRESETS

OPEN = ("steps", "batch")


def nodes(graph):
    """All nodes of a graph and of those in it."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


def count(model):
    return Counter(node.op_type for node in nodes(model.graph))


@pytest.mark.parametrize("runtime", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_results_are_the_same(runtime, kind, direction):
    attributes, optional = {"direction": direction}, ("B", "initial_h", "sequence_lens")
    inputs = standard.draw(kind, attributes, optional=optional, steps=9)
    expected = standard.evaluate(kind, attributes, inputs)
    for dynamic, plan in (((), {}), ((), {"time": 4}), (("batch",), {}), (OPEN, {"time": 4}), (OPEN, {"time": 1})):
        model = standard.model(kind, attributes, inputs, dynamic=dynamic)
        result = unrolled(model, plan=Plan(runtime=runtime, **plan))
        for run in (run_ort, run_reference):
            assert_close(run(result, inputs), expected)
        if dynamic == OPEN:
            other = inputs | {"X": inputs["X"][:5], "sequence_lens": np.minimum(inputs["sequence_lens"], 5)}
            assert_close(run_ort(result, other), standard.evaluate(kind, attributes, other))


@pytest.mark.parametrize("plan", ["products=linear", "gates=split,products=sums,directions=stacked", "gates=paired"])
@pytest.mark.parametrize("runtime", FORMS)
def test_forms_go_with_every_plan(plan, runtime):
    attributes = {"direction": "bidirectional"}
    inputs = standard.draw("GRU", attributes, optional=("B",), steps=17)
    model = standard.model("GRU", attributes, inputs, dynamic=("batch",))
    result = unrolled(model, plan=f"{plan},runtime={runtime}" if runtime else plan)
    assert_close(run_ort(result, inputs), standard.evaluate("GRU", attributes, inputs))


def test_weights_that_are_computed_have_a_width_too():
    inputs = standard.draw("GRU", {}, optional=("B",), steps=9)
    model = standard.model("GRU", {}, inputs, dynamic=("batch",), known=())
    result = unrolled(model, plan="webgpu")
    assert max(len(node.output) for node in result.graph.node if node.op_type == "Split") <= 7
    assert_close(run_ort(result, inputs), standard.evaluate("GRU", {}, inputs))


@pytest.mark.parametrize("steps", [7, 8, 50, 60])
@pytest.mark.parametrize("plan", ["", "directions=stacked,", "gates=split,"])
def test_seven_values_for_a_shader(steps, plan):
    attributes = {"direction": "bidirectional"}
    inputs = standard.draw("LSTM", attributes, optional=("B",), steps=steps)
    result = unrolled(standard.model("LSTM", attributes, inputs, dynamic=("batch",)), plan=f"{plan}runtime=webgpu")
    for node in result.graph.node:
        assert len(node.output) <= 7 and (node.op_type != "Concat" or len(node.input) <= 7)
    assert_close(run_ort(result, inputs), standard.evaluate("LSTM", attributes, inputs))


def test_the_operators_of_each_form():
    inputs = standard.draw("LSTM", {}, optional=("B",), steps=9)
    model = standard.model("LSTM", {}, inputs, dynamic=("batch",))
    assert count(unrolled(model, plan="default"))["Gemm"] == 9
    found = count(unrolled(model, plan="npu"))
    assert (found["Gemm"], found["MatMul"]) == (0, 4 * 9)
    found = count(unrolled(model, plan="products=linear"))
    assert (found["Gemm"], found["MatMul"]) == (0, 9)
    found = count(unrolled(model, plan="webgpu"))
    assert (found["Gather"], found["Concat"]) == (9, 3)
    loops = {runtime: count(unrolled(model, plan=Plan(time=3, runtime=runtime))) for runtime in FORMS}
    assert {runtime: (found["Scan"], found["Loop"]) for runtime, found in loops.items()} == {
        runtime: (form.loop == "Scan", form.loop == "Loop") for runtime, form in FORMS.items()
    }


@pytest.mark.parametrize("plan", [Plan(time=4), Plan(time=4, runtime="mnn"), Plan(products="sums"), Plan(time=1)])
def test_sizes_that_are_known_are_not_computed(plan):
    inputs = standard.draw("LSTM", {}, optional=("B", "sequence_lens"), steps=9)
    found = count(unrolled(standard.model("LSTM", {}, inputs), plan=plan))
    assert not found.keys() & {"Shape", "Div"}
    assert found["Expand"] == 2 * (plan.time == 4)  # the zeros of x and of the mask that fill the last block


def test_sums_keep_their_axis_until_it_is_squeezed():
    inputs = standard.draw("LSTM", {}, steps=4)
    result = unrolled(standard.model("LSTM", {}, inputs), plan="products=sums")
    sums = [node for node in result.graph.node if node.op_type == "ReduceSum"]
    assert len(sums) == 3 == count(result)["Squeeze"]
    assert all(onnx.helper.get_node_attr_value(node, "keepdims") == 1 for node in sums)


def test_stacked_directions_are_flipped_by_indices():
    attributes = {"direction": "bidirectional"}
    result = unrolled(standard.model("LSTM", attributes, standard.draw("LSTM", attributes)), plan="directions=stacked")
    assert not count(result)["Slice"]


def test_other_runtimes_are_refused():
    (problem,) = problems(lambda: Plan(runtime="abacus"))
    assert problem.startswith("Plan(runtime=...): got 'abacus'")
    assert Plan.of("runtime=tract").runtime == "tract"
    assert PRESETS["npu"] == Plan(gates="split", runtime="npu")


def test_a_frozen_layer_takes_the_form_that_is_asked_for(tmp_path):
    layer, x = torch.nn.GRU(3, 5).eval(), torch.randn(9, 2, 3)
    frozen = unroll(torch.nn.Sequential(layer).eval(), plan="gates=paired", freeze=True)
    export = export_onnx(frozen, x, tmp_path / "m.onnx", plan="gates=paired,runtime=webgpu")
    assert export.operators["Gather"] == 2 * 9
    refused = problems(export_onnx, frozen, x, tmp_path / "n.onnx", plan="runtime=webgpu")
    assert "was frozen with 'gates=paired'" in refused[0]


@pytest.mark.parametrize("runtime", ["webgpu", "tract"])
@pytest.mark.parametrize("time", [2, 4, 9])
def test_rows_of_an_open_size_are_not_split(runtime, time):
    inputs = standard.draw("LSTM", {}, optional=("B",), steps=9)
    result = unrolled(standard.model("LSTM", {}, inputs, dynamic=OPEN), plan=f"time={time},runtime={runtime}")
    splits = [node for node in nodes(result.graph) if node.op_type == "Split"]
    assert splits and all(a.i for node in splits for a in node.attribute if a.name == "axis")
    assert_close(run_ort(result, inputs), standard.evaluate("LSTM", {}, inputs))
