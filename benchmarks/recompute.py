"""Peak memory and time of a training step of long sequences: fused, unrolled, and with steps computed anew.

    python benchmarks/recompute.py                  # all of it, about ten minutes
    python benchmarks/recompute.py --steps 500      # only this number of time steps

Each form runs in a process of its own, and they take turns. The peak is what the process needed at most (`ru_maxrss`)
beyond what it had before the step. Writes benchmarks/results/recompute.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from unroll import unroll
from unroll.bench.machine import command, machine

RESULTS = Path(__file__).parent / "results" / "recompute.json"
LAYERS = {
    "LSTM": lambda: nn.LSTM(64, 128),
    "GRU": lambda: nn.GRU(64, 128),
    "BiGRU": lambda: nn.GRU(64, 128, bidirectional=True),
    "BiLSTM, two layers": lambda: nn.LSTM(64, 128, 2, bidirectional=True),
}
FORMS = ("fused", "default", "recompute=50")
BATCH = 16


def step(layer: nn.Module, x: torch.Tensor) -> float:
    """Seconds of a forward and backward pass."""
    start = time.perf_counter()
    layer(x)[0].square().mean().backward()
    return time.perf_counter() - start


def measure(kind: str, form: str, steps: int) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    layer = layer if form == "fused" else unroll(layer, plan=form)
    step(layer, torch.randn(5, BATCH, 64))
    x = torch.randn(steps, BATCH, 64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = [step(layer, x)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds[0], "peak_mb": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs="*", default=[500, 5000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help="measure one form: layer, form, steps")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], options.one[1], int(options.one[2]))))
        return
    rows = []
    for steps in options.steps:
        for kind in LAYERS:
            found: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
            for _ in range(options.rounds):
                for form in FORMS:
                    run = [sys.executable, __file__, "--one", kind, form, str(steps)]
                    done = subprocess.run(run, check=True, capture_output=True, text=True)
                    found[form].append(json.loads(done.stdout))
            row = {"layer": kind, "steps": steps, "batch": BATCH}
            row["forms"] = {
                form: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
                for form, runs in found.items()
            }
            rows.append(row)
            print(json.dumps(row))
    RESULTS.write_text(
        json.dumps({"command": command(), "machine": machine(), "threads": 1, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
