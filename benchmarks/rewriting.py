"""What rewriting costs, and what the rewritten layers cost when nothing compiles them.

    python benchmarks/rewriting.py                 # all of it, about ten minutes
    python benchmarks/rewriting.py --steps 20 80   # only these numbers of time steps

Writes benchmarks/results/rewriting.json: the machine, the versions, the command, and every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unroll import export_onnx, trace, unroll
from unroll.bench.machine import command, machine

RESULTS = Path(__file__).parent / "results" / "rewriting.json"
STOCK_UP_TO = 80  # time steps; torch's own decomposition and exporter take minutes beyond


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def rewriting(steps: int) -> dict[str, Any]:
    """Seconds and nodes of every frontend, for a three-layer bidirectional LSTM of 128 hidden features."""
    model = nn.Sequential(nn.LSTM(64, 128, 3, bidirectional=True)).eval()
    x = torch.randn(steps, 4, 64)
    row: dict[str, Any] = {"steps": steps}

    graph = trace(model)
    row["graph_module"], found = seconds(lambda: unroll(graph, steps=steps))
    row["graph_module_nodes"] = len(found.graph.nodes)

    program = torch.export.export(model, (x,))
    row["exported_program"], found = seconds(lambda: unroll(program))
    row["exported_program_nodes"] = len(found.graph.nodes)
    if steps <= STOCK_UP_TO:
        row["run_decompositions"], found = seconds(program.run_decompositions)
        row["run_decompositions_nodes"] = len(found.graph.nodes)

    script = torch.jit.trace(model, (x,))
    row["script_module"], _ = seconds(lambda: unroll(script, steps=steps))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        row["export_onnx"], exported = seconds(lambda: export_onnx(model, (x,), path))
        row["export_onnx_parts"] = {part: round(value, 3) for part, value in exported.seconds.items()}
        row["export_onnx_bytes"] = exported.size
        row["export_onnx_nodes"] = sum(exported.operators.values())
        row["onnxruntime_session"] = seconds(lambda: session(path))[0]
        if steps <= min(STOCK_UP_TO, 20):
            unrolled = unroll(model)
            row["torch_onnx_export"], _ = seconds(
                lambda: torch.onnx.export(unrolled, (x,), path, dynamo=True, verbose=False)
            )
    return row


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def eager(kind: str, steps: int, batch: int, hidden: int, runs: int = 30) -> dict[str, Any]:
    """Milliseconds of the fused and the unrolled layer, run in turn, and their ratio."""
    layer = getattr(nn, kind)(hidden // 2, hidden).eval()
    forms = {"fused": layer, "unrolled": unroll(layer)}
    x = torch.randn(steps, batch, hidden // 2)
    times: dict[str, list[float]] = {name: [] for name in forms}
    with torch.no_grad():
        for number in range(runs + 5):
            for name, form in forms.items():
                taken, _ = seconds(lambda form=form: form(x))
                if number >= 5:
                    times[name].append(taken * 1e3)
    row: dict[str, Any] = {"kind": kind, "steps": steps, "batch": batch, "hidden": hidden}
    for name, taken in times.items():
        row[name] = {"median_ms": statistics.median(taken), "p10_ms": statistics.quantiles(taken, n=10)[0]}
    row["ratio"] = row["unrolled"]["median_ms"] / row["fused"]["median_ms"]
    return row


def compiling(steps: int) -> dict[str, Any]:
    """Seconds of the first call of a compiled unrolled GRU, in an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        torch._dynamo.reset()
        compiled = torch.compile(unroll(nn.GRU(64, 128).eval()), fullgraph=True)
        with torch.no_grad():
            taken, _ = seconds(lambda: compiled(torch.randn(steps, 4, 64)))
    return {"steps": steps, "first_call": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 80, 400, 1000])
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rewriting(4)  # warm-up: imports and first calls
    found: dict[str, Any] = {"command": command(), "machine": machine(), "threads": 1}
    found["rewriting"] = []
    for steps in given.steps:
        found["rewriting"].append(rewriting(steps))
        print(json.dumps(found["rewriting"][-1]), flush=True)
    shapes = [
        (kind, steps, batch, hidden)
        for kind in ("LSTM", "GRU", "RNN")
        for steps in (8, 100)
        for batch, hidden in ((1, 128), (16, 256))
    ]
    found["eager"] = [eager(*shape) for shape in shapes]
    found["compiling"] = [compiling(steps) for steps in (8, 16)]
    print(json.dumps(found["eager"] + found["compiling"]), flush=True)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
