"""cuDNN against unrolled layers under CUDA graphs: the matrix of layers that `make bench-gpu` measures.

    PYTHONPATH=. python benchmarks/gpu.py                 # ten minutes at most; goes on where it stopped
    PYTHONPATH=. python benchmarks/gpu.py --minutes 2     # as much as two minutes allow
    PYTHONPATH=. python benchmarks/gpu.py --dry           # only says what is still to be measured

Needs a GPU, PyTorch and nothing else. Writes benchmarks/results/gpu.json after each batch of layers; what is in the
file is not measured again, unless the machine or the versions are others. All layers come once with cuDNN and the plans
that change one choice, and then once more with all other plans that differ, which are held against that cuDNN.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import torch

from unroll.bench.machine import command, machine
from unroll.bench.measuring import Entry, Method, measure
from unroll.bench.results import Measurements
from unroll.bench.subjects import Subject
from unroll.core.plan import Plan

RESULTS = Path(__file__).parent / "results" / "gpu.json"
STEPS = 100
MARGIN = 1.3
"""A batch is begun if this many times what the longest took is left."""


def matrix(device: str, steps: int) -> list[Subject]:
    """All layers, those first where cuDNN runs its standard algorithm: bfloat16, stacks, two directions."""
    return [
        Subject(
            kind,
            input_size=hidden,
            hidden_size=hidden,
            num_layers=layers,
            bidirectional=both,
            bias=True,
            proj_size=0,
            nonlinearity="tanh",
            steps=steps,
            batch=batch,
            dtype=dtype,
            device=device,
        )
        for dtype, hidden, batch, layers, both, kind in itertools.product(
            ("bfloat16", "float32"), (512, 128, 1024), (16, 1, 64), (3, 1), (True, False), ("LSTM", "GRU")
        )
    ]


def plans(subject: Subject) -> tuple[list[str], list[str]]:
    """The plans that differ for a layer: those that are measured first, and the others."""
    order = "directions=stacked" if subject.bidirectional else "layers=wavefront" if subject.num_layers != 1 else None
    first, others = ["default", "gates=split"], ["gates=paired"]
    if order:
        first.append(order)
        others += [f"gates=split,{order}", f"gates=paired,{order}"]
    if subject.batch == 1:
        first.append("products=sums")
    return first, others


def work(subjects: list[Subject]) -> list[tuple[Subject, list[Entry]]]:
    """What to measure, in this order: cuDNN beside CUDA graphs of the unrolled layer in each plan."""
    first = [(subject, [Entry("eager"), *map(unrolled, plans(subject)[0])]) for subject in subjects]
    return first + [(subject, [*map(unrolled, plans(subject)[1])]) for subject in subjects]


def unrolled(plan: str) -> Entry:
    return Entry("unrolled-cudagraphs", plan, Plan.of(plan))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--jobs", type=int, default=14, help="builds at a time")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a build")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--device", default="cuda", help="cpu to try the script itself")
    given = parser.parse_args()
    begin, here = time.monotonic(), machine()
    found = Measurements((), here, command())
    if given.output.exists():
        before = Measurements.load(given.output)
        if before.machine == here:
            found = before
    done = {(row.subject, row.contender, row.plan) for row in found.rows}
    missing: list[tuple[Subject, list[Entry]]] = []
    for subject, entries in work(matrix(given.device, given.steps)):
        if left_over := [entry for entry in entries if (subject, entry.contender, entry.plan) not in done]:
            missing.append((subject, left_over))
    print(f"{len(done)} forms of layers are measured, {sum(len(entries) for _, entries in missing)} are not")
    if given.dry:
        print(*(f"{subject}: {'; '.join(map(str, entries))}" for subject, entries in missing), sep="\n")
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: needs a CUDA device")
    method, longest = Method(rounds=10, seconds=0.05, limit=given.limit, jobs=given.jobs), 0.0
    together = max(1, given.jobs // 3)
    for start in range(0, len(missing), together):
        left = given.minutes * 60 - (time.monotonic() - begin)
        if left < MARGIN * longest:
            print(f"{left:.0f} s are left, not enough for the next layers: run it again")
            break
        batch_begin = time.monotonic()
        batch: dict[Subject, list[Entry]] = {}
        for subject, entries in missing[start : start + together]:
            batch[subject] = batch.get(subject, []) + entries
        rows, _ = measure(batch, method)
        longest = max(longest, time.monotonic() - batch_begin)
        found = Measurements(found.rows + tuple(rows), here, found.command)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        found.save(given.output)
        print(Measurements(tuple(row for row in found.rows if row.subject in batch)), flush=True)


if __name__ == "__main__":
    main()
