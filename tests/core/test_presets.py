"""Presets whose plan depends on the layer and its sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import unroll
from tests.cases import Case
from unroll import Plan, UnrollError
from unroll.core.plan import PRESETS
from unroll.core.presets import RULES, Rule, Situation
from unroll.core.recurrence import Recurrence

LAYER = Recurrence("GRU", 3, 4)


@pytest.mark.parametrize("name", RULES)
def test_rules_make_plans(name):
    for rule in RULES[name]:
        assert replace(PRESETS[name], preset="", **rule.choices) != PRESETS["default"]
    assert PRESETS[name].preset == name


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (Rule({}), [Situation(LAYER), Situation(LAYER, 3, 2, packed=True)]),
        (Rule({}, steps=(4, 8)), [Situation(LAYER, 4), Situation(LAYER, 8)]),
        (Rule({}, batch=(2, 3)), [Situation(LAYER, None, 2), Situation(LAYER, 9, 3)]),
        (Rule({}, packed=False), [Situation(LAYER)]),
        (Rule({}, packed=True), [Situation(LAYER, packed=True)]),
    ],
    ids=repr,
)
def test_conditions(rule, fits):
    assert all(map(rule.holds, fits))
    assert not rule.holds(Situation(replace(LAYER, is_cell=True), 4, 2, packed=True))
    others = [Situation(LAYER, 3, 1), Situation(LAYER, 9, 4), Situation(LAYER), Situation(LAYER, packed=True)]
    if rule != Rule({}):
        assert not all(map(rule.holds, others))


def test_a_preset_with_rules_is_read_back_from_its_text():
    plan = Plan.of("tensorrt")
    assert str(plan) == "tensorrt" and Plan.of(str(plan)) == plan != Plan()
    assert plan.resolve(Situation(LAYER, 10)) is plan
    assert plan.resolve(Situation(LAYER, 100)) == Plan(time=4)
    assert str(replace(plan, gates="split")) == "gates=split,preset=tensorrt"
    assert Plan.of(str(replace(plan, gates="split"))) == replace(plan, gates="split")
    with pytest.raises(UnrollError, match="got 'nowhere'; choose one of 'tensorrt'"):
        Plan(preset="nowhere")


@pytest.mark.parametrize(("steps", "loops"), [(63, 0), (64, 1)])
def test_files_in_blocks_from_a_number_of_steps_on(steps, loops, tmp_path):
    pytest.importorskip("onnx")
    case = Case("RNN", steps=steps)
    done = unroll.export_onnx(case.model().eval(), case.tensors(), tmp_path / "m.onnx", plan="tensorrt")
    assert done.operators["Scan"] == loops


def test_packed_rows_run_in_blocks_only_where_the_library_takes_them(tmp_path):
    pytest.importorskip("onnx")
    case = Case("RNN", form="packed", steps=64)
    for plan, loops in (("tensorrt", 0), ("tensorrt_rtx", 1)):
        done = unroll.export_onnx(case.model().eval(), case.tensors(), tmp_path / "m.onnx", plan=plan)
        assert done.operators["Scan"] == loops
        assert unroll.check(tmp_path / "m.onnx", target=plan).ok


def test_frozen_layers_keep_their_preset(tmp_path):
    pytest.importorskip("onnx")
    case = Case("GRU", steps=64)
    frozen = unroll.unroll(case.model().eval(), plan="tensorrt", freeze=True)
    done = unroll.export_onnx(frozen, case.tensors(), tmp_path / "m.onnx")
    assert done.operators["Scan"] == 1


def test_layers_of_different_steps_share_weights_by_plan(tmp_path):
    """One layer called at two lengths, of which one runs in a loop."""
    pytest.importorskip("onnx")

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = torch.nn.GRU(3, 4)

        def forward(self, x):
            return self.rnn(x)[0], self.rnn(x[:9])[0]

    done = unroll.export_onnx(Twice().eval(), torch.randn(70, 2, 3), tmp_path / "m.onnx", plan="tensorrt")
    assert done.operators["Scan"] == 1
