"""Engines that TensorRT for RTX builds of what every frontend and plan writes, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import unroll
from tests.cases import CHOSEN, PACKED, PLANS, Case
from tests.onnx import standard
from unroll import Plan, UnrollError, check
from unroll.targets.building import build_engine

onnx = pytest.importorskip("onnx")
trt = pytest.importorskip("tensorrt_rtx_bindings")
pytestmark = pytest.mark.runtimes

ROOT = Path(__file__).parents[2]
TWO = Case("LSTM", num_layers=2, bidirectional=True)
BLOCKS = Plan(time=3)
KINDS = ("LSTM", "GRU", "RNN")


def built(model, *, loops=0, **options):
    """Build an engine of what the table takes whole, in a network that has as many loops as were asked for."""
    if not isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        verdict = check(model, target="tensorrt_rtx", build=True).check()
    else:
        path = options.pop("path")
        unroll.export_onnx(model, options.pop("args", None), path, check=False, **options)
        verdict = check(path, target="tensorrt_rtx", build=True).check()
    assert verdict.engine.size == len(verdict.engine.data) > 10_000
    assert verdict.engine.loops == loops
    return verdict.engine


def passes(case):
    return case.num_layers * (1 + case.bidirectional)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_layers(case, path):
    engine = built(case.model().eval(), path=path, args=case.tensors())
    products = engine.layers["MATRIX_MULTIPLY"] + engine.layers["ELEMENTWISE"]
    assert products >= (1 if case.is_cell else passes(case) * case.steps)


@pytest.mark.parametrize("case", [case for case in CHOSEN if case.num_layers == 2 and case.bidirectional], ids=str)
def test_layers_in_blocks(case, path):
    built(case.model().eval(), path=path, args=case.tensors(), plan=BLOCKS, loops=passes(case))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_plans(plan, path):
    model, args = TWO.model().eval(), TWO.tensors()
    if plan.products == "sums":  # of sums of these sizes some builds do not end, see docs/tensorrt.md
        model.rnn = nn.LSTM(args[0].shape[-1], 16, num_layers=2, bidirectional=True).eval()
    engine = built(model, path=path, args=args, plan=plan)
    assert any(name.startswith("rnn.l1.") for name in engine.names)


def test_a_build_that_does_not_end_in_time(path):
    unroll.export_onnx(TWO.model().eval(), TWO.tensors(), path, check=False)
    with pytest.raises(UnrollError, match=r"model: is not built by TensorRT for RTX within 0.01 s; write fewer"):
        build_engine(path, limit=0.01)


def test_a_builder_that_ends_without_an_answer(path, monkeypatch):
    """As it does by a fault of the library; here it is another program."""
    unroll.export_onnx(TWO.model().eval(), TWO.tensors(), path, check=False)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UnrollError, match=r"^model: ends the process in which TensorRT for RTX builds \(.*exit code 1"):
        build_engine(path)


@pytest.mark.parametrize("plan", [Plan(), Plan(directions="stacked"), BLOCKS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_types(kind, dtype, plan, path):
    case = Case(kind, bidirectional=True)
    built(case.model(dtype).eval(), path=path, args=case.tensors(dtype), plan=plan, loops=2 * bool(plan.block))
    (tensor,) = onnx.load(path).graph.input
    assert tensor.type.tensor_type.elem_type == {torch.float16: 10, torch.bfloat16: 16}[dtype]


@pytest.mark.parametrize("plan", [Plan(), BLOCKS], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_batches_with_lengths(case, plan, path):
    built(case.model().eval(), path=path, args=case.tensors(), plan=plan, loops=passes(case) * bool(plan.block))


@pytest.mark.parametrize("plan", [Plan(), BLOCKS], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_open_batch(kind, plan, path):
    case = Case(kind, num_layers=2)
    shapes = {"input": {1: "batch"}}
    loops = 2 * bool(plan.block)
    built(case.model().eval(), path=path, args=case.tensors(), dynamic_shapes=shapes, plan=plan, loops=loops)


@pytest.mark.parametrize("kind", KINDS)
def test_an_open_length(kind, path):
    case = Case(kind, bidirectional=True)
    shapes = {"input": {0: "length", 1: "batch"}}
    built(case.model().eval(), path=path, args=case.tensors(), dynamic_shapes=shapes, plan=BLOCKS, loops=2)
    engine = build_engine(path, shapes={"input": [(2, 1, 6), (50, 2, 6), (400, 8, 6)]})
    assert engine.loops == 2


def test_a_packed_open_batch(path):
    case = Case("GRU", form="packed", num_layers=2)
    shapes = {"input": {1: "batch"}, "rest": ({0: "batch"},)}
    built(case.model().eval(), path=path, args=case.tensors(), dynamic_shapes=shapes, plan=BLOCKS, loops=2)


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_states(kind, path):
    case = Case(kind, num_layers=2)
    x = torch.zeros(case.steps, 1, 6)
    built(unroll.streaming(case.model().eval(), (x,)), path=path, args=(x,))
    names = [value.name for value in onnx.load(path).graph.input]
    assert len(names) == 1 + (2 if kind == "LSTM" else 1) and "rnn.h" in names


@pytest.mark.parametrize("plan", [Plan(gates="paired"), BLOCKS], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_files_with_recurrent_operators_of_others(kind, plan):
    attributes = {"direction": "bidirectional"}
    given = standard.draw(kind, attributes, optional=("B", "initial_h"), dtype=np.float32)
    model = standard.model(kind, attributes, given)
    loops = 2 * bool(plan.block)
    built(unroll.unroll(model, plan=plan), loops=loops)
    assert check(model, target="tensorrt_rtx", build=True).check().engine.loops > 0  # the library's own


def test_networks_are_read_from_the_file(path):
    case = Case("LSTM", steps=7)
    engine = built(case.model().eval(), path=path, args=case.tensors(), plan="default")
    steps = {name.split(".")[2] for name in engine.names if name.startswith("rnn.l0.t")}
    assert steps == {f"t{t}" for t in range(7)}
    assert engine.layers["MATRIX_MULTIPLY"] == 1 + 6  # of the input, and of all states but the first, which is zero
    assert engine.as_dict()["layers"] == len(engine.names)


def test_longer_than_an_engine_of_explicit_steps_is_worth(path):
    """In blocks, an engine is as large for 1,000 steps as for 16."""
    sizes = []
    for steps in (16, 1000):
        model = nn.LSTM(8, 16).eval()
        built(model, path=path, args=torch.zeros(steps, 1, 8), plan="time=4", loops=1)
        sizes.append(check(path, target="tensorrt_rtx", build=True).engine.size)
    assert max(sizes) < 2 * min(sizes)  # the builder times what it chooses from, so that no two are of one size


def determinant(dtype=onnx.TensorProto.FLOAT, kind="Det", **attributes):
    node = onnx.helper.make_node(kind, ["x"], ["y"], name=f"the_{kind}", **attributes)
    x, y = (onnx.helper.make_tensor_value_info(*of) for of in (("x", dtype, [3, 3]), ("y", dtype, None)))
    graph = onnx.helper.make_graph([node], "g", [x], [y])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])


def test_what_is_refused_is_told_by_node():
    verdict = check(determinant(), target="tensorrt_rtx", build=True)
    assert [row[:2] for row in verdict.rows] == [("the_Det", "Det"), ("the_Det", "engine")]
    assert verdict.engine is None and not verdict.ok
    assert json.loads(json.dumps(verdict.as_dict()))["engine"] is None
    with pytest.raises(UnrollError, match="the_Det: is refused by TensorRT for RTX"):
        build_engine(determinant())


def test_what_the_builder_refuses_is_told_by_node():
    """Past the parser, errors come through the log; this one names its layer."""
    with pytest.raises(UnrollError, match=r"^the_Cast: is refused by TensorRT for RTX .*FP8"):
        build_engine(determinant(kind="Cast", to=onnx.TensorProto.FLOAT8E4M3FN))


def test_float64_is_refused_and_not_computed_in_float32():
    with pytest.raises(UnrollError, match="x: is of float64 in the file, and of FLOAT in an engine"):
        build_engine(determinant(onnx.TensorProto.DOUBLE, "Tanh"))


def test_shapes_that_fit_no_input(path):
    case = Case("RNN")
    unroll.export_onnx(case.model().eval(), case.tensors(), path, check=False, dynamic_shapes={"input": {1: "batch"}})
    with pytest.raises(UnrollError, match=r"shapes\['x'\]: is no input"):
        build_engine(path, shapes={"x": [(1,), (2,), (3,)]})
    with pytest.raises(UnrollError, match="MIN<=OPT<=MAX"):
        build_engine(path, shapes={"input": [(4, 8, 6), (4, 2, 6), (4, 1, 6)]})


def test_command_line(run, path):
    unroll.export_onnx(TWO.model().eval(), TWO.tensors(), path, check=False)
    code, out, _ = run("inspect", path, "--target", "tensorrt_rtx", "--build")
    assert code == 0 and "all offered" in out and " layers, built in " in out and "an engine of" in out
    code, out, _ = run("inspect", path, "--target", "tensorrt_rtx", "--build", "--json")
    assert code == 0 and json.loads(out)["engine"]["version"] == trt.__version__
    onnx.save(determinant(), path)
    code, out, _ = run("inspect", path, "--target", "tensorrt_rtx", "--build")
    assert code == 1 and "refused by TensorRT for RTX" in out


def test_devices_are_chosen_by_name(path):
    unroll.export_onnx(nn.RNN(3, 4).eval(), torch.zeros(2, 1, 3), path, check=False)
    assert build_engine(path, capabilities=["SM89"]).size > 10_000
    with pytest.raises(UnrollError, match="'SM0': is not known to TensorRT for RTX"):
        build_engine(path, capabilities=["SM0"])


def test_the_script_for_a_card_builds_its_engines(tmp_path):
    command = [sys.executable, "benchmarks/tensorrt_gpu.py", "--build", str(tmp_path / "engines"), "--only", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "engines").glob("*.engine"))) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for a machine without a card")
def test_the_script_for_a_card_says_what_it_needs(tmp_path):
    command = [sys.executable, "benchmarks/tensorrt_gpu.py"]
    given = {"": "one of the arguments --build --run is required", f"--run {tmp_path}": "needs a CUDA device"}
    for arguments, said in given.items():
        done = subprocess.run([*command, *arguments.split()], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode and said in done.stderr
    assert "--current" in subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT).stdout
