"""All that is to be known of a card that one has for minutes: `make gpu`.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 9 --output build/gpu
    UNROLL_TEST_DEVICE=cpu PYTHONPATH=. python benchmarks/gpu.py   # tries all of it on a few cases, without a card

Parts in order of worth, each with its share of the minutes; what one leaves goes to the next. The result of each lies
in the folder as it comes: of tests a line of JSON each, a failure with its traceback, and of forms what
benchmarks/gpu_rows.py writes. Needs PyTorch for the card, NumPy and pytest; pytest-xdist where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch

from unroll.bench.machine import machine
from unroll.bench.results import Measurements, Row, by_subject, is_wrong
from unroll.bench.subjects import Subject
from unroll.reports import align

DEVICE = os.environ.get("UNROLL_TEST_DEVICE", "cuda")
ROOT = Path(__file__).parents[1]
GRID = ["tests/gpu/test_results.py", "tests/gpu/test_uses.py", "tests/gpu/test_onnxruntime.py"]

# Nothing that happens to be installed may stop them: a plugin that warns, or a warning of another library.
FILTERS = [
    "default",
    r"error:::(unroll|tests|torch)\b",
    "ignore:The tensor attributes .*_flat_weights:UserWarning",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*torch.jit:DeprecationWarning",
]
PYTEST = ["-m", "pytest", "-m", "gpu", "-rs", "-p", "no:benchmark", "-p", "no:cacheprovider", "--tb=short"]
PYTEST += ["-o", "filterwarnings=" + "\n".join(FILTERS)]


def command_of(files: list[str], jobs: int, rehearsed: str) -> list[str]:
    """Return the command for tests; `rehearsed` says which of them run on a CPU, all if it is empty."""
    spread = ["-n", str(jobs)] if jobs > 1 and find_spec("xdist") else []
    chosen = ["-k", rehearsed] if DEVICE == "cpu" and rehearsed else []
    return [sys.executable, *PYTEST, *spread, *chosen, *files]


def parts(jobs: int, output: Path) -> list[tuple[str, float, list[str]]]:
    """Return each part: its name, its share of the minutes, its command, without the minutes of the last."""
    rows = [sys.executable, "benchmarks/gpu_rows.py", "--device", DEVICE, "--output", str(output / "rows.json")]
    rows += ["--jobs", str(jobs)] if DEVICE == "cuda" else ["--jobs", "2", "--steps", "8"]
    return [
        ("smoke", 0.1, command_of(["tests/gpu/test_smoke.py"], min(jobs, 6), "")),
        ("grid", 0.2, command_of(GRID, jobs, "float64 or autocast or refused")),
        ("compiled", 0.22, command_of(["tests/gpu/test_compiled.py"], jobs, "without_gradients and GRU")),
        ("rows", 0.45, rows),
    ]


def run(command: list[str], name: str, output: Path, seconds: float) -> str:
    """Run one part for so long at most; its log and its reports lie in the folder. Return how it ended."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "UNROLL_GPU_REPORT": str(output / f"{name}.jsonl")}
    if DEVICE == "cpu":  # vector code is no matter here, and Inductor tries the processor for it in each process
        env["TORCHINDUCTOR_VEC_ISA_OK"] = "0"
    with (output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return f"ended with {process.wait(max(seconds, 0.0))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {max(seconds, 0.0):.0f} s"


def told(name: str, output: Path) -> list[str]:
    """Return the lines of a summary about the tests of a part."""
    path = output / f"{name}.jsonl"
    reports = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    counts = Counter(report["outcome"] for report in reports)
    failed = [report for report in reports if report["outcome"] == "failed"]
    lines = [f"{name}: " + (", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "nothing was run")]
    return lines + [f"  {report['test']}: {report['text'].strip().splitlines()[-1][:120]}" for report in failed[:8]]


HEADER = ["us a step:", "cuDNN", "graph", "torch", "ours", "/cuDNN", "/graph", "floor", "busy", "launches", "kernels"]
HEADER += ["first s", "MB", "error", "cuDNN's", "plan"]
"""Columns of the summary. Times are those of a step: cuDNN as called and in a CUDA graph, PyTorch's own unrolling and
the fastest of ours, of which the rest is told; launches are those of a call, kernels those of Triton that differ"""


def floor(layer: Subject, rates: dict[str, float]) -> float | None:
    """Return the seconds that a step of a layer takes at least: its weights are read, its products are made."""
    if not rates or not layer.hidden_size or not layer.dtype:
        return None
    weights = {"LSTM": 4, "GRU": 3}.get(layer.model, 1) * layer.hidden_size**2
    moved = weights * getattr(torch, layer.dtype).itemsize / rates["copy_bytes"]
    return max(moved, 2 * (layer.batch or 1) * weights / rates[layer.dtype])


def line(layer: Subject, rows: list[Row], rates: dict[str, float]) -> list[str]:
    """Return what the summary tells of a layer, under `HEADER`; blank where there is no figure, as on a CPU."""
    layers = [f"x {layer.num_layers}"] * (layer.num_layers != 1) + ["both ways"] * bool(layer.bidirectional)
    label = f"{layer.model} {layer.hidden_size} B={layer.batch} {layer.dtype} " + " ".join(layers)
    label = f"{label.strip()}{' trained' * layer.backward}"
    ran = [row for row in rows if row.median]
    times = {row.contender: row.median for row in ran}
    mine = [row for row in ran if row.contender.startswith("unrolled") and not is_wrong(row)]
    best = min(mine, key=lambda row: row.median or 0.0, default=Row(layer, "", failure="none of ours ran"))
    cudnn, graph, torchs = (times.get(k) for k in ("eager", "eager-cudagraph", "compile-allow-rnn-cudagraphs"))
    fused = next((row.error for row in ran if row.contender == "eager"), None)

    def figure(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value * unit, form)

    step = 1e6 / (layer.steps or 1)
    seconds = [figure(t, ".2f", step) for t in (cudnn, graph, torchs, best.median)]
    ratios = [figure(best.median and t and best.median / t, ".2f") for t in (cudnn, graph)]
    counts = [figure(n, ".0f") for n in (best.launches, best.kernels)]
    lowest = [figure(floor(layer, rates), ".2f", 1e6), figure(best.busy, ".2f", step)]
    rest = [figure(best.first_call, ".1f"), figure(best.memory, ".0f", 1e-6)]
    errors = [figure(error, ".1e") for error in (best.error, fused)]
    return [label, *seconds, *ratios, *lowest, *counts, *rest, *errors, best.plan or best.failure]


def table(output: Path) -> list[str]:
    """Return a line for each layer; what did not run, and why, stands in the log of the part."""
    path = output / "rows.json"
    if not path.exists():
        return ["rows: nothing was measured"]
    rates = json.loads(path.with_suffix(".rates.json").read_text())
    layers = by_subject(Measurements.load(path).rows).items()
    return align([HEADER, *(line(layer, rows, rates) for layer, rows in layers)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes at a time")
    given = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: needs a CUDA device (UNROLL_TEST_DEVICE=cpu tries it without)")
    begin, output = time.monotonic(), given.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for old in output.glob("*.jsonl"):
        old.unlink()
    (output / "machine.json").write_text(json.dumps(machine(), indent=1) + "\n")
    due, lines = 0.0, []
    for name, share, command in parts(given.jobs, output):
        due += share
        left = given.minutes * 60 * due - (time.monotonic() - begin)
        command = [*command, "--minutes", str(left / 60)] if name == "rows" else command
        ended = run(command, name, output, left)
        lines += [*(told(name, output) if name != "rows" else table(output)), f"  {name} {ended}"]
        (output / "summary.txt").write_text("\n".join(lines) + "\n")
        print(f"{time.monotonic() - begin:4.0f} s: {name} {ended}", flush=True)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
