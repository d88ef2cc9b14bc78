"""When not to unroll: layers as PyTorch and ONNX Runtime run them, and unrolled in both, on a CPU with one thread.

    python benchmarks/forms.py            # half an hour on a machine that does nothing else
    python benchmarks/forms.py --forms eager,onnx,onnx-unrolled    # without those that take longest to build
    python benchmarks/forms.py --tiny     # everything at toy sizes, to try the script itself
    python benchmarks/forms.py --drawn    # only print and draw what was found before

Writes benchmarks/results/forms.json after each shape, and prints the table of docs/benchmark.md: milliseconds of the
fastest tenth of the calls, and of the median. Draws the layers with a batch of one.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from unroll.bench.machine import command, machine
from unroll.bench.measuring import Entry, Method, measure
from unroll.bench.plots import draw
from unroll.bench.results import Measurements, Row, by_subject
from unroll.bench.subjects import LAYER, Subject
from unroll.core.plan import Plan

RESULTS = Path(__file__).parent / "results" / "forms.json"
FORMS = {
    "eager": Entry("eager"),
    "ONNX Runtime's operator": Entry("onnx"),
    "unrolled in ONNX Runtime": Entry("onnx-unrolled", "onnxruntime", Plan.of("onnxruntime")),
    "unrolled by Inductor": Entry("unrolled-compile", "inductor", Plan.of("inductor")),
    "unrolled by AOTInductor": Entry("unrolled-aoti", "inductor", Plan.of("inductor")),
}


def subjects(*, tiny: bool) -> list[Subject]:
    """Each kind of layer at each size."""
    hidden_sizes, steps = ((4, 8), 3) if tiny else ((128, 256, 64), 32)
    found = []
    for hidden, batch, kind in itertools.product(hidden_sizes, (1, 16), ("LSTM", "GRU", "RNN")):
        sizes: dict[str, Any] = {"input_size": 64, "hidden_size": hidden, "batch": batch, "steps": steps}
        found.append(Subject(kind, **LAYER | sizes))
    return found


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def cell(row: Row, rows: list[Row]) -> str:
    """Fastest tenth and median in milliseconds, bold where the former is within 5 % of the best."""
    if row.failure or row.p10 is None or row.median is None:
        return row.failure or "none"
    best = min(other.p10 for other in rows if other.p10)
    shown = milliseconds(row.p10)
    return f"{f'**{shown}**' if row.p10 <= 1.05 * best else shown} ({milliseconds(row.median)})"


def table(found: Measurements) -> str:
    """A line for each layer, in the order of kinds, batches and sizes."""
    measured = {row.contender for row in found.rows}
    forms = {name: entry.contender for name, entry in FORMS.items() if entry.contender in measured}
    lines = [f"| layer | {' | '.join(forms)} |", "|---" * (len(forms) + 1) + "|"]
    kinds = ("LSTM", "GRU", "RNN")
    groups = sorted(
        by_subject(found.rows).items(),
        key=lambda item: (kinds.index(item[0].model), item[0].batch, item[0].hidden_size),
    )
    for subject, rows in groups:
        by_form = {row.contender: row for row in rows}
        cells = [cell(by_form[form], rows) for form in forms.values()]
        lines.append(f"| {subject.model}, B={subject.batch}, H={subject.hidden_size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: Measurements) -> None:
    """Draw the latency of each kind against the hidden size at B=1, where other work disturbs medians the least."""
    with tempfile.TemporaryDirectory() as folder:
        latency, *_ = draw(Measurements(tuple(row for row in found.rows if row.subject.batch == 1)), folder)
        shutil.copyfile(latency, RESULTS.with_name("forms.png"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--drawn", action="store_true", help="only print and draw what was found before")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--forms", default=",".join(entry.contender for entry in FORMS.values()))
    given = parser.parse_args()
    if given.drawn:
        found = Measurements.load(RESULTS)
        print(table(found))
        picture(found)
        return
    method = Method(3, 0.02, 600) if given.tiny else Method(given.rounds, 0.1, 600)
    entries = [entry for entry in FORMS.values() if entry.contender in given.forms.split(",")]
    rows: list[Row] = []
    for subject in subjects(tiny=given.tiny):
        print(subject, file=sys.stderr, flush=True)
        rows += measure({subject: entries}, method)[0]
        if not given.tiny:
            Measurements(tuple(rows), machine(), command()).save(RESULTS)
    found = Measurements(tuple(rows))
    print(table(found))
    if not given.tiny:
        picture(found)


if __name__ == "__main__":
    main()
