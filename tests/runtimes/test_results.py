"""Eleven models, native and unrolled, in each runtime that is installed: right, or failing, as in docs/runtimes.md."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from benchmarks.runtimes import measure, write
from benchmarks.runtimes_table import RESULTS, cell
from tests.runtimes.models import MODELS, NATIVE
from tests.runtimes.runners import RUNTIMES

SAVED = {(row["runtime"], row["model"], row["file"]): row for row in json.loads(RESULTS.read_text())["rows"]}

pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # those of the runtimes are theirs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("native", [False, True], ids=["preset", NATIVE])
@pytest.mark.parametrize("name", [name for name, runtime in RUNTIMES.items() if not runtime.apart])
def test_results_are_those_of_the_table(name, native, model, tmp_path):
    runtime = RUNTIMES[name]
    if find_spec(runtime.package) is None:
        pytest.skip(f"{runtime.package} is not installed")
    file = NATIVE if native else runtime.preset
    path = tmp_path / f"{file}{runtime.suffix}"
    write(model, path)
    found, saved = measure(runtime, path), SAVED[name, model.name, file]
    told = [
        (cell(row, runtime), *(row.get(key) for key in ("stage", "recurrent", "taken", "products")))
        for row in (found, saved)
    ]
    assert told[0] == told[1], found
    assert native or not found.get("recurrent")
