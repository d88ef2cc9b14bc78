"""All that is to be known of a card that one has for minutes: `make gpu`.

    PYTHONPATH=. python benchmarks/gpu.py --minutes 9 --output build/gpu
    UNROLL_TEST_DEVICE=cpu PYTHONPATH=. python benchmarks/gpu.py --minutes 4   # tries it, without one

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
from unroll.bench.results import Measurements, by_subject

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
        ("smoke", 0.06, command_of(["tests/gpu/test_smoke.py"], min(jobs, 6), "")),
        ("grid", 0.22, command_of(GRID, jobs, "float64 or autocast or refused")),
        ("compiled", 0.22, command_of(["tests/gpu/test_compiled.py"], jobs, "without_gradients or blocks")),
        ("rows", 0.45, rows),
    ]


def run(command: list[str], name: str, output: Path, seconds: float) -> str:
    """Run one part for so long at most; its log and its reports lie in the folder. Return how it ended."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "UNROLL_GPU_REPORT": str(output / f"{name}.jsonl")}
    with (output / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return f"ended with {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s"


def told(name: str, output: Path) -> list[str]:
    """Return the lines of a summary about the tests of a part."""
    path = output / f"{name}.jsonl"
    reports = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    counts = Counter(report["outcome"] for report in reports)
    failed = [report for report in reports if report["outcome"] == "failed"]
    lines = [f"{name}: " + (", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "nothing was run")]
    return lines + [f"  {report['test']}: {report['text'].strip().splitlines()[-1][:120]}" for report in failed[:8]]


def table(output: Path) -> list[str]:
    """Return a line for each form: microseconds a step beside those of cuDNN, launches, errors and the floor."""
    path = output / "rows.json"
    if not path.exists():
        return ["rows: nothing was measured"]
    rates, lines = json.loads(path.with_suffix(".rates.json").read_text()), []
    lines.append(f"{'':44} {'us/step':>8} {'/cuDNN':>7} {'/graph':>7} {'launch':>7} {'busy':>7} {'first s':>8} error")
    for subject, rows in by_subject(Measurements.load(path).rows).items():
        times = {row.contender: row.median for row in rows if row.median}
        size = subject.hidden_size or 1
        lines.append(str(subject))
        if rates:
            gates = {"LSTM": 4, "GRU": 3}.get(str(subject.model), 1)
            weights, width = gates * size * size, getattr(torch, subject.dtype).itemsize
            moved, made = weights * width / rates["copy_bytes"], 2 * subject.batch * weights / rates[subject.dtype]
            lines.append(f"{'  floor of a layer: weights, products':44} {max(moved, made) * 1e6:8.2f}")
        for row in rows:
            if row.failure or row.median is None:
                lines.append(f"  {row.name}: {row.failure[:100]}")
                continue
            of = [row.median / times[base] if base in times else None for base in ("eager", "eager-cudagraph")]
            ratios = " ".join(f"{value:7.2f}" if value else f"{'':7}" for value in of)
            step, busy = row.median / subject.steps * 1e6, f"{row.busy / subject.steps * 1e6:7.2f}" if row.busy else ""
            lines.append(
                f"  {row.name:42} {step:8.2f} {ratios} {row.launches or '':>7} {busy:>7} {row.first_call or 0:8.1f} "
                + (f"{row.error:.1e}" if row.error is not None else "")
            )
    return lines


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
