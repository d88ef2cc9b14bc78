"""What rewriting costs as sequences grow, and what the rewritten layers cost when nothing compiles them.

    python benchmarks/rewriting.py                  # all of it, some minutes
    python benchmarks/rewriting.py --steps 250 500  # only these numbers of time steps
    python benchmarks/rewriting.py --tiny           # to try the script itself; writes nothing
    python benchmarks/rewriting.py --show           # the tables and the picture of what was found

Writes benchmarks/results/rewriting.json, the machine, the versions, the command, and every figure, and growth.png.
Seconds are of the processor, in one thread.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch import nn

from unroll import export_onnx, trace, unroll
from unroll.bench.machine import command, machine

RESULTS = Path(__file__).parent / "results" / "rewriting.json"
STEPS = [250, 500, 1000, 2000, 4000]
STOCK_STEPS = [20, 80]  # torch's own decomposition and exporter take minutes beyond


def lstm() -> nn.Module:
    """Make an LSTM of three layers in both directions."""
    return nn.Sequential(nn.LSTM(64, 128, 3, bidirectional=True)).eval()


def graph(steps: int, folder: Path) -> Callable[[], Any]:
    traced = trace(lstm())
    return lambda: unroll(traced, steps=steps)


def program(steps: int, folder: Path) -> Callable[[], Any]:
    exported = torch.export.export(lstm(), (torch.randn(steps, 1, 64),))
    return lambda: unroll(exported)


def script(steps: int, folder: Path) -> Callable[[], Any]:
    traced = torch.jit.trace(lstm(), (torch.randn(steps, 1, 64),))
    return lambda: unroll(traced, steps=steps)


def export(steps: int, folder: Path) -> Callable[[], Any]:
    model = lstm()
    return lambda: export_onnx(model, torch.randn(steps, 1, 64), folder / "unrolled.onnx")


def file(steps: int, folder: Path) -> Callable[[], Any]:
    torch.onnx.export(lstm(), (torch.randn(steps, 1, 64),), folder / "model.onnx", dynamo=True, verbose=False)
    return lambda: unroll(folder / "model.onnx")


FRONTENDS: dict[str, Callable[[int, Path], Callable[[], Any]]] = {
    "FX graph": graph,
    "exported program": program,
    "TorchScript": script,
    "export_onnx with its checks": export,
    'unroll("model.onnx")': file,
}


def growth(frontend: str, steps: int) -> dict[str, Any]:
    """Seconds and memory of one frontend, for some steps after a run of a few, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        FRONTENDS[frontend](4, Path(folder))()  # imports and first calls
        work = FRONTENDS[frontend](steps, Path(folder))
        before, began = peak(), time.process_time()
        kept = work()
        taken = time.process_time() - began
        del kept
    return {"frontend": frontend, "steps": steps, "seconds": taken, "memory": peak() - before}


def peak() -> int:
    """Return the most bytes that this process has held so far."""
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def stock(steps: int) -> dict[str, Any]:
    """Seconds of torch's own ways to explicit steps, beside ours."""
    model, x = lstm(), torch.randn(steps, 1, 64)
    exported = torch.export.export(model, (x,))
    row: dict[str, Any] = {"steps": steps, "unroll": seconds(lambda: unroll(exported))}
    row["run_decompositions"] = seconds(exported.run_decompositions)
    unrolled = unroll(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        row["export_onnx"] = seconds(lambda: export_onnx(model, (x,), path))
        if steps <= STOCK_STEPS[0]:
            row["torch_onnx_export"] = seconds(
                lambda: torch.onnx.export(unrolled, (x,), path, dynamo=True, verbose=False)
            )
    return row


def seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def eager(kind: str, steps: int, batch: int, hidden: int, runs: int) -> dict[str, Any]:
    """Milliseconds of the fused and the unrolled layer, run in turn, and their ratio."""
    layer = getattr(nn, kind)(hidden // 2, hidden).eval()
    forms = {"fused": layer, "unrolled": unroll(layer)}
    x = torch.randn(steps, batch, hidden // 2)
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for number in range(runs + 5):
            for name, form in forms.items():
                began = time.perf_counter()
                form(x)
                if number >= 5:
                    times[name].append((time.perf_counter() - began) * 1e3)
    row: dict[str, Any] = {"kind": kind, "steps": steps, "batch": batch, "hidden": hidden}
    for name, taken in times.items():
        row[name] = {"median_ms": statistics.median(taken), "p10_ms": statistics.quantiles(taken, n=10)[0]}
    row["ratio"] = row["unrolled"]["median_ms"] / row["fused"]["median_ms"]
    return row


def shown(rows: list[dict[str, Any]]) -> str:
    """Return a table of seconds and added MB, a line for each number of steps."""
    cells = {(row["steps"], row["frontend"]): f"{row['seconds']:.1f} / {row['memory'] / 1e6:,.0f}" for row in rows}
    lines = [f"| steps | {' | '.join(FRONTENDS)} |", "|---" * (len(FRONTENDS) + 1) + "|"]
    for steps in sorted({steps for steps, _ in cells}):
        lines.append(f"| {steps:,} | {' | '.join(cells.get((steps, name), '') for name in FRONTENDS)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw seconds and added MB over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = (("seconds", 1, "seconds of processor"), ("memory", 1e6, "MB above the model"))
    ticks = sorted({row["steps"] for row in rows})
    for axes, (key, scale, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in FRONTENDS:
            points = sorted((row["steps"], row[key] / scale) for row in rows if row["frontend"] == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set(xscale="log", yscale="log", xlabel="steps", ylabel=label, xticks=ticks, xticklabels=ticks)
        axes.xaxis.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    if given.show:
        found = json.loads(RESULTS.read_text())
        print(shown(found["growth"]))
        draw(found["growth"], RESULTS.with_name("growth.png"))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"command": command(), "machine": machine(), "threads": 1, "growth": []}
    # Each in a process of its own, so that none has the memory that another left.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for steps in [8, 16] if given.tiny else given.steps:
            for frontend in FRONTENDS:
                found["growth"].append(pool.apply(growth, (frontend, steps)))
                print(found["growth"][-1], file=sys.stderr, flush=True)
    found["stock"] = [stock(steps) for steps in ([2, 3] if given.tiny else STOCK_STEPS)]
    shapes = [(1, 128), (16, 256)]
    runs = 2 if given.tiny else 30
    found["eager"] = [
        eager(kind, steps, *shape, runs) for kind in ("LSTM", "GRU", "RNN") for steps in (8, 100) for shape in shapes
    ]
    print(shown(found["growth"]))
    if not given.tiny:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        draw(found["growth"], RESULTS.with_name("growth.png"))


if __name__ == "__main__":
    main()
