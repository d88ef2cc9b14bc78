"""The tables of docs/runtimes.md are those of the results, and no preset is worse than the page says."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from benchmarks.runtimes_table import BEGIN, END, PAGE, RESULTS, cell, page
from tests.runtimes.models import MODELS
from tests.runtimes.runners import RUNTIMES

SAVED = json.loads(RESULTS.read_text())


def test_tables_are_drawn_from_the_results():
    text = PAGE.read_text()
    assert page(text, SAVED) == text
    assert page(text.split(BEGIN)[0] + BEGIN + END + text.split(END)[1], SAVED) == text


@pytest.mark.parametrize("name", RUNTIMES)
def test_each_preset_is_right_for_nine_models(name):
    runtime = RUNTIMES[name]
    rows = [row for row in SAVED["rows"] if row["runtime"] == name]
    files = Counter(row["file"] for row in rows)
    assert set(files) == {"native", runtime.preset, *runtime.plans} and set(files.values()) == {len(MODELS)}
    cells = {row["model"]: cell(row, runtime) for row in rows if row["file"] == runtime.preset}
    failing = {model for model, told in cells.items() if told not in ("right", "converts")}
    assert failing == set(runtime.missing)
    assert runtime.preset == "default" or len(failing) <= 2  # a preset is named for its runtime
