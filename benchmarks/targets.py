"""What unrolled layers are to reach on a CPU with one thread, and what they reach: one table, measured in one run.

    python benchmarks/targets.py                  # all of it, about half an hour
    python benchmarks/targets.py --only compile   # the targets whose names hold a word
    python benchmarks/targets.py --tiny           # everything at toy sizes, to try the script itself

Each figure is a ratio of medians of interleaved runs. Writes benchmarks/results/targets.json: the machine, the
versions, the table, and every row that it was made of; a run of some targets alone, or a tiny one, writes only what
--output names.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unroll import trace, unroll
from unroll.bench.machine import command, machine
from unroll.bench.measuring import Entry, Method, measure
from unroll.bench.options import LAYER
from unroll.bench.results import Measurements, Row
from unroll.bench.subjects import Subject
from unroll.bench.worker import largest_memory
from unroll.core.plan import Plan

RESULTS = Path(__file__).parent / "results" / "targets.json"
LONG = (250, 500, 1000, 2000)
"""Numbers of steps at which unrolling itself is measured"""


def entry(contender: str, plan: str = "") -> Entry:
    return Entry(contender, plan, Plan.of(plan or "default"))


PAIRED, NATIVE, STOCK = entry("onnx-unrolled", "onnxruntime"), entry("onnx"), entry("onnx-decomposed")
EAGER, COMPILED, ALLOWED = entry("eager"), entry("unrolled-compile", "inductor"), entry("compile-allow-rnn")
IN_BLOCKS, BY_SUMS = entry("unrolled-compile", "time=16"), entry("unrolled-compile", "products=sums")
IN_CPP = entry("unrolled-cpp", "inductor")


@dataclass(frozen=True)
class Target:
    """One figure of a form over that of another, on one layer, and what it is to be at most."""

    name: str
    subject: Subject
    ours: Entry
    theirs: Entry
    most: float
    figure: str = "median"

    def measured(self, rows: Mapping[tuple[Subject, Entry], Row]) -> float | str:
        """The ratio, or why there is none."""
        found = [rows[self.subject, which] for which in (self.ours, self.theirs)]
        if failed := [f"{row.name} {row.failure}" for row in found if row.failure]:
            return "; ".join(failed)
        ours, theirs = (getattr(row, self.figure) for row in found)
        return ours / theirs


def layer(kind: str, input_size: int, hidden_size: int, batch: int, steps: int = 32, **options: Any) -> Subject:
    sizes = {"input_size": input_size, "hidden_size": hidden_size, "batch": batch, "steps": steps}
    return Subject(kind, **LAYER | sizes | options)


def targets() -> list[Target]:
    found = [
        Target("ORT against native LSTM, B=1, H=128", layer("LSTM", 64, 128, 1), PAIRED, NATIVE, 2.0),
        Target("ORT against native LSTM, B=16, H=256", layer("LSTM", 128, 256, 16), PAIRED, NATIVE, 1.1),
        Target("ORT against native LSTM, B=32, H=512", layer("LSTM", 512, 512, 32), PAIRED, NATIVE, 1.0),
        Target("ORT against native GRU, B=16, H=256", layer("GRU", 128, 256, 16), PAIRED, NATIVE, 1.05),
    ]
    found += [
        Target(f"ORT against PyTorch's decomposition, {kind}", layer(kind, 64, 128, 1), PAIRED, STOCK, 1 / 1.3)
        for kind in ("LSTM", "GRU", "RNN")
    ]
    found += [
        Target(f"ORT against eager nn.{kind}, H={hidden}", layer(kind, 64, hidden, 1), PAIRED, EAGER, 1.0)
        for kind in ("GRU", "RNN")
        for hidden in (64, 128, 256, 512)
    ]
    found += [
        Target(f"Inductor against eager nn.{kind}, B={batch}", layer(kind, 64, 128, batch), COMPILED, EAGER, 1.0)
        for kind in ("GRU", "RNN")
        for batch in (1, 16)
    ]
    found += [
        Target(f"Inductor{form} against eager nn.LSTM, B=1", layer("LSTM", 64, 128, 1), ours, EAGER, 1.2)
        for form, ours in (("", COMPILED), (" by sums", BY_SUMS), (" with cpp_wrapper", IN_CPP))
    ]
    found += [
        Target(
            f"compile time {form}against allow_rnn, {kind}",
            layer(kind, 64, 128, 1, 64),
            ours,
            ALLOWED,
            0.5,
            "first_call",
        )
        for kind in ("GRU", "LSTM")
        for form, ours in (("", COMPILED), ("in blocks of 16 ", IN_BLOCKS))
    ]
    return found


def unrolling(steps: int, hidden: int) -> dict[str, float]:
    """Seconds to unroll a three-layer bidirectional LSTM, as a graph and as a program, and memory of the process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, x = (
        nn.Sequential(nn.LSTM(hidden // 2, hidden, 3, bidirectional=True)).eval(),
        torch.randn(steps, 1, hidden // 2),
    )
    unroll(trace(model), steps=2)
    graph, program = trace(model), torch.export.export(model, (x,))
    unroll(torch.export.export(model, (x[:2],)))

    def seconds(function: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return {
        "steps": steps,
        "graph": seconds(lambda: unroll(graph, steps=steps)),
        "program": seconds(lambda: unroll(program)),
        "memory": largest_memory(),
    }


def apart(steps: int, hidden: int) -> dict[str, float]:
    """`unrolling` in a process of its own."""
    asked = [sys.executable, __file__, "--unrolling", str(steps), str(hidden)]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def scaling(found: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The lines of the table that unrolling itself gives."""
    by_steps = {int(row["steps"]): row for row in found}
    short, long = min(by_steps), max(by_steps)
    lines = [
        {
            "target": f"seconds a step of the {kind}, T={long} against T={short}",
            "at most": 1.25,
            "measured": by_steps[long][kind] / long / (by_steps[short][kind] / short),
        }
        for kind in ("graph", "program")
    ]
    middle = sorted(by_steps)[-2]
    lines.append({"target": f"GB of memory, T={middle}", "at most": 2.0, "measured": by_steps[middle]["memory"] / 1e9})
    return lines


def judged(line: dict[str, Any]) -> dict[str, Any]:
    measured = line["measured"]
    return line | {"met": isinstance(measured, float) and measured <= line["at most"]}


def shown(lines: list[dict[str, Any]]) -> str:
    width = max(len(line["target"]) for line in lines)
    text = [f"{'target':{width}}  at most  measured"]
    for line in lines:
        measured = line["measured"]
        figure = f"{measured:8.3f}" if isinstance(measured, float) else str(measured)
        text.append(
            f"{line['target']:{width}}  {line['at most']:7.2f}  {figure}  {'met' if line['met'] else 'NOT met'}"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="targets whose names hold this word")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for a build")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="by default benchmarks/results/targets.json, for a whole run")
    parser.add_argument("--unrolling", type=int, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.unrolling:
        print(json.dumps(unrolling(*given.unrolling)))
        return
    chosen = [target for target in targets() if given.only in target.name]
    if given.tiny:
        chosen = [replace(t, subject=replace(t.subject, hidden_size=8, input_size=4, steps=3)) for t in chosen]
    work: dict[Subject, list[Entry]] = {}
    for target in chosen:
        entries = work.setdefault(target.subject, [])
        entries += [which for which in (target.ours, target.theirs) if which not in entries]
    method = Method(given.rounds, 0.02 if given.tiny else 0.2, given.limit)
    rows: dict[tuple[Subject, Entry], Row] = {}
    for number, (subject, entries) in enumerate(work.items()):
        print(f"{number + 1} of {len(work)}: {subject}", file=sys.stderr, flush=True)
        made, _ = measure({subject: entries}, method)
        rows |= {(subject, which): row for which, row in zip(entries, made, strict=True)}
    lines = [{"target": t.name, "at most": t.most, "measured": t.measured(rows)} for t in chosen]
    sizes = [] if given.only and given.only not in "unrolling" else [10, 20, 40] if given.tiny else LONG
    grown = [apart(steps, 8 if given.tiny else 128) for steps in sizes]
    lines = [judged(line) for line in lines + (scaling(grown) if grown else [])]
    print(shown(lines))
    found = Measurements(tuple(rows.values()), machine(), command())
    output = given.output or (None if given.tiny or given.only else RESULTS)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found.as_dict() | {"targets": lines, "unrolling": grown}, indent=1) + "\n")


if __name__ == "__main__":
    main()
