"""Launches and kernels of the code that Inductor writes for a GPU, counted where PyTorch is built for CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

MISSING = "needs PyTorch's build for CUDA, with Triton; a card it need not have"

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(torch.version.cuda is None or find_spec("triton") is None, reason=MISSING),
]


@cache
def counted(**form: Any) -> dict[str, Any]:
    """The counts of one form, by a process of its own."""
    run = [sys.executable, "-m", "tests.modules.triton_code", json.dumps([form])]
    root = Path(__file__).parents[2]
    done = subprocess.run(run, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (counts,) = json.loads(done.stdout.splitlines()[-1])
    return counts


def launches(counts: dict[str, Any]) -> dict[str, int]:
    """Kernels of Triton and products by their operators; copies apart are counted by themselves."""
    products = {name: n for name, n in counts["called"].items() if not name.startswith("aten.")}
    return {"triton": counts["triton"], **products}


def each_step(form: dict[str, Any], least: int, most: int) -> dict[str, float]:
    """What another step adds to what is launched, between two numbers of steps."""
    before, after = (launches(counted(**form, steps=steps)) for steps in (least, most))
    added = {name: (n - before.get(name, 0)) / (most - least) for name, n in after.items()}
    return {name: n for name, n in added.items() if n}


FUSED = {"mm": 1, "triton": 1}
"""A product, and one kernel that adds what it is added to and does all the rest"""
ONE = {"triton": 1}

ONTO_BIAS = {"addmm": 1, "triton": 1}
"""The addend of a GRU's product is its bias, which cuBLAS adds in the product's own launch"""
BATCHED = {"bmm": 1, "triton": 1}
"""A product of all that are stacked; of a wavefront one more, with the input of the layers above"""
WAVE = BATCHED | {"bmm": 2}

STACKED: dict[str, Any] = {"bidirectional": True, "plan": "directions=stacked"}
LAYERS: dict[str, Any] = {"num_layers": 3, "plan": "layers=wavefront"}
ALONE: dict[str, Any] = {"batch": 1, "plan": "inductor"}

FORMS: dict[str, tuple[dict[str, Any], dict[str, float], tuple[int, int, int]]] = {
    "LSTM": ({"kind": "LSTM"}, FUSED, (11, 13, 13)),
    "GRU": ({"kind": "GRU"}, ONTO_BIAS, (12, 13, 13)),
    "RNN": ({"kind": "RNN"}, FUSED, (10, 11, 11)),
    "LSTM without biases": ({"kind": "LSTM", "bias": False}, FUSED, (10, 12, 12)),
    "GRU without biases": ({"kind": "GRU", "bias": False}, FUSED, (10, 14, 14)),
    "RNN without biases": ({"kind": "RNN", "bias": False}, FUSED, (9, 10, 10)),
    "one, LSTM": ({"kind": "LSTM", **ALONE}, ONE, (8, 13, 12)),
    "one, GRU": ({"kind": "GRU", **ALONE}, ONE, (8, 13, 11)),
    "one, RNN": ({"kind": "RNN", **ALONE}, ONE, (9, 12, 12)),
    # steps with a mask: rows that have no step keep their state
    "packed LSTM": ({"kind": "LSTM", "packed": True}, FUSED, (14, 15, 15)),
    "packed GRU": ({"kind": "GRU", "packed": True}, ONTO_BIAS, (16, 16, 16)),
    "packed RNN": ({"kind": "RNN", "packed": True}, FUSED, (13, 14, 14)),
    "stacked LSTM": ({"kind": "LSTM", **STACKED}, BATCHED, (12, 16, 16)),
    "stacked GRU": ({"kind": "GRU", **STACKED}, BATCHED, (13, 16, 16)),
    "stacked RNN": ({"kind": "RNN", **STACKED}, BATCHED, (11, 14, 14)),
    "wavefront LSTM": ({"kind": "LSTM", **LAYERS}, WAVE, (15, 16, 16)),
    "wavefront GRU": ({"kind": "GRU", **LAYERS}, WAVE, (16, 16, 16)),
    "wavefront RNN": ({"kind": "RNN", **LAYERS}, WAVE, (13, 13, 13)),
    "linear LSTM": ({"kind": "LSTM", "plan": "quantize"}, {"addmm": 1, "triton": 1}, (9, 11, 11)),
    "paired LSTM": ({"kind": "LSTM", "plan": "onnxruntime"}, {"mm": 2, "triton": 1}, (12, 14, 14)),
    "paired GRU": ({"kind": "GRU", "plan": "onnxruntime"}, {"mm": 1, "addmm": 1, "triton": 1}, (10, 14, 14)),
    "split LSTM": ({"kind": "LSTM", "plan": "npu"}, {"mm": 4, "triton": 1}, (10, 12, 12)),
    "split GRU": ({"kind": "GRU", "plan": "npu"}, {"mm": 2, "addmm": 1, "triton": 1}, (9, 13, 13)),
}
"""For each form what is asked for, the launches of a step, and the kernels that differ, at 8, 64 and 256 steps"""


@pytest.mark.parametrize("name", FORMS)
def test_launches_and_kernels(name):
    form, per_step, expected = FORMS[name]
    assert each_step(form, 64, 256) == per_step
    kernels = tuple(counted(**form, steps=steps)["kernels"] for steps in (8, 64, 256))
    assert kernels == expected
    assert max(kernels) <= 16
