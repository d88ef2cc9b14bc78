"""The layers of docs/gpu.md on one card: cuDNN, PyTorch's own unrolling and ours in each plan, under CUDA graphs.

    PYTHONPATH=. python benchmarks/gpu_rows.py --minutes 4 --output rows.json   # goes on where the file ends

A part of `make gpu`. Needs PyTorch and nothing else. Forms are compiled at once, in processes of their own, and timed
one at a time; the file is written after each batch of layers, the first of the list first, and what is in it is not
measured again, unless the machine or the versions are others.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unroll.bench.machine import command, machine
from unroll.bench.measuring import Entry, Method, measure
from unroll.bench.results import Measurements
from unroll.bench.subjects import Subject
from unroll.core.plan import Plan

MARGIN = 1.3
"""A batch is begun if this many times what the longest took is left."""

ONE = "gates=split,products=sums"
HALF, WHOLE = "bfloat16", "float32"

# Kind, hidden size, batch, type; then layers, whether it has two directions, whether it is trained. The persistent
# kernels of cuDNN are in the rows of float16 and of H=128.
ROWS: list[tuple[tuple[Any, ...], list[str]]] = [
    (("LSTM", 512, 1, HALF), [ONE, "default"]),
    (("LSTM", 512, 16, HALF), ["default"]),
    (("LSTM", 512, 64, HALF), ["default"]),
    (("LSTM", 512, 64, HALF, 1, False, True), ["gradients=joined", "gradients=stepwise"]),
    (("GRU", 512, 16, HALF), ["default"]),
    (("LSTM", 512, 16, HALF, 1, True), ["directions=stacked", "default"]),
    (("LSTM", 512, 16, HALF, 3), ["layers=wavefront", "default"]),
    (("LSTM", 1024, 16, HALF), ["default"]),
    (("LSTM", 1024, 1, WHOLE), [ONE, "default"]),
    (("LSTM", 512, 16, "float16"), ["default"]),
    (("LSTM", 128, 1, WHOLE), [ONE, "default"]),
    (("GRU", 128, 1, WHOLE), [ONE, "default"]),
    (("LSTM", 256, 32, WHOLE, 1, False, True), ["gradients=joined", "gradients=stepwise"]),
    (("LSTM", 512, 4, HALF), [ONE, "default"]),
    (("GRU", 512, 1, HALF), [ONE, "default"]),
    (("RNN", 512, 1, HALF), [ONE, "default"]),
    (("LSTM", 512, 1, HALF, 1, True), [ONE, f"{ONE},directions=stacked"]),
    (("LSTM", 512, 16, WHOLE), ["default"]),
]
"""The layers in order of worth, each with its plans"""


def subject(
    device: str,
    steps: int,
    kind: str,
    hidden: int,
    batch: int,
    dtype: str,
    layers: int = 1,
    both: bool = False,
    backward: bool = False,
) -> Subject:
    """Return the layer of a row; half as many steps where it has more passes than one."""
    return Subject(
        kind,
        input_size=hidden,
        hidden_size=hidden,
        num_layers=layers,
        bidirectional=both,
        bias=True,
        proj_size=0,
        nonlinearity="tanh",
        steps=steps // 2 if layers > 1 or both or backward else steps,
        batch=batch,
        dtype=dtype,
        device=device,
        backward=backward,
    )


def work(device: str, steps: int) -> list[tuple[Subject, list[Entry]]]:
    """Return each layer with its forms; on a CPU, to try this, those that it has."""
    on_gpu = device == "cuda"
    others = [Entry("eager")]
    others += [Entry("eager-cudagraph"), Entry("compile-allow-rnn-cudagraphs")] if on_gpu else []
    ours = "unrolled-cudagraphs" if on_gpu else "unrolled-compile"
    rows = ROWS if on_gpu else ROWS[1:2]
    small = {} if on_gpu else {"input_size": 16, "hidden_size": 16, "batch": 2}
    return [
        (replace(subject(device, steps, *row), **small), others + [Entry(ours, plan, Plan.of(plan)) for plan in plans])
        for row, plans in rows
    ]


def rates(device: str) -> dict[str, float]:
    """Measure what bounds a step from below: bytes a second of a copy, operations a second of a product."""
    if device != "cuda":
        return {}

    def seconds(run: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            run()
        begin.record()
        for _ in range(10):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-4

    source = torch.empty(1 << 29, dtype=torch.bfloat16, device=device)
    target, size = torch.empty_like(source), 8192
    found = {"copy_bytes": 2 * source.nbytes / seconds(lambda: target.copy_(source))}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(size, size, device=device).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds(lambda a=a: a @ a)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--jobs", type=int, default=14, help="builds at a time")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for a build")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cpu to try the script itself")
    given = parser.parse_args()
    begin, here = time.monotonic(), machine()
    found = Measurements((), here, command())
    if given.output.exists() and (before := Measurements.load(given.output)).machine == here:
        found = before
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.with_suffix(".rates.json").write_text(json.dumps(rates(given.device), indent=1) + "\n")
    done = {(row.subject, row.contender, row.plan) for row in found.rows}
    missing = []
    for layer, entries in work(given.device, given.steps):
        if left_over := [entry for entry in entries if (layer, entry.contender, entry.plan) not in done]:
            missing.append((layer, left_over))
    method, longest = Method(rounds=5, seconds=0.05, limit=given.limit, jobs=given.jobs), 0.0
    together = max(1, given.jobs // 4)
    for start in range(0, len(missing), together):
        left = given.minutes * 60 - (time.monotonic() - begin)
        if left < MARGIN * longest:
            print(f"{left:.0f} s are left, not enough for the next layers: run it again")
            break
        batch_begin, batch = time.monotonic(), dict(missing[start : start + together])
        rows, _ = measure(batch, replace(method, limit=min(given.limit, left)))
        longest = max(longest, time.monotonic() - batch_begin)
        found = Measurements(found.rows + tuple(rows), here, found.command)
        found.save(given.output)
        print(Measurements(tuple(row for row in found.rows if row.subject in batch)), flush=True)


if __name__ == "__main__":
    main()
