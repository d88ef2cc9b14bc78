"""What targets offer, held against what every plan and frontend writes."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import unroll
from tests.cases import PLANS, Case
from unroll import UnrollError, check
from unroll.core import plan as plans
from unroll.targets import tables
from unroll.targets.uses import RECURRENT

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
from tests.onnx import standard  # noqa: E402

CASES = [
    Case("LSTM", num_layers=2, bidirectional=True, batch_first=True, state=True),
    Case("GRU", num_layers=2, bidirectional=True),
    Case("RNN", num_layers=2, bidirectional=True),
    Case("LSTM", num_layers=2, proj_size=2),
]
CHOSEN_PLANS = [*PLANS, *getattr(plans, "PRESETS", {})]

# What plans are known to use that WebNN and XNNPACK do not offer; docs/contracts.md tells why. Other targets offer all.
KNOWN = {
    "webnn": {("Gemm", "has 2 dimensions in C, offered are 0 or 1")},
    "xnnpack": {
        ("aten.addmm.default", "computes self, which must be constant"),
        ("aten.addmm.default", "computes mat2, which must be constant"),
        ("aten.mm.default", "computes mat2, which must be constant"),
        ("aten.split_with_sizes.default", "is not in the table"),
        ("aten.sum.dim_IntList", "is not in the table"),
        ("aten.unsqueeze.default", "is along dimension -2, offered is the last"),
        ("aten.unsqueeze.default", "is along dimension 1, offered is the last"),
        ("aten.split.Tensor", "becomes aten.split_with_sizes.default, which is not in the table"),
        ("aten.unbind.int", "becomes aten.squeeze.dims, which is not in the table"),
        ("aten.flip.default", "is not in the table"),
        ("aten.select.int", "is not in the table"),
    },
}


def documented():
    """Which operators the documentation says are not offered, by layer, plan and target."""
    text = (Path(__file__).parents[2] / "docs" / "contracts.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    lists = {}
    for row in rows:
        if row[0] in ("LSTM", "GRU"):
            for target, cell in zip(("webnn", "xnnpack"), row[5:], strict=True):
                lists[(*row[:5], target)] = set() if cell == "none" else set(cell.split(", "))
    return lists


def as_documented(case, plan, model, target):
    """Hold a model's findings against the documentation's table, if the plan is in it."""
    if isinstance(plan, str) or plan.block or not case.bidirectional:
        return
    key = (case.kind, plan.gates, plan.directions, plan.layers, plan.products, target)
    names = {operator.split(".")[1] if "." in operator else operator for operator in operators(model, target)}
    assert documented().get(key, names) == names


@cache
def exported(case):
    return torch.export.export(case.model().eval(), case.tensors())


def found(model, target):
    """Operators and findings."""
    return {row[1:3] for row in check(model, target=target).rows}


def operators(model, target):
    return {row.operator for row in check(model, target=target).rows}


def onnx_model(*nodes, inputs, opset=20, initializers=(), outputs=None, dtype=onnx.TensorProto.FLOAT):
    """A model of nodes given as `(operator, inputs, outputs, attributes)`, with the last output for its result."""
    made = [onnx.helper.make_node(kind, i, o, name=f"the_{kind}", **attributes) for kind, i, o, attributes in nodes]
    values = [onnx.helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()]
    results = [onnx.helper.make_empty_tensor_value_info(name) for name in outputs or nodes[-1][2]]
    graph = onnx.helper.make_graph(made, "g", values, results, list(initializers))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])


def integers(name, *values):
    return onnx.numpy_helper.from_array(np.array(values, np.int64), name)


def program(function, *args, **options):
    class Model(nn.Module):
        def forward(self, *args):
            return function(*args)

    return torch.export.export(Model(), args, **options)


# What every plan and frontend writes


@pytest.mark.parametrize("plan", CHOSEN_PLANS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_of_every_plan(case, plan):
    given = exported(case)
    rewritten = unroll.unroll(given, plan=plan)
    for target in ("torch_tensorrt", "npu"):
        assert operators(given, target)
        verdict = check(rewritten, target=target)
        assert verdict.check() is verdict and verdict.nodes > 10
    assert found(rewritten, "xnnpack") <= KNOWN["xnnpack"]
    as_documented(case, plan, rewritten, "xnnpack")


@pytest.mark.parametrize("plan", CHOSEN_PLANS, ids=str)
def test_graphs_of_every_plan(plan):
    graph = unroll.unroll(exported(CASES[1]).module(), plan=plan)
    assert check(graph, target="torch_tensorrt").check() and check(graph, target="npu").check()


@pytest.mark.parametrize("plan", CHOSEN_PLANS, ids=str)
@pytest.mark.parametrize("case", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.heavy)], ids=str)
def test_onnx_exports_of_every_plan(case, plan, tmp_path):
    unroll.export_onnx(exported(case), None, tmp_path / "m.onnx", plan=plan, check=False)
    for target in ("tensorrt", "npu"):
        assert check(tmp_path / "m.onnx", target=target).check().nodes > 10
    assert found(tmp_path / "m.onnx", "webnn") <= KNOWN["webnn"]
    as_documented(case, plan, tmp_path / "m.onnx", "webnn")


@pytest.mark.parametrize("plan", CHOSEN_PLANS, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_onnx_models_of_every_plan(kind, plan):
    model = standard.model(kind, {}, standard.draw(kind, {}, dtype=np.float32))
    assert operators(model, "npu") == {kind}
    rewritten = unroll.unroll(model, plan=plan)
    for target in ("tensorrt", "npu"):
        assert check(rewritten, target=target).check()
    assert found(rewritten, "webnn") <= KNOWN["webnn"]


@pytest.mark.parametrize("preset", getattr(plans, "PRESETS", {}))
def test_presets_keep_to_the_target_of_their_name(preset):
    targets = {"tensorrt": ("torch_tensorrt",), "npu": ("npu",)}.get(preset, ())
    for target in targets:
        assert check(unroll.unroll(exported(CASES[0]), plan=preset), target=target).check()


def test_a_loop_over_time(tmp_path):
    """TensorRT runs a Scan and open lengths; fixed graphs do not."""
    case = Case("GRU", num_layers=2)
    shapes = {"input": {0: Dim("T", min=2)}}
    unroll.export_onnx(case.model().eval(), case.tensors(), tmp_path / "m.onnx", dynamic_shapes=shapes, check=False)
    assert check(tmp_path / "m.onnx", target="tensorrt").ok
    rows = check(tmp_path / "m.onnx", target="npu").rows
    assert {row[1:3] for row in rows} == {
        ("input", "leaves sizes open, [?, 3, 6]"),
        ("Scan", "is control flow"),
    }
    assert any(row.place.startswith("rnn.l1.") for row in rows)


def test_open_sizes_of_a_program():
    case = Case("LSTM")
    given = torch.export.export(case.model().eval(), case.tensors(), dynamic_shapes={"input": {1: Dim("B", min=2)}})
    rewritten = unroll.unroll(given)
    assert check(rewritten, target="torch_tensorrt").ok
    assert found(rewritten, "npu") == {("input", "leaves sizes open, [4, ?, 6]")}


def test_dropout_between_layers():
    """Gone in evaluation; in training it becomes operators that Torch-TensorRT does not convert."""
    case = Case("LSTM", num_layers=2, dropout=0.5)
    assert check(unroll.unroll(exported(case)), target="torch_tensorrt").ok
    training = torch.export.export(case.model().train(), case.tensors())
    assert found(unroll.unroll(training), "torch_tensorrt") == {
        ("aten.dropout.default", f"becomes {finding}")
        for finding in (
            "aten.empty.memory_format, which has layout, which is not offered",
            "aten.empty.memory_format, which has device, which is not offered",
            "aten.bernoulli.p, which is not in the table",
        )
    }


# What is found


def test_an_operator_that_is_not_offered():
    model = onnx_model(("Det", ["x"], ["y"], {}), inputs={"x": [3, 3]})
    (row,) = check(model, target="tensorrt").rows
    assert row[:3] == ("the_Det", "Det", "is not offered") and row.fix
    assert found(model, "webnn") == {("Det", "is not in the table")}
    assert check(model, target="npu").ok
    (row,) = check(program(torch.det, torch.eye(3)), target="torch_tensorrt").rows
    assert (
        row.operator == "aten.det.default"
        and row.finding == "becomes aten._linalg_det.default, which is not in the table"
    )


def test_a_type_that_is_not_offered():
    model = standard.model("LSTM", {}, standard.draw("LSTM", {}, dtype=np.float64))
    findings = [row.finding for row in check(unroll.unroll(model), target="tensorrt").rows]
    assert findings and all("is for float64" in text and "float32, float16, bfloat16" in text for text in findings)
    assert found(program(lambda x: x + 1, torch.ones(3).double()), "torch_tensorrt")
    assert found(program(lambda x: x + 1, torch.ones(3, dtype=torch.bfloat16)), "xnnpack")
    mixed = program(lambda x, y: x + y, torch.ones(3), torch.ones(3).half())
    assert ("aten.add.Tensor", "mixes float16 and float32") in found(mixed, "xnnpack")
    narrower = program(lambda x: x.to(torch.float16), torch.ones(3))
    assert any("changes the type" in text for _, text in found(narrower, "xnnpack"))


def test_an_unknown_type():
    model = onnx_model(("Odd", ["x"], ["y"], {"domain": "mine"}), ("Tanh", ["y"], ["z"], {}), inputs={"x": [3]})
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    assert found(model, "tensorrt") == {
        ("mine::Odd", "is not in the table"),
        ("Tanh", "is of unknown type (input)"),
    }


def passed_on(*kinds):
    """A model that does nothing with its inputs."""
    values = [onnx.helper.make_value_info(f"x{k}", kind) for k, kind in enumerate(kinds)]
    graph = onnx.helper.make_graph([], "g", values, values)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


@pytest.mark.parametrize("target", ["tensorrt", "webnn", "npu"])
def test_types_that_no_operator_reads(target):
    def tensor(dtype):
        return onnx.helper.make_tensor_type_proto(getattr(onnx.TensorProto, dtype), [3])

    wrong = [tensor("DOUBLE"), tensor("STRING"), tensor("COMPLEX64")]
    wrong += [
        onnx.helper.make_sequence_type_proto(tensor("FLOAT")),
        onnx.helper.make_optional_type_proto(tensor("INT8")),
    ]
    rows = check(passed_on(*wrong, tensor("FLOAT"), tensor("INT64")), target=target).rows
    assert [row[:2] for row in rows] == [(f"x{k}", "input") for k in range(5)]
    names = ("float64", "string", "complex64", "sequence of float32", "optional of int8")
    for row, name in zip(rows, names, strict=True):
        assert row.finding.startswith(f"is for {name}, offered are float32, float16, ")
    held = onnx_model(
        ("Tanh", ["x"], ["y"], {}), inputs={"x": [3]}, initializers=[onnx.numpy_helper.from_array(np.ones(2), "w")]
    )
    assert [row[:2] for row in check(held, target=target).rows] == [("w", "constant")]


def test_numbers_alone_for_fixed_graphs():
    """Of results too, as no table tells of their types."""
    strings = [onnx.numpy_helper.from_array(np.array(["a", "b"], object), "s")]
    labels = onnx_model(
        ("Gather", ["s", "x"], ["y"], {}), inputs={"x": [1]}, initializers=strings, dtype=onnx.TensorProto.INT64
    )
    assert [row[:2] for row in check(labels, target="npu").rows] == [("s", "constant"), ("the_Gather", "Gather")]
    wider = program(lambda x: torch.add(x, 1.0).double().sqrt().float(), torch.ones(3))
    findings = {operator for operator, text in found(wider, "npu") if text.startswith("is for float64, offered are")}
    assert findings == {"aten.to.dtype", "aten.sqrt.default"}


def test_operators_of_unknown_domains():
    model = onnx_model(("LSTM", ["x"], ["y"], {"domain": "mine"}), inputs={"x": [3]})
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    model.graph.output[0].type.CopyFrom(model.graph.input[0].type)
    assert found(model, "npu") == {("mine::LSTM", "is of mine, which is not known")}
    assert found(model, "webnn") == {("mine::LSTM", "is not in the table")}


def test_booleans_and_ranks():
    model = onnx_model(("Greater", ["x", "y"], ["z"], {}), inputs={"x": [3], "y": [1]})
    assert found(model, "npu") == {("Greater", "is boolean")}
    deep = onnx_model(("Tanh", ["x"], ["y"], {}), inputs={"x": [1, 2, 3, 4, 5]})
    assert found(deep, "npu") == {(kind, "has 5 dimensions, more than 4") for kind in ("input", "Tanh")}
    assert check(deep, target="tensorrt").ok
    deeper = onnx_model(("Tanh", ["x"], ["y"], {}), inputs={"x": [1] * 9})
    assert found(deeper, "tensorrt") == {(kind, "has 9 dimensions, more than 8") for kind in ("input", "Tanh")}
    masked = program(lambda x: x.masked_fill(x > 0, 0.0), torch.ones(1, 2, 3, 4, 5))
    assert found(masked, "npu") == {
        ("input", "has 5 dimensions, more than 4"),
        ("aten.gt.Scalar", "has 5 dimensions, more than 4"),
        ("aten.gt.Scalar", "is boolean"),
        ("aten.masked_fill.Scalar", "has 5 dimensions, more than 4"),
    }


def test_control_flow_and_what_is_in_it():
    body = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["x"], ["y"], name="inner")],
        "b",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [])],
    )
    flag = onnx.numpy_helper.from_array(np.array(True), "flag")
    branches = {"then_branch": body, "else_branch": body}
    model = onnx_model(("If", ["flag"], ["z"], branches), inputs={"x": [3, 3]}, initializers=[flag])
    assert [row.place for row in check(model, target="tensorrt").rows] == ["inner", "inner"]
    assert ("If", "is control flow") in found(model, "npu")

    def chosen(x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: torch.linalg.det(x) + x, (x,))

    rows = check(program(chosen, torch.ones(3, 3)), target="torch_tensorrt").rows
    assert {row.operator for row in rows} == {"cond", "aten.linalg_det.default"}


def test_what_must_be_constant():
    reduced = ("ReduceSum", ["x", "axes"], ["y"], {})
    fixed = onnx_model(reduced, inputs={"x": [3, 3]}, initializers=[integers("axes", 0)])
    assert check(fixed, target="tensorrt").ok
    shape = ("Shape", ["x"], ["s"], {})
    axes = ("Slice", ["s", "one", "two"], ["axes"], {})
    bounds = [integers("one", 0), integers("two", 1)]
    computed = onnx_model(shape, axes, reduced, inputs={"x": [3, 3]}, initializers=bounds)
    assert found(computed, "tensorrt") == {("ReduceSum", "computes axes, which must be constant")}
    folded = onnx_model(("Neg", ["one"], ["axes"], {}), reduced, inputs={"x": [3, 3]}, initializers=bounds[:1])
    assert check(folded, target="tensorrt").ok
    layer = nn.Linear(3, 4)
    assert check(torch.export.export(layer, (torch.ones(2, 3),)), target="xnnpack").ok
    given = program(lambda x, w, b: torch.addmm(b, x, w), torch.ones(2, 3), torch.ones(3, 4), torch.ones(4))
    assert ("aten.addmm.default", "computes mat2, which must be constant") in found(given, "xnnpack")


def test_the_last_dimension_of_a_number():
    scalar = program(lambda x: torch.softmax(x * 2, 0), torch.ones(()))
    assert not any("is along dimension" in finding for _, finding in found(scalar, "xnnpack"))
    rows = program(lambda x: torch.softmax(x * 2, 0), torch.ones(2, 3))
    assert any("is along dimension 0" in finding for _, finding in found(rows, "xnnpack"))


def test_attributes_and_results():
    pooled = {"kernel_shape": [2, 2], "dilations": [2, 1]}
    model = onnx_model(("MaxPool", ["x"], ["y", "i"], pooled), inputs={"x": [1, 3, 9, 9]})
    assert found(model, "tensorrt") == {
        ("MaxPool", "has dilations=[2, 1], offered is 1"),
        ("MaxPool", "uses result 2, offered are 1"),
    }
    unused = onnx_model(
        ("MaxPool", ["x"], ["y", "i"], pooled | {"dilations": [1, 1]}), inputs={"x": [1, 3, 9, 9]}, outputs=["y"]
    )
    assert check(unused, target="tensorrt").ok
    weights = torch.ones(2, 3, 9, 9)
    assert check(program(lambda x: torch.max_pool2d(x, 2), weights), target="torch_tensorrt").ok
    assert found(program(lambda x: torch.max_pool2d(x, 2, dilation=2), weights), "torch_tensorrt") == {
        ("aten.max_pool2d.default", "has dilation=[2, 2], offered is 1")
    }
    assert found(program(lambda x: x.max(1), weights), "torch_tensorrt") == {
        ("aten.max.dim", "uses result 2, offered are 1")
    }
    assert check(program(lambda x: x.max(1).values, weights), target="torch_tensorrt").ok
    pooled = program(nn.AvgPool2d(2), weights)
    assert found(pooled, "xnnpack") == {("aten.avg_pool2d.default", "has count_include_pad=true, offered is false")}
    assert check(program(nn.AvgPool2d(2, count_include_pad=False), weights), target="xnnpack").ok
    assert found(program(lambda x: x.softmax(0), weights), "xnnpack") == {
        ("aten.softmax.int", "becomes aten._softmax.default, which is along dimension 0, offered is the last")
    }
    mode = onnx_model(
        ("ScatterND", ["x", "i", "u"], ["y"], {"reduction": "add"}),
        inputs={"x": [3], "u": [1]},
        initializers=[onnx.numpy_helper.from_array(np.array([[0]]), "i")],
    )
    assert found(mode, "tensorrt") == {("ScatterND", "has reduction=add, offered is none")}


def test_open_sizes_where_an_operator_needs_fixed_ones():
    given = program(lambda x: x[:, 1:], torch.ones(3, 4), dynamic_shapes=(({0: Dim("B", min=2)},),))
    assert any("leaves sizes open" in text for _, text in found(given, "xnnpack"))
    flat = program(lambda x: x.flatten(), torch.ones(3, 4), dynamic_shapes=(({0: Dim("B", min=2)},),))
    assert any("computes size" in text for _, text in found(flat, "xnnpack"))
    assert found(program(torch.log1p, torch.ones(3), dynamic_shapes=(({0: Dim("B", min=2)},),)), "torch_tensorrt") == {
        ("aten.log1p.default", "leaves sizes open")
    }
    assert check(program(torch.log1p, torch.ones(3)), target="torch_tensorrt").ok
    # a size that no tensor among the operands has
    places = program(lambda x: x + torch.arange(x.shape[0]), torch.ones(3), dynamic_shapes=(({0: Dim("B", min=2)},),))
    assert ("aten.arange.default", "becomes aten.arange.start_step, which is not in the table") in found(
        places, "xnnpack"
    )


def test_versions_of_the_standard():
    model = onnx_model(("Tanh", ["x"], ["y"], {}), inputs={"x": [3]}, opset=8)
    (row,) = check(model, target="tensorrt").rows
    assert row[:3] == ("opset", "model", "is of version 8 of the standard, offered are 9 to 24")


def test_functions_are_looked_into():
    model = onnx_model(("Mine", ["x"], ["y"], {"domain": "mine"}), inputs={"x": [3, 3]})
    det = onnx.helper.make_node("Det", ["a"], ["b"])
    opsets = [onnx.helper.make_opsetid("", 20)]
    model.functions.append(onnx.helper.make_function("mine", "Mine", ["a"], ["b"], [det], opsets))
    model.opset_import.append(onnx.helper.make_opsetid("mine", 1))
    assert operators(model, "tensorrt") == {"Det"}


def test_decomposed_operators_count_as_what_they_become():
    x = torch.ones(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    given = torch.export.export(model, (x,))
    assert check(given, target="torch_tensorrt").ok
    verdict = check(given, target="xnnpack")
    assert verdict.ok and any("it must follow a convolution" in note for note in verdict.notes)
    assert check(make_fx(lambda x: x.tanh(), tracing_mode="fake")(x), target="xnnpack").ok


# How it is told


def test_the_verdict_in_every_form():
    model = onnx_model(*[("Det", ["x"], [f"y{k}"], {}) for k in range(5)], inputs={"x": [3, 3]}, outputs=["y0", "y4"])
    for k, node in enumerate(model.graph.node):
        node.name = f"det.{k}"
    verdict = check(model, target="tensorrt")
    assert not verdict and not verdict.ok
    assert str(verdict).splitlines() == [
        "tensorrt: 5 nodes, 5 findings",
        "  Det  is not offered: det.0, det.1, det.2 and 2 more",
    ]
    assert json.loads(json.dumps(verdict.as_dict()))["rows"][0]["place"] == "det.0"
    with pytest.raises(UnrollError) as caught:
        verdict.check()
    assert [p[:2] for p in caught.value.problems] == [("det.0, det.1, det.2 and 2 more", "Det is not offered")]
    fine = check(
        onnx_model(("TopK", ["x", "k"], ["v", "i"], {}), inputs={"x": [9]}, initializers=[integers("k", 3)]),
        target="tensorrt",
    )
    assert fine and fine.check() is fine
    assert str(fine) == "tensorrt: 1 nodes, all offered\n  not checked: TopK: K must be less than 3840"


def test_the_model_is_not_changed():
    model = ir.from_proto(standard.model("GRU", {}, standard.draw("GRU", {}, dtype=np.float32)))
    before = ir.to_proto(model).SerializeToString()
    check(model, target="tensorrt")
    assert ir.to_proto(model).SerializeToString() == before


WRONG = [
    (lambda: nn.LSTM(2, 3), "tensorrt", "got LSTM, a module that is not exported yet", "unroll.export_onnx"),
    (lambda: nn.LSTM(2, 3), "xnnpack", "got LSTM, a module that is not exported yet", "torch.export.export"),
    (lambda: nn.LSTM(2, 3), "npu", "a module that is not exported yet", "unroll.export_onnx"),
    (lambda: exported(CASES[1]), "webnn", "got ExportedProgram", "unroll.export_onnx"),
    (lambda: "model.onnx", "torch_tensorrt", "got an ONNX model", "torch.export.export"),
    (lambda: torch.jit.trace(nn.ReLU(), torch.ones(1)), "npu", "got a ScriptModule", "torch.export.export"),
    (lambda: 3, "npu", "got int", "give"),
    (lambda: "missing.onnx", "tensorrt", "cannot be read", "path"),
    (lambda: onnx.TensorProto(), "tensorrt", "TensorProto", "onnx.ModelProto"),
    (lambda: "model.onnx", "tensorflow", "is not known", "torch_tensorrt"),
    (lambda: torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), "npu", "is a call_module of 0", "torch.export"),
    (lambda: make_fx(torch.tanh)(torch.ones(2)), "xnnpack", None, None),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize(("model", "target", "finding", "fix"), WRONG)
def test_what_cannot_be_judged(model, target, finding, fix):
    if finding is None:
        assert check(model(), target=target).ok
        return
    with pytest.raises(UnrollError) as caught:
        check(model(), target=target)
    (problem,) = caught.value.problems
    assert finding in problem.finding and fix in problem.fix


def test_a_graph_without_metadata():
    graph = make_fx(torch.tanh)(torch.ones(2))
    for node in graph.graph.nodes:
        node.meta.pop("val", None)
    with pytest.raises(UnrollError, match="has no metadata of its value"):
        check(graph, target="npu")


# The tables themselves


@pytest.mark.parametrize("name", tables.NAMES)
def test_tables_are_consistent(name):
    table = tables.read_target(name)
    assert table.title and table.source and table.version and table.kind in ("onnx", "aten", "any")
    assert not table.operators.keys() & table.refused
    assert bool(table.operators) == (table.kind != "any")
    if table.operators and table.tensors:
        assert set(table.tensors) == {dtype for restriction in table.operators.values() for dtype in restriction.types}
    known = {"float32", "float16", "bfloat16", "bool", "float8e4m3fn", "float4e2m1", "float8_e4m3fn"}
    known |= {"float4_e2m1fn_x2", "qint8", "quint8", "qint32"}
    known |= {f"{sign}int{bits}" for sign in ("", "u") for bits in (4, 8, 16, 32, 64)}
    for restriction in table.operators.values():
        assert set(restriction.types) <= known
    files = [file.name for file in tables.files("unroll.targets").joinpath("facts").iterdir()]
    assert sorted(files) == [f"{name}.toml" for name in tables.NAMES]


@pytest.mark.parametrize(
    ("name", "offered", "refused"),
    [("tensorrt", 158, 42), ("torch_tensorrt", 238, 0), ("webnn", 117, 0), ("xnnpack", 52, 0)],
)
def test_sizes_of_tables(name, offered, refused):
    """As the documentation says."""
    table = tables.read_target(name)
    assert (len(table.operators), len(table.refused)) == (offered, refused)


HISTORIC = {"ImageScaler", "ParametricSoftplus", "ScaledTanh", "Scatter", "Upsample"}
"""Operators of the ONNX standard, or before it, that its newest version does not have"""


@pytest.mark.parametrize("name", ["tensorrt", "webnn"])
def test_onnx_tables_name_what_the_standard_has(name):
    for operator, restriction in tables.read_target(name).operators.items():
        if "::" in operator or operator in (*HISTORIC, "SimplifiedLayerNormalization"):
            continue
        schema = onnx.defs.get_schema(operator)
        inputs = {value.name for value in schema.inputs}
        assert {*restriction.rank, *restriction.constant} <= inputs, operator
        assert set(restriction.attributes) <= set(schema.attributes), operator
        outputs = {value.name for value in schema.outputs}
        assert set(restriction.absent) <= inputs | set(schema.attributes) | outputs, operator


@pytest.mark.parametrize("name", ["torch_tensorrt", "xnnpack"])
def test_aten_tables_name_what_pytorch_has(name):
    table = tables.read_target(name)
    missing = set()
    for operator, restriction in table.operators.items():
        namespace, _, rest = operator.partition(".")
        try:
            found = torch.ops.aten if namespace == "aten" else torch.ops.prims if namespace == "prims" else None
            for part in rest.split(".") if found is not None else ():
                found = getattr(found, part)
        except AttributeError:
            missing.add(operator)
            continue
        if found is not None:
            arguments = {argument.name for argument in found._schema.arguments}
            named = {*restriction.rank, *restriction.attributes, *restriction.absent, *restriction.constant}
            assert named | {*restriction.known, *restriction.last} <= arguments, operator
    # of other libraries, or of another version of PyTorch
    allowed = {
        "aten._reshape_copy.default",
        "aten._clone_dim_order.default",
        "aten._to_dim_order_copy.default",
        "prims.sum.default",
    }
    assert missing <= allowed
    assert not [name for name in table.operators if name.startswith(RECURRENT)]
