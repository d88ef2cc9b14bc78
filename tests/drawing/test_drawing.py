"""Pictures show the steps in the order in which they are written."""

import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import onnx_ir
import pytest
import torch
from torch import nn

from unroll import Plan, UnrollError, draw, export_onnx, streaming, trace, unroll
from unroll.core.recurrence import read_module, scope
from unroll.drawing import pictures
from unroll.drawing.subjects import read_subjects
from unroll.drawing.turns import steps_of

pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra bench")


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ({}, "default"),
        ({"num_layers": 2}, "default"),
        ({"num_layers": 2}, "layers=wavefront"),
        ({"num_layers": 3}, "layers=wavefront"),
        ({"bidirectional": True}, "layers=wavefront"),
        ({"num_layers": 2, "bidirectional": True}, "default"),
        ({"num_layers": 2, "bidirectional": True}, "directions=stacked"),
        ({"num_layers": 2}, "directions=stacked"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_steps_are_those_that_are_written(kind, options, plan, steps):
    """A graph of the layer has the same steps and the same stacks, by the names of its nodes."""
    layer = kind(3, 5, **options)
    graph = unroll(trace(Holder(layer)), plan=plan, steps=steps)
    written = {m.groups() for n in graph.graph.nodes if (m := re.match(r"rnn_(.*)_t(\d+)_", n.name))}

    recurrence = read_module(layer)
    drawn = set()
    for step in steps_of(recurrence, Plan.of(plan), steps):
        if step.batched and recurrence.bidirectional:
            drawn.add((f"l{step.layer}_stacked", str(step.turn - step.layer * steps)))
        elif step.batched:
            drawn.add(("stacked", str(step.turn)))
        else:
            where = scope(recurrence, step.layer * len(recurrence.directions) + step.direction)
            drawn.add((where.replace(".", "_"), str(step.time)))
    assert drawn == written


class Holder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.rnn = layer

    def forward(self, x):
        return self.rnn(x)


def test_no_step_runs_before_what_it_needs():
    for options in ({"num_layers": 3}, {"num_layers": 2, "bidirectional": True}):
        for plan in ("default", "layers=wavefront", "directions=stacked", "time=2"):
            recurrence = read_module(nn.GRU(3, 5, **options))
            found = {(s.layer, s.direction, s.time): s.turn for s in steps_of(recurrence, Plan.of(plan), 5)}
            for (layer, direction, time), turn in found.items():
                before = time + 1 if direction else time - 1
                assert found.get((layer, direction, before), -1) < turn
                below = [found[layer - 1, d, time] for d in range(len(recurrence.directions)) if layer]
                assert all(other < turn for other in below)


def test_blocks_and_their_rest():
    blocks = [(s.time, s.block) for s in steps_of(read_module(nn.GRU(3, 5, bidirectional=True)), Plan(time=2), 5)]
    assert blocks[:5] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, None)]
    assert blocks[5:] == [(4, 0), (3, 0), (2, 1), (1, 1), (0, None)]


def test_layers_of_modules():
    model = nn.ModuleDict({"a": nn.LSTM(3, 5), "b": nn.GRUCell(3, 5), "c": nn.Linear(3, 5)})
    assert [(s.name, s.recurrence.mode, str(s.plan), s.steps) for s in read_subjects(model, None, None, None)] == [
        ("a", "LSTM", "default", 3),
        ("b", "GRU", "default", 1),
    ]
    unrolled = unroll(model, where="a", plan="gates=split")
    assert [(s.name, str(s.plan)) for s in read_subjects(unrolled, None, None, 4)] == [
        ("a", "gates=split"),
        ("b", "default"),
    ]
    assert [s.name for s in read_subjects(unrolled, "b", Plan(gates="paired"), 4)] == ["b"]


@pytest.mark.parametrize("is_open", [False, True])
def test_layers_of_files(tmp_path, is_open):
    path = tmp_path / "m.onnx"
    export_onnx(nn.LSTM(3, 5).eval(), torch.randn(4, 1, 3), path, where=[], check=False)
    if is_open:
        model = onnx_ir.load(path)
        model.graph.inputs[0].shape = onnx_ir.Shape(["time", 1, 3])
        onnx_ir.save(model, path)
    for model in (path, str(path), onnx_ir.load(path), onnx_ir.to_proto(onnx_ir.load(path))):
        (subject,) = read_subjects(model, None, None, None)
        assert (subject.steps, subject.is_open) == ((3, True) if is_open else (4, False))
        assert str(subject.plan) == ("gates=paired,time=1" if is_open else "gates=paired")
    assert "</svg>" in draw(path, tmp_path / "m.svg", plan="time=2")


def test_the_picture(tmp_path):
    path = tmp_path / "m.svg"
    model = nn.Sequential(nn.LSTM(3, 5, num_layers=2), nn.Linear(5, 5))
    text = draw(model, path, steps=4)
    assert path.read_text() == text == draw(model, steps=4)  # the same each time
    root = ElementTree.fromstring(text)
    width = float(root.attrib["width"].removesuffix("pt"))
    assert root.tag.endswith("svg") and width == pytest.approx(72 * (pictures.LEFT + 4 * pictures.PITCH + 0.2), 1e-3)
    # a box, four gates and one bar for each of eight steps; four bars where gates are split
    filled = re.compile(rf'style="fill: ({pictures.SIGMOID}|{pictures.CANDIDATE}|{pictures.PRODUCT})')
    counts = [[filled.findall(draw(model, steps=4, plan=plan)).count(c) for c in COLOURS] for plan in PLANS]
    assert counts == [[24, 8, 8], [24, 8, 16], [24, 8, 32]]


PLANS = (None, "gates=paired", "gates=split")
COLOURS = (pictures.SIGMOID, pictures.CANDIDATE, pictures.PRODUCT)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda tmp: draw(nn.Linear(3, 5)), "has no recurrent layer"),
        (lambda tmp: draw(unroll(trace(Holder(nn.GRU(3, 5))), steps=3)), "has no recurrent layer"),
        (lambda tmp: draw(3), "got int"),
        (lambda tmp: draw(unroll(nn.GRU(3, 5)), plan="gates=split"), "is unrolled already, by the plan default"),
        (lambda tmp: draw(nn.GRU(3, 5), steps=0), "is no number of steps"),
        (lambda tmp: draw(nn.GRU(3, 5), tmp / "no" / "m.svg"), "cannot be written"),
        (lambda tmp: draw(tmp / "no.onnx"), "cannot be read"),
        (lambda tmp: draw(nn.GRU(3, 5), where="b"), "names no recurrent layer"),
    ],
)
def test_refusals(tmp_path, call, found):
    with pytest.raises(UnrollError) as caught:
        call(tmp_path)
    assert found in str(caught.value)


def test_of_a_long_sequence_the_ends_are_drawn():
    bars = [
        draw(nn.GRU(3, 5), steps=steps, plan="gates=merged").count(f"fill: {pictures.PRODUCT}")
        for steps in (12, 13, 400)
    ]
    assert bars == [12, 11, 11]
    assert "</svg>" in draw(nn.GRU(3, 5, bidirectional=True), steps=50, plan="time=4")


def test_a_streaming_model():
    assert [s.name for s in read_subjects(streaming(Holder(nn.GRU(3, 5)), torch.randn(4, 1, 3)), None, None, None)]


def test_pictures_of_the_pages(tmp_path):
    """Are drawn again as they are in the repository, but for what another version of matplotlib does to letters."""
    docs = Path(__file__).parents[2] / "docs"
    runpy.run_path(str(docs / "pictures.py"))["main"](tmp_path)
    for name in ("steps.svg", "plans.svg"):
        old, new = (filled_paths(folder / name) for folder in (docs, tmp_path))
        assert old == new


def filled_paths(path):
    return re.findall(r'style="fill: #\w+', path.read_text())
