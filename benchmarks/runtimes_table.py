"""Draws the tables of docs/runtimes.md from benchmarks/results/runtimes.json: `python benchmarks/runtimes_table.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.runtimes.runners import RUNTIMES
from tests.runtimes.runners.runtime import Runtime

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "runtimes.json"
PAGE = ROOT / "docs" / "runtimes.md"
BEGIN, END = "<!-- drawn by benchmarks/runtimes_table.py -->\n", "<!-- end -->\n"
STAGES = {"export": "no file", "convert": "refused", "load": "refused", "run": "fails"}

OF_PRESETS = "Where the file of the preset, in bold, is not right:"
OF_OTHERS = "Why other files are not right; the preset is what to use instead:"

Row = dict[str, Any]


def cell(row: Row, runtime: Runtime) -> str:
    if "difference" in row:
        return "right" if row["difference"] < runtime.tolerance else "**wrong**"
    return STAGES[row["stage"]] if "error" in row else "converts"


def table(saved: dict[str, Any]) -> list[str]:
    """Return a line for each runtime and file, a column for each model."""
    models = list(dict.fromkeys(row["model"] for row in saved["rows"]))
    lines = [f"| runtime | file | {' | '.join(models)} |", "|---" * (len(models) + 2) + "|"]
    for name, runtime in RUNTIMES.items():
        mine = [row for row in saved["rows"] if row["runtime"] == name]
        for file in dict.fromkeys(row["file"] for row in mine):
            cells = {row["model"]: cell(row, runtime) for row in mine if row["file"] == file}
            title = f"{runtime.name} {saved['versions'][name]}" if file == "native" else ""
            told = f"**{_told(file)}**" if file == runtime.preset else _told(file)
            lines.append(f"| {title} | {told} | {' | '.join(cells[model] for model in models)} |")
    return lines


def _told(file: str) -> str:
    return file if file == "native" else f"`{file}`"


def products(saved: dict[str, Any]) -> list[str]:
    """Return a line for each file of what takes products, a quantizer or a delegate: how many it has taken."""
    rows = [row for row in saved["rows"] if RUNTIMES[row["runtime"]].products]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| products taken | file | {' | '.join(models)} |", "|---" * (len(models) + 2) + "|"]
    for name, file in dict.fromkeys((row["runtime"], row["file"]) for row in rows):
        mine = {row["model"]: row for row in rows if (row["runtime"], row["file"]) == (name, file)}
        told = [f"{r['taken']} of {r['products']}" if "taken" in (r := mine[model]) else "" for model in models]
        lines.append(f"| {name} | `{file}` | {' | '.join(told)} |")
    return lines


def notes(saved: dict[str, Any]) -> list[str]:
    """Return a line for each cell of a preset that is not right; one without a reason is an error."""
    lines = []
    for row in saved["rows"]:
        runtime = RUNTIMES[row["runtime"]]
        if row["file"] == runtime.preset and cell(row, runtime) not in ("right", "converts"):
            why, instead = runtime.missing[row["model"]]
            lines.append(f"- {runtime.name}, {row['model']}: {why}. Instead: {instead}.")
    return lines


def others(saved: dict[str, Any]) -> list[str]:
    """Return a line for each other file that is not right for all models; one without a reason is an error."""
    lines = []
    for name, file in dict.fromkeys((row["runtime"], row["file"]) for row in saved["rows"]):
        runtime, wrong = RUNTIMES[name], {row["model"] for row in saved["rows"] if _fails(row, name, file)}
        if file != runtime.preset and wrong - {*runtime.missing}:
            lines.append(f"- {runtime.name}, {_told(file)}: {runtime.others[file]}.")
    return lines


def _fails(row: Row, name: str, file: str) -> bool:
    """Tell whether a row is of this file, and not right where there is a file."""
    told = cell(row, RUNTIMES[name])
    return (row["runtime"], row["file"]) == (name, file) and told not in ("right", "converts", STAGES["export"])


def summary(saved: dict[str, Any]) -> list[str]:
    """Return a line for each runtime: how many models are right, native and by its preset."""
    lines = ["| runtime | native | preset | right |", "|---" * 4 + "|"]
    for name, runtime in RUNTIMES.items():
        mine = [row for row in saved["rows"] if row["runtime"] == name]
        told = [[cell(row, runtime) for row in mine if row["file"] == file] for file in ("native", runtime.preset)]
        native, preset = (sum(c in ("right", "converts") for c in cells) for cells in told)
        lines.append(f"| {runtime.name} | {native} | `{runtime.preset}` | {preset} of {len(told[1])} |")
    return lines


def page(text: str, saved: dict[str, Any]) -> str:
    """Return the page with its tables drawn anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    parts = [summary(saved), table(saved), [OF_PRESETS], notes(saved), [OF_OTHERS], others(saved), products(saved)]
    return before + BEGIN + "".join("\n".join([*part, "", ""]) for part in parts)[:-1] + END + after


def draw() -> None:
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    draw()
