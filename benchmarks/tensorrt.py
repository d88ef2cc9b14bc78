"""Engines that TensorRT for RTX builds of every plan, without a GPU: layers, seconds to build, and bytes.

Seconds of processor are told, which other work on the machine changes less than those of a clock.

    python benchmarks/tensorrt.py           # goes on where it stopped
    python benchmarks/tensorrt.py --tiny    # everything at toy sizes, to try the script itself
    python benchmarks/tensorrt.py --show    # prints the tables and draws the picture of what was measured

With the environment of `make test-runtimes`, or another that has TensorRT for RTX; the picture wants matplotlib too.
Each engine is built once, by `build_engine`, which ends what takes longer than --limit seconds. Writes
benchmarks/results/tensorrt.json and tensorrt.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unroll import UnrollError, export_onnx
from unroll.bench.machine import command, machine
from unroll.targets.building import build_engine

RESULTS = Path(__file__).parent / "results" / "tensorrt.json"
OPERATOR = "operator"
"""Stands for the file that keeps the LSTM operator, as PyTorch's exporter writes it"""

BOTH_WAYS = ("default", "time=4", "time=8", "time=16", "time=32", "directions=stacked", "gates=paired", "gates=split")
ONE_WAY = ("default", "layers=wavefront", "time=8", "products=sums")
SUBJECTS = {
    "LSTM, two layers both ways, 8 → 16": ({"num_layers": 2, "bidirectional": True}, (OPERATOR, *BOTH_WAYS)),
    "LSTM, two layers one way, 8 → 16": ({"num_layers": 2}, (OPERATOR, *ONE_WAY)),
}
STEPS = (16, 64, 200, 1000)
FAST = ("time", OPERATOR)
"""Beginnings of what does not grow with the steps, and is always tried"""


def build(subject: str, plan: str, steps: int, limit: float) -> dict[str, Any]:
    """Build one engine; `failure` says why there is none."""
    options, _ = SUBJECTS[subject]
    model, x = nn.LSTM(8, 16, **options).eval(), torch.zeros(steps, 1, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if plan == OPERATOR:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(model, (x,), path, dynamo=False)
        else:
            export_onnx(model, x, path, plan=plan, check=False)
        try:
            return build_engine(path, limit=limit).as_dict()
        except UnrollError as error:
            return {"failure": error.problems[0].finding}


def too_long(rows: list[dict[str, Any]], row: dict[str, Any], limit: float) -> str:
    """Say why a number of steps is not tried, if fewer steps tell that it takes longer than the limit."""
    if row["plan"].startswith(FAST):
        return ""
    for other in rows:
        if (other["subject"], other["plan"]) == (row["subject"], row["plan"]) and other["steps"] < row["steps"]:
            factor = row["steps"] / other["steps"]
            if "failure" in other or other["seconds"] * factor > limit:
                took = other.get("failure") or f"took {other['seconds']:.0f} s"
                return f"not tried: T={other['steps']} {took}"
    return ""


def shown(rows: list[dict[str, Any]]) -> str:
    """Tables of Markdown: for each plan and number of steps layers, seconds of processor, and MB."""
    lines = []
    for subject in dict.fromkeys(row["subject"] for row in rows):
        here = [row for row in rows if row["subject"] == subject]
        steps = list(dict.fromkeys(row["steps"] for row in here))
        heads = " | ".join(f"T={t}" for t in sorted(steps))
        lines += [
            f"\n{subject}: layers / seconds of processor / MB\n",
            f"| plan | {heads} |",
            "|---" * (len(steps) + 1) + "|",
        ]
        found = {(row["plan"], row["steps"]): row for row in here}
        for plan in dict.fromkeys(row["plan"] for row in here):
            cells = []
            for t in sorted(steps):
                row = found.get((plan, t), {"failure": ""})
                text = (
                    f"{row['layers']:,} / {row['processor_seconds']:.1f} / {row['size'] / 1e6:.1f}"
                    if "size" in row
                    else ""
                )
                cells.append(text or row["failure"])
            lines.append(f"| {plan} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and MB over the steps, for the first subject."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    here = [row for row in rows if row["subject"] == next(iter(SUBJECTS)) and "size" in row]
    for axes, (key, scale, label) in zip(
        figure.subplots(1, 2),
        (("processor_seconds", 1, "seconds of processor to build"), ("size", 1e6, "MB of engine")),
        strict=True,
    ):
        for plan in dict.fromkeys(row["plan"] for row in here):
            points = sorted((row["steps"], row[key] / scale) for row in here if row["plan"] == plan)
            axes.plot(*zip(*points, strict=True), marker="o", label=plan)
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=label, xticks=STEPS, xticklabels=STEPS)
        axes.xaxis.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which a build is ended")
    given = parser.parse_args()
    saved = RESULTS.exists() and not given.tiny
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if saved else []
    done = {(row["subject"], row["plan"], row["steps"]) for row in rows}
    for steps in () if given.show else (3, 5) if given.tiny else STEPS:
        for subject, (_, plans) in SUBJECTS.items():
            for plan in plans:
                if (subject, plan, steps) in done:
                    continue
                row: dict[str, Any] = {"subject": subject, "plan": plan, "steps": steps}
                why = too_long(rows, row, given.limit)
                row |= {"failure": why} if why else build(subject, plan, steps, given.limit)
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
                if not given.tiny:
                    told = {"machine": machine(), "command": command(), "limit": given.limit, "rows": rows}
                    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    print(shown(rows))
    if not given.tiny:
        draw(rows, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
