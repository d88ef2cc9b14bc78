"""What `make test` runs, on every version that the project names: one environment after the other, and a page of it.

    python tests/versions.py [NAME ...] [--keep] [-- arguments of pytest]

`make versions` calls it. Each environment is built with the Python of its name, `python3.12` on the path, holds
gigabytes if the index has no CPU build of its PyTorch, and is removed after its run. Results are kept row by row in
benchmarks/results/versions.json, from which docs/versions.md is written, so that a run may go on another day.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/versions.json"
PAGE = ROOT / "docs/versions.md"
MARKS = "not heavy and not runtimes"
"""What is left out, as in the Makefile: it wants environments of its own"""
PACKAGES = ("torch", "numpy", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


class Environment(NamedTuple):
    """Versions to run on."""

    python: str
    pins: tuple[str, ...]
    """What pip is asked for first, PyTorch among it"""


OLDEST = ("onnx==1.22.0", "onnx-ir==1.0.0", "onnxscript==0.7.0", "onnxruntime==1.26.0")
"""The oldest that pyproject.toml takes"""

ENVIRONMENTS = {
    "torch-2.11": Environment("3.11", ("torch==2.11.0",)),
    "torch-2.12": Environment("3.11", ("torch==2.12.1",)),
    "torch-2.13": Environment("3.11", ("torch==2.13.0",)),
    "newest": Environment("3.11", ("torch",)),
    "torch-2.11-python-3.12": Environment("3.12", ("torch==2.11.0",)),
    "newest-python-3.13": Environment("3.13", ("torch",)),
    "oldest-onnx": Environment("3.11", ("torch==2.13.0", *OLDEST)),
}


def build(environment: Environment, folder: Path) -> Path:
    """Make a virtual environment with the package and its tests' needs, and return its Python."""
    found = shutil.which(f"python{environment.python}")
    if found is None:
        raise SystemExit(f"python{environment.python} is not on the path")
    subprocess.run([found, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "pip>=25.1"], check=True)
    subprocess.run([*pip, *environment.pins], check=True)
    held = folder / "held.txt"  # the rest is not to bring another PyTorch
    held.write_text("\n".join([f"torch=={version_of(python, 'torch')}", *environment.pins[1:]]))
    subprocess.run([*pip, "-c", held, "--group", "test", "-e", ".[bench]"], check=True, cwd=ROOT)
    return python


def version_of(python: Path, package: str) -> str:
    """Return the version of an installed package."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(python: Path, folder: Path, more: list[str]) -> dict:
    """Run the tests and return the row of the table."""
    report, began = folder / "report.xml", time.monotonic()
    pytest = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-m", MARKS, f"--junitxml={report}", *more]
    subprocess.run(pytest, cwd=ROOT, check=False)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = Counter(case.find("skipped").get("message", "") for case in cases if case.find("skipped") is not None)
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return {
        "python": version_of_python(python),
        "versions": {package: version_of(python, package) for package in PACKAGES},
        "passed": len(cases) - len(bad) - skipped.total(),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in bad),
        "skipped": dict(skipped.most_common()),
        "arguments": more,
        "seconds": round(time.monotonic() - began),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.platform(),
    }


def version_of_python(python: Path) -> str:
    """Return the version of an interpreter."""
    code = "import platform; print(platform.python_version())"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def page(results: dict) -> str:
    """Return the page of a set of results."""
    head = [
        "# Versions",
        "",
        "What `make test` runs, on the versions that `pyproject.toml` takes, or only the tests named in a row.",
        "`make versions` builds each environment, runs it and writes this page from",
        "[versions.json](../benchmarks/results/versions.json), where all versions, each reason to skip and the machine",
        "stand. Environments without a row were not run.",
        "",
        "| Python | torch | onnx | onnxscript | ONNX Runtime | passed | failed | skipped | minutes | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows, failed = [], []
    for name, row in results.items():
        versions = row["versions"]
        cells = [row["python"], *(versions[p] for p in ("torch", "onnx", "onnxscript", "onnxruntime"))]
        cells += [f"{row['passed']:,}", len(row["failed"]), f"{sum(row['skipped'].values()):,}"]
        cells += [round(row["seconds"] / 60), row["date"]]
        if row["arguments"]:
            cells[5] = f"{cells[5]} (`{' '.join(row['arguments'])}`)"
        rows.append("| " + " | ".join(map(str, cells)) + " |")
        failed += [f"- {name}: `{case}`" for case in row["failed"]]
    missing = [name for name in ENVIRONMENTS if name not in results]
    tail = ["", f"Not run yet: {', '.join(missing)}."] if missing else []
    return "\n".join([*head, *rows, *(["", "Failed:", "", *failed] if failed else []), *tail, ""])


def main() -> None:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ENVIRONMENTS)}; all if none is given")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    arguments, more = parser.parse_known_args()
    for name in arguments.names or ENVIRONMENTS:
        if name not in ENVIRONMENTS:
            parser.error(f"{name} is none of {', '.join(ENVIRONMENTS)}")
        folder = arguments.folder / name
        python = folder / "bin/python"
        if not python.exists():
            python = build(ENVIRONMENTS[name], folder)
        row = run(python, folder, [part for part in more if part != "--"])
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = row
        results = {known: results[known] for known in ENVIRONMENTS if known in results}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(page(results))
        if not arguments.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
