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
            told = f"**`{file}`**" if file == runtime.preset else f"`{file}`" if file != "native" else file
            lines.append(f"| {title} | {told} | {' | '.join(cells[model] for model in models)} |")
    return lines


def products(saved: dict[str, Any]) -> list[str]:
    """Return a line for each quantizer and file: how many of its products are of eight bits."""
    rows = [row for row in saved["rows"] if RUNTIMES[row["runtime"]].products]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| products of eight bits | file | {' | '.join(models)} |", "|---" * (len(models) + 2) + "|"]
    for name, file in dict.fromkeys((row["runtime"], row["file"]) for row in rows):
        mine = {row["model"]: row for row in rows if (row["runtime"], row["file"]) == (name, file)}
        told = [f"{r['int8']} of {r['products']}" if "int8" in (r := mine[model]) else "" for model in models]
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


def page(text: str, saved: dict[str, Any]) -> str:
    """Return the page with its tables drawn anew."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + "\n".join([*table(saved), "", *notes(saved), "", *products(saved), ""]) + END + after


def draw() -> None:
    PAGE.write_text(page(PAGE.read_text(), json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    draw()
