"""Every plan of a layer against the others, in ONNX Runtime and in Inductor, on a CPU with one thread.

    python benchmarks/plans.py           # about twenty minutes
    python benchmarks/plans.py --tiny    # everything at toy sizes, to try the script itself

Writes benchmarks/results/plans.json, and prints what each plan takes as a multiple of the default plan.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from unroll import Plan, benchmark
from unroll.bench.machine import command, machine
from unroll.bench.results import Measurements, Row
from unroll.core.plan import Directions, Gates, Layers

RESULTS = Path(__file__).parent / "results" / "plans.json"
FORMS = ["onnx-unrolled", "unrolled-compile"]
LAYERS = [
    ("LSTM", {"num_layers": 1}),
    ("LSTM", {"num_layers": 1, "bidirectional": True}),
    ("LSTM", {"num_layers": 3}),
    ("GRU", {"num_layers": 1}),
]


def plans(*, num_layers: int, bidirectional: bool = False) -> Iterator[Plan]:
    """Those that differ for a layer."""
    directions = get_args(Directions) if bidirectional else ["separate"]
    layers = get_args(Layers) if num_layers > 1 and not bidirectional else ["sequential"]
    for order in itertools.product(get_args(Gates), directions, layers):
        yield Plan(*order)
    yield Plan(products="sums")


def shown(rows: list[Row]) -> str:
    """A line for each plan: milliseconds and the multiple of the default plan, for each form and batch."""
    lines = []
    subjects = list(dict.fromkeys(replace(row.subject, batch=None) for row in rows))
    for subject in subjects:
        here = [row for row in rows if replace(row.subject, batch=None) == subject]
        columns = list(dict.fromkeys((row.contender, row.subject.batch) for row in here))
        heads = [f"{form} B={batch}" for form, batch in columns]
        lines += [f"{subject.model}, layers {subject.num_layers}, bidirectional {subject.bidirectional}"]
        lines += [f"{'':40}" + "".join(f"{head:>24}" for head in heads)]
        found = {(row.plan, row.contender, row.subject.batch): row for row in here}
        for plan in dict.fromkeys(row.plan for row in here):
            cells = []
            for column in columns:
                row, default = found[plan, *column], found["default", *column]
                failed = row.failure or default.failure
                cells.append(failed[:22] or f"{1e3 * row.median:.2f} ms {row.median / default.median:6.2f}")
            lines.append(f"{plan:40}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    sizes = {"input_size": 4, "hidden_size": 8, "steps": 3} if given.tiny else {"steps": 32}
    rows: list[Row] = []
    for kind, layer in LAYERS:
        print(f"{kind} {layer}", file=sys.stderr, flush=True)
        chosen = list(plans(**layer))
        found = benchmark(kind, contenders=FORMS, plans=chosen, batch=[1, 16], jobs=2, limit=300, **layer, **sizes)
        rows += found.rows
        if not given.tiny:
            Measurements(tuple(rows), machine(), command()).save(RESULTS)
    print(shown(rows))


if __name__ == "__main__":
    main()
