"""The example's page, in Chromium."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtimes.runners.browser import MODULES

pytestmark = pytest.mark.runtimes

EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))


@pytest.mark.skipif(not shutil.which("node") or not CHROMIUM.exists(), reason="node or Chromium is not installed")
@pytest.mark.skipif(not (MODULES / "playwright-core").exists(), reason="UNROLL_NODE_MODULES has no playwright-core")
@pytest.mark.parametrize("button", ["run", "listen"])
def test_the_page_of_the_example(button, tmp_path):
    picture = tmp_path / "page.png"
    make = [sys.executable, EXAMPLE / "make_page.py", tmp_path / "page", "--modules", MODULES]
    subprocess.run(make, check=True, capture_output=True, timeout=300)
    look = ["node", EXAMPLE / "look.mjs", tmp_path / "page", MODULES, picture, button]
    done = subprocess.run(look, check=True, capture_output=True, text=True, timeout=300)
    rows = json.loads(done.stdout)["rows"]
    files = ("native.onnx", "unrolled.onnx")
    assert [(row["provider"], row["file"]) for row in rows] == [(p, f) for p in ("wasm", "webgpu") for f in files]
    for row in rows:
        assert row["pieces"] == 187 and row["difference"] < 1e-5
    assert picture.stat().st_size > 20_000
