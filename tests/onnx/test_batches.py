"""Files with an open batch refuse a state, or lengths, of another number of rows than the input has."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.checks import assert_same
from tests.onnx import standard
from unroll import export_onnx, unroll

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

ROWS = [(1, 3), (3, 1), (2, 3)]
"""Of the input, and of one state"""


def session(model):
    """At ONNX Runtime's own level of optimization, which merges Reshapes that follow each other."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def fed(runner, tensors):
    names = [value.name for value in runner.get_inputs()]
    arrays = {name: np.asarray(tensor) for name, tensor in zip(names, tensors, strict=True)}
    return tuple(map(torch.from_numpy, runner.run(None, arrays)))


def assert_counts(runner, draw, count):
    """Each of the `count` inputs after the first, alone of another batch, stops the file."""
    for batch, other in ROWS:
        for k in range(1, count + 1):
            given, wrong = list(draw(batch)), list(draw(other))
            given[k] = wrong[k]
            with pytest.raises(Exception, match="ONNXRuntimeError"):
                fed(runner, given)


class Given(nn.Module):
    """A layer with its state as arguments."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, *states):
        return self.layer(x, states if len(states) > 1 else states[0])

    def draw(self, batch):
        layer = self.layer
        lead = (batch, 4) if layer.batch_first else (4, batch)
        passes = layer.num_layers * (1 + layer.bidirectional)
        sizes = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * (layer.mode == "LSTM")
        return torch.randn(*lead, layer.input_size), *(torch.randn(passes, batch, size) for size in sizes)


FORMS = [
    (nn.LSTM(3, 5, bidirectional=True), False, None),
    (nn.LSTM(3, 5, proj_size=2), True, None),
    (nn.GRU(3, 5, num_layers=2, batch_first=True), False, "layers=wavefront"),
    (nn.GRU(3, 5, batch_first=True), True, "time=3"),
    (nn.RNN(3, 5, bidirectional=True), False, "directions=stacked"),
    (nn.RNN(3, 5, batch_first=True), False, None),
]


@pytest.mark.parametrize(("layer", "any_length", "plan"), FORMS, ids=str)
def test_states_of_exported_layers(layer, any_length, plan, tmp_path):
    model = Given(layer).eval()
    batch, time = Dim("batch"), Dim("time")
    axes = {0 if layer.batch_first else 1: batch} | ({1 if layer.batch_first else 0: time} if any_length else {})
    args = model.draw(2)
    shapes = {"x": axes, "states": tuple({1: batch} for _ in args[1:])}
    runner = session(export_onnx(model, args, tmp_path / "m.onnx", dynamic_shapes=shapes, plan=plan, check=False).path)
    for rows in (1, 3):
        given = model.draw(rows)
        with torch.no_grad():
            y, states = model(*given)
        assert_same(fed(runner, given), (y, *(states if isinstance(states, tuple) else [states])), rtol=1e-5)
    assert_counts(runner, model.draw, len(args) - 1)


@pytest.mark.parametrize("opset", [13, 14, 22])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("plan", [None, "time=3"], ids=str)
def test_states_and_lengths_of_onnx_nodes(kind, opset, plan):
    names = ["initial_h", *["initial_c"] * (kind == "LSTM"), "sequence_lens"]
    for direction, dynamic in (("bidirectional", ("batch",)), ("reverse", ("batch", "steps"))):
        attributes = {"direction": direction, "layout": int(opset > 13)}

        def draw(batch, attributes=attributes, seed=0):
            inputs = standard.draw(kind, attributes, optional=tuple(names), batch=batch, dtype=np.float32, seed=seed)
            weights.update((name, inputs.pop(name)) for name in ("W", "R") if name not in weights)
            return [inputs[name] for name in order]

        weights = {}
        order = ["X", *(name for name in standard.ORDER if name in names)]
        inputs = dict(zip(order, draw(2), strict=True)) | weights
        model = standard.model(kind, attributes, inputs, dynamic=dynamic, opset=opset)
        runner = session(unroll(model, plan=plan))
        for rows in (1, 3):
            given = draw(rows)
            wanted = standard.evaluate(kind, attributes, dict(zip(order, given, strict=True)) | weights)
            assert_same(fed(runner, given), tuple(map(torch.from_numpy, wanted)), rtol=1e-5)
        assert_counts(runner, draw, len(names))


def added(operators, other):
    return dict(Counter(operators) - Counter(other))


def test_what_counting_costs(tmp_path):
    """Nothing where the batch is fixed, and where the state comes from the input itself."""
    model = Given(nn.LSTM(3, 5)).eval()
    fixed = export_onnx(model, model.draw(2), tmp_path / "m.onnx", check=False).operators
    shapes = {"x": {1: "batch"}, "states": ({1: "batch"}, {1: "batch"})}
    counted = export_onnx(model, model.draw(2), tmp_path / "m.onnx", dynamic_shapes=shapes, check=False).operators
    assert "Shape" not in fixed and added(counted, fixed) == {"Shape": 1, "Concat": 1}

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(3, 3)

        def forward(self, x):
            return self.layer(x, x[:1] * 2)

    x = torch.randn(4, 2, 3)
    fixed = export_onnx(Own().eval(), x, tmp_path / "m.onnx", check=False).operators
    counted = export_onnx(Own().eval(), x, tmp_path / "m.onnx", dynamic_shapes=({1: "batch"},), check=False).operators
    assert "Shape" not in counted and added(counted, fixed) == {}


class Cells(nn.Module):
    """Steps of two cells that the model makes itself."""

    def __init__(self):
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(3, 5), nn.LSTMCell(5, 5)

    def forward(self, x, h, state):
        for step in x:
            h = self.gru(step, h)
            state = self.lstm(h, state)
        return h, *state


def test_cells_are_counted_once(tmp_path):
    def draw(batch):
        return torch.randn(4, batch, 3), *(torch.randn(batch, 5) for _ in range(3))

    x, h, *state = draw(2)
    model = Cells().eval()
    shapes = ({1: "batch"}, {0: "batch"}, ({0: "batch"}, {0: "batch"}))
    export = export_onnx(model, (x, h, tuple(state)), tmp_path / "m.onnx", dynamic_shapes=shapes, check=False)
    assert export.operators["Shape"] == 2  # of the first calls of the two
    runner = session(export.path)
    x, h, *state = draw(3)
    with torch.no_grad():
        assert_same(fed(runner, (x, h, *state)), model(x, h, tuple(state)), rtol=1e-5)
    assert_counts(runner, draw, 3)


def test_cells_in_branches_are_counted_in_each(tmp_path):
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRUCell(3, 5)

        def forward(self, x, h):
            h = torch.cond(x.sum() > 1000, lambda x, h: self.gru(x, h), lambda x, h: h * 2, (x, h))
            return self.gru(x, h)

    def draw(batch):
        return torch.randn(batch, 3), torch.randn(batch, 5)

    shapes = ({0: Dim("batch")}, {0: Dim("batch")})
    program = torch.export.export(Chooses().eval(), draw(2), dynamic_shapes=shapes)
    export = export_onnx(program, None, tmp_path / "m.onnx", check=False)
    assert export.operators["Shape"] == 2
    assert_counts(session(export.path), draw, 1)


def test_a_state_from_the_middle_of_an_onnx_model():
    """Its shape is written down there, and need not be true."""
    attributes = {}
    inputs = standard.draw("GRU", attributes, optional=("initial_h",), dtype=np.float32)
    model = standard.model("GRU", attributes, inputs, dynamic=("batch",))
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["initial_h"], ["negative"]))
    model.graph.node[1].input[5] = "negative"
    runner = session(unroll(model))
    drawn = {b: standard.draw("GRU", attributes, optional=("initial_h",), batch=b, dtype=np.float32) for b in (1, 3)}
    for x, h in ((1, 3), (3, 1)):
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            fed(runner, [drawn[x]["X"], drawn[h]["initial_h"]])
