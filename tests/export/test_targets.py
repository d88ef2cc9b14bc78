"""Plans that are tried for a target, and a warning where a target does not take what its plan makes."""

import warnings

import pytest
import torch
from torch import nn

from tests.cases import Case
from unroll import Plan, UnrollWarning, check, export_onnx
from unroll.export.judging import most_taken
from unroll.targets.checking import Verdict
from unroll.targets.uses import Row


def verdict(*operators: str) -> Verdict:
    rows = [Row(f"node{k}", operator, finding, "") for k, operator in enumerate(operators) for finding in "ab"]
    return Verdict("xnnpack", 99, tuple(rows))


def test_a_plan_of_which_most_is_taken_has_the_fewest_products_left_and_then_the_fewest_findings():
    loop = verdict("aten.addmm.default", "aten.lstm.input")
    cut, halved = verdict(*["aten.chunk.default"] * 7), verdict(*["aten.chunk.default"] * 5)
    assert most_taken({"loop": loop}) == ("loop", 2, 4)
    assert most_taken({"loop": loop, "cut": cut, "halved": halved}) == ("halved", 0, 10)


PACKED, GRU = Case("LSTM", form="packed"), Case("GRU")
OPEN = {"input": {0: "time"}}


def told(case, plan, path, **options):
    """Return the lines of the warning of an export, none without one."""
    pytest.importorskip("onnxruntime")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(case.model().eval(), case.tensors(), path, plan=plan, **options)
    found = [warning for warning in caught if issubclass(warning.category, UnrollWarning)]
    assert all(warning.filename == __file__ for warning in found) and len(found) < 2
    return [line for warning in found for line in str(warning.message).splitlines()]


def test_a_file_that_the_target_of_its_plan_does_not_take(tmp_path):
    path = tmp_path / "model.onnx"
    head, *lines = told(PACKED, "npu", path)
    of_layers = {row.place for row in check(path, target="npu").rows if row.place.startswith("rnn.")}
    assert head == (
        f"{path}: has {len(of_layers)} nodes of unrolled layers that npu does not take; "
        f"`unroll inspect {path} --target npu` shows all"
    )
    fix = "compute with numbers instead: leave out masks and lengths"
    assert f"  rnn.l0.t0.less: Less is boolean; {fix}" in lines and all(line.startswith("  rnn.l0.") for line in lines)
    for line in lines:  # a node of several results is named once
        places = line.split(": ")[0].split(" and ")[0].split(", ")
        assert len(set(places)) == len(places)
    head, *lines = told(GRU, "webnn", path, dynamic_shapes=OPEN)
    assert any("Scan is control flow; give a fixed number of time steps" in line for line in lines)


@pytest.mark.parametrize("plan", ["npu", "webnn", "tensorrt", "tensorrt_rtx"])
def test_files_that_the_target_of_their_plan_takes(plan, tmp_path):
    assert told(GRU, plan, tmp_path / "model.onnx") == []
    if plan.startswith("tensorrt"):
        assert told(PACKED, plan, tmp_path / "model.onnx") == []
        assert told(GRU, plan, tmp_path / "model.onnx", dynamic_shapes=OPEN) == []


class Sorted(nn.Module):
    """Does what WebNN does not, besides its layer."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 5)

    def forward(self, x):
        return torch.sort(self.rnn(x)[0])[0]


def test_what_is_the_models_own_is_not_told(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(Sorted().eval(), torch.randn(4, 2, 6), path, plan="webnn")
    assert not check(path, target="webnn").ok


def test_a_plan_without_the_name_of_a_target_says_nothing_of_one(tmp_path):
    assert told(PACKED, Plan.of("npu"), tmp_path / "model.onnx") == []
    assert told(PACKED, "xnnpack", tmp_path / "model.onnx") == []
