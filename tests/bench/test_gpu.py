"""The script of `make gpu`, tried without a card: it is to run to its end on the day that there is one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import HEADER, floor, line
from unroll.bench.results import Row
from unroll.bench.subjects import Subject

ROOT = Path(__file__).parents[2]
PARTS = ["smoke", "grid", "compiled", "rows"]


def rehearse(output, minutes):
    """Run all of it for so many minutes, and return what it prints."""
    env = os.environ | {"UNROLL_TEST_DEVICE": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py", "--minutes", str(minutes), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_time_cuts_off_is_told(tmp_path):
    printed = rehearse(tmp_path, 0)
    assert re.findall(r"^ +(\w+) stopped after 0 s$", printed, re.MULTILINE) == PARTS
    assert (tmp_path / "summary.txt").read_text() in printed
    assert json.loads((tmp_path / "machine.json").read_text())["versions"]["torch"] == torch.__version__


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_the_whole_of_it(tmp_path):
    printed = rehearse(tmp_path, 60)
    assert re.findall(r"^ +(\w+) ended with 0$", printed, re.MULTILINE) == PARTS
    for part in PARTS[:-1]:
        reports = [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
        passed = sum(report["outcome"] == "passed" for report in reports)
        assert passed and f"\n{part}: {passed} passed" in printed
    (row,) = (line for line in printed.splitlines() if line.startswith("LSTM 16 B=2 bfloat16"))
    assert re.search(r"default$", row), row


LAYER = Subject("LSTM", 512, 512, 1, False, True, 0, "tanh", steps=128, batch=16, dtype="bfloat16", device="cuda")
RATES = {"copy_bytes": 4e12, "bfloat16": 8e14}


def test_floor_of_a_step():
    assert floor(LAYER, RATES) == pytest.approx(4 * 512 * 512 * 2 / 4e12)
    products = Subject(**vars(LAYER) | {"batch": 1024})
    assert floor(products, RATES) == pytest.approx(2 * 1024 * 4 * 512 * 512 / 8e14)
    assert floor(LAYER, {}) is None


def test_a_line_tells_the_fastest_of_ours_that_is_right():
    rows = [
        Row(LAYER, "eager", median=2.56e-3, error=3.5e-3, dtype="bfloat16"),
        Row(LAYER, "eager-cudagraph", median=1.28e-3, error=3.5e-3, dtype="bfloat16"),
        Row(LAYER, "compile-allow-rnn-cudagraphs", failure="took too long"),
        Row(LAYER, "unrolled-cudagraphs", "default", median=1e-4, error=3.0, dtype="bfloat16"),
        Row(LAYER, "unrolled-cudagraphs", "gates=split", "", 40.0, 0.64e-3, memory=10**8, error=4e-3, launches=130,
            busy=0.32e-3, kernels=13, dtype="bfloat16"),
    ]  # fmt: skip
    told = dict(zip(HEADER, line(LAYER, rows, RATES), strict=True))
    assert told.pop("us a step:") == "LSTM 512 B=16 bfloat16"
    assert told == {
        "cuDNN": "20.00", "graph": "10.00", "torch": "", "ours": "5.00", "/cuDNN": "0.25", "/graph": "0.50",
        "floor": "0.52", "busy": "2.50", "launches": "130", "kernels": "13", "first s": "40.0", "MB": "100",
        "error": "4.0e-03", "cuDNN's": "3.5e-03", "plan": "gates=split",
    }  # fmt: skip


def test_a_line_without_any_of_ours():
    told = dict(zip(HEADER, line(LAYER, [Row(LAYER, "eager", median=2.56e-3)], {}), strict=True))
    assert told["plan"] == "none of ours ran" and told["ours"] == told["/cuDNN"] == told["floor"] == ""
