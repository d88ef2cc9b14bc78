"""Too many steps are refused before anything is written, by every frontend, and `limit=` allows more."""

from __future__ import annotations

import gc
import resource
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import unroll
from tests.onnx import standard
from unroll import UnrollError
from unroll.core import limits

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
from onnx import helper, numpy_helper  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.:DeprecationWarning")

LAYER = nn.RNN(1, 1).eval()
MANY = 20_001


@pytest.fixture(scope="module", autouse=True)
def only_ours():
    """Leave out of the time what torch imports at a first call, and a collection among what other tests made."""
    unroll.unroll(torch.jit.script(nn.Sequential(LAYER)), torch.zeros(1, 1, 1))
    unroll.unroll(unroll.trace(nn.Sequential(LAYER)), steps=1)
    unroll.unroll(file(1))
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def refused(match, seconds=1.0):
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UnrollError, match=match):
        yield
    assert time.process_time() - began < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def file(steps, kind="RNN", **options):
    inputs = standard.draw(kind, {}, dtype=np.float32)
    model = standard.model(kind, {}, inputs, **options)
    for value in (*model.graph.input, *model.graph.output):
        if value.name in ("X", "Y") and isinstance(steps, int):
            value.type.tensor_type.shape.dim[0].dim_value = steps
    return model


@pytest.mark.parametrize("steps", [MANY, 10**6, 10**12, 2**40])
def test_files(steps):
    with refused(f"rnn: would have {steps:,} steps written out, more than the limit of 20,000"):
        unroll.unroll(file(steps))
    with refused("steps written out"):
        unroll.unroll(file("T", dynamic=("steps",)), steps=steps)
    with refused("steps written out"):
        unroll.unroll(file(steps), plan=unroll.Plan(time=steps))
    with refused("steps written out"):
        unroll.unroll(file("T", dynamic=("steps",)), plan=unroll.Plan(time=steps))
    assert unroll.unroll(file(steps), plan="time=2").graph.node
    assert unroll.unroll(file("T", dynamic=("steps",))).graph.node


@pytest.mark.parametrize("steps", [MANY, 10**6, 10**12])
def test_graphs(steps):
    graph = unroll.trace(nn.Sequential(LAYER))
    with refused("steps written out, more than the limit of 20,000"):
        unroll.unroll(graph, steps=steps)
    with refused("steps written out"):
        unroll.unroll(torch.jit.script(LAYER), steps=steps)
    with refused("steps written out"):
        unroll.unroll(torch.jit.script(LAYER), plan=unroll.Plan(time=steps))


def test_programs_and_traces():
    program = torch.export.export(LAYER, (torch.zeros(7, 1, 1),))
    with refused("7 steps written out, more than the limit of 6"):
        unroll.unroll(program, limit=6)
    with refused("7 steps written out"), limits.limited(6):
        program.run_decompositions(unroll.decompositions())
    with refused("steps written out"):
        torch.jit.trace(unroll.unroll(LAYER), (torch.zeros(MANY, 1, 1),))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_compiled_models(kind):
    layer, more = kind(1, 1, batch_first=True), "more than the limit of"
    assert unroll.compile(layer, backend="eager", limit=7)(torch.zeros(1, 7, 1))[0].shape == (1, 7, 1)
    for model in (layer, nn.Sequential(layer)):
        for where in (None, lambda name, layer: True):
            compiled = unroll.compile(model, backend="eager", limit=6, where=where)
            with pytest.raises(Exception, match=f"would have 7 steps written out, {more} 6"):
                compiled(torch.zeros(1, 7, 1))
    with pytest.raises(Exception, match=f"would have 9 steps written out, {more} 8"), torch.no_grad():
        unroll.compile(layer, backend="eager", plan="time=9", limit=8)(torch.zeros(1, 30, 1))
    with pytest.raises(UnrollError, match="is no number of steps"):
        unroll.compile(layer, limit=0)
    torch._dynamo.reset()  # it counts how often the code of a layer was compiled
    compiled = unroll.compile(layer, backend="eager")
    for steps in (2, 3, 4):  # the last are of an open size
        compiled(torch.zeros(1, steps, 1))
    began = time.process_time()
    with pytest.raises(Exception, match=f"would have {MANY:,} steps written out, {more} 20,000"):
        compiled(torch.zeros(1, MANY, 1))
    assert time.process_time() - began < 10  # Dynamo itself runs the steps of a GRU in 136 s


def test_the_limit_is_an_argument():
    graph = unroll.trace(nn.Sequential(LAYER))
    with pytest.raises(UnrollError, match="5 steps written out, more than the limit of 4"):
        unroll.unroll(graph, steps=5, limit=4)
    assert unroll.unroll(graph, steps=5, limit=5)(torch.zeros(5, 1, 1))[0].shape == (5, 1, 1)
    with pytest.raises(UnrollError, match="limit of 3"):
        unroll.unroll(file(4), limit=3)
    assert unroll.unroll(file(4), limit=4).graph.node
    assert limits.limit() == limits.STEPS == 20_000
    for wrong in (0, -1, True, 2.0, "9"):
        with pytest.raises(UnrollError, match="is no number of steps"):
            unroll.unroll(graph, steps=5, limit=wrong)


def test_exports(tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(UnrollError, match="would have 6 steps written out, more than the limit of 5"):
        unroll.export_onnx(LAYER, torch.zeros(6, 1, 1), tmp_path / "m.onnx", limit=5)
    assert not list(tmp_path.iterdir())
    unroll.export_onnx(LAYER, torch.zeros(6, 1, 1), tmp_path / "m.onnx", limit=6)


def test_unrolled_modules_of_which_a_graph_is_made():
    x = torch.zeros(7, 1, 1)
    ways = [
        lambda model: torch.export.export(model, (x,), strict=False),
        lambda model: torch.export.export(model, (x,), strict=True),
        lambda model: torch.compile(model, backend="eager", fullgraph=True)(x),
        lambda model: torch.jit.trace(model, (x,)),
        lambda model: make_fx(model)(x),
        lambda model: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    ]
    for way in ways:
        with pytest.raises(Exception, match="would have 7 steps written out, more than the limit of 6"):
            way(unroll.unroll(LAYER, limit=6))
        way(unroll.unroll(LAYER, limit=7))
    many = torch.zeros(MANY, 1, 1)
    for way in (
        lambda: torch.export.export(unroll.unroll(LAYER), (many,), strict=False),
        lambda: make_fx(unroll.unroll(LAYER))(many),
    ):
        with refused("steps written out", seconds=3):
            way()


def test_modules_run_at_any_length():
    with torch.no_grad():
        assert unroll.unroll(LAYER)(torch.zeros(MANY, 1, 1))[0].shape == (MANY, 1, 1)


def doubling(times, of):
    """A model of a function that calls another twice, and so on."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("f", 1)]
    functions = [helper.make_function("f", "f0", ["x"], ["y"], of, opsets)]
    for k in range(1, times + 1):
        calls = [helper.make_node(f"f{k - 1}", [a], [b], domain="f") for a, b in (("x", "m"), ("m", "y"))]
        functions.append(helper.make_function("f", f"f{k}", ["x"], ["y"], calls, opsets))
    x, y = (helper.make_tensor_value_info(name, 1, [3, 1, 1]) for name in "xy")
    graph = helper.make_graph([helper.make_node(f"f{times}", ["x"], ["y"], domain="f")], "g", [x], [y])
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)


def recurrent():
    weight = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.ones((1, 1, 1), "f4")))
    rnn = helper.make_node("RNN", ["x", "w", "w"], ["z"], hidden_size=1)
    axes = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.array([1])))
    return [weight, axes, rnn, helper.make_node("Squeeze", ["z", "one"], ["y"])]


def test_functions_that_double():
    with refused(r"model: would have 67,108,864 nodes and steps, more than 1,000,000; pass limit=1342178"):
        unroll.unroll(doubling(24, recurrent()))
    with refused("nodes and steps"):
        unroll.unroll(doubling(60, recurrent()))
    with refused("would have 512 nodes and steps, more than 300"):
        unroll.unroll(doubling(7, recurrent()), limit=6)
    assert unroll.unroll(doubling(3, recurrent())).graph.node
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    assert len(unroll.unroll(doubling(24, relu)).functions) == 25  # nothing recurrent is in them
    beside = doubling(24, relu)
    beside.graph.node.extend(recurrent())
    beside.graph.node[-2].input[0] = "y"
    beside.graph.node[-1].output[0] = "last"
    beside.graph.output[0].name = "last"
    with refused("model: would have 16,777,220 nodes and steps"):  # sizes would be inferred through every call
        unroll.unroll(beside)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_huge_sizes(kind):
    size = 2**40
    model = file("T", kind, known=(), dynamic=("steps", "batch"))
    rows = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * size
    shapes = {"W": (1, rows, 2), "R": (1, rows, size), "X": (4, size, 2)}
    for value in model.graph.input:
        for dim, n in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            dim.dim_value = n
    model.graph.node[0].attribute.extend([helper.make_attribute("hidden_size", size)])
    del model.graph.node[0].attribute[0]
    began = time.process_time()
    unrolled = unroll.unroll(model)
    assert time.process_time() - began < 1
    assert unrolled.ByteSize() < 10_000
