"""CPU seconds that rewriting and exporting are to take, what they take, and what of it is torch's and ONNX's own.

    python benchmarks/seconds.py          # some minutes
    python benchmarks/seconds.py --tiny   # with few steps, to try the script itself; writes nothing

All of LSTMs in both directions, one thread, the least of some runs in one process. Writes
benchmarks/results/seconds.json: the machine, the versions, the command, and every figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
from torch import fx, nn

from unroll import export_onnx, trace, unroll
from unroll.bench.machine import command, machine
from unroll.core.patching import without_gc
from unroll.onnx.runtime import session

RESULTS = Path(__file__).parent / "results" / "seconds.json"


def least(function: Callable[[], Mapping[str, float] | None], runs: int) -> dict[str, float]:
    """Return the least CPU seconds of some runs, as `all`, and of the parts that each tells."""
    found: dict[str, float] = {}
    for _ in range(runs):
        gc.collect()
        began = time.process_time()
        parts = function()
        taken = {"all": time.process_time() - began, **(parts or {})}
        found = {part: min(seconds, found.get(part, seconds)) for part, seconds in taken.items()}
    return found


def bare_graph(names: list[str]) -> None:
    """Write as many nodes of `torch.fx`, each of two operands, by torch alone."""
    graph = fx.Graph()
    last = graph.placeholder("x")
    with without_gc():
        for name in names:
            last = graph.create_node("call_function", torch.add, (last, last), name=name)


def bare_model(names: list[str]) -> None:
    """Write as many nodes of `onnx_ir`, each of two operands, by it alone."""
    last, made = ir.Value(name="x"), []
    with without_gc():
        for name in names:
            output = ir.Value(name=name)
            made.append(ir.Node("", "Add", [last, last], outputs=[output], name=name))
            last = output
        ir.Graph([], [], nodes=made, opset_imports={"": 20})


def of_graph(model: nn.Module, steps: int, runs: int) -> list[dict[str, Any]]:
    graph = trace(model)
    unroll(graph, steps=2)
    names = [node.name for node in unroll(graph, steps=steps).graph.nodes]
    ours = least(lambda: unroll(graph, steps=steps) and None, runs)["all"]
    bare = least(lambda: bare_graph(names), runs)["all"]
    return [line(f"FX graph, T={steps}", 2.5, ours, bare, f"{len(names)} nodes of torch.fx")]


def of_program(steps: int, runs: int) -> list[dict[str, Any]]:
    model = nn.Sequential(nn.LSTM(8, 16, 2, bidirectional=True)).eval()
    program = torch.export.export(model, (torch.randn(steps, 1, 8),))
    unrolled = unroll(program)
    names = [node.name for node in unrolled.graph.nodes]
    ours = least(lambda: unroll(program) and None, runs)["all"]
    bare = least(lambda: bare_graph(names), runs)["all"] + least(unrolled.validate, runs)["all"]
    return [line(f"exported program, T={steps}", 3.0, ours, bare, f"{len(names)} nodes of torch.fx, validate()")]


def of_export(model: nn.Module, steps: int, runs: int, folder: Path) -> list[dict[str, Any]]:
    """Measure `export_onnx`, in parts for a number of steps, and in whole for twice as many."""
    path = folder / "model.onnx"

    def export(steps: int) -> Mapping[str, float]:
        with patch("time.perf_counter", time.process_time):  # the clock of its parts
            return export_onnx(model, torch.randn(steps, 1, 64), path).seconds

    export(3)
    alone = least(lambda: export(3), runs)  # what does not grow with the steps
    parts = least(lambda: export(steps), runs)
    written = ir.load(path)
    count = len(written.graph)
    names = [str(node.name) for node in written.graph]
    saving = least(lambda: ir.save(written, folder / "again.onnx"), runs)["all"]
    bare = alone["capture"] + alone["translate"] + least(lambda: bare_model(names), runs)["all"] + saving
    whole = sum(seconds for part, seconds in parts.items() if part not in ("check", "all"))
    checking = least(lambda: session(path, path, nodes=count) and None, runs)["all"]
    checking += least(lambda: onnx.checker.check_model(str(path)), runs)["all"]
    twice = least(lambda: export(2 * steps), runs)
    double = ir.load(path)
    return [
        line(f"export_onnx without its check, T={steps}", 2.0, whole, bare, f"torch's exporter, {count} nodes, saving")
        | {"parts": parts},
        line(f"its check, T={steps}", 4.0, parts["check"], checking, "loading in ONNX Runtime, onnx.checker"),
        line(f"export_onnx and its check, T={2 * steps}", 10.0, twice.pop("all"), None, f"{len(double.graph)} nodes")
        | {"parts": twice},
    ]


def of_file(model: nn.Module, steps: int, runs: int, folder: Path) -> list[dict[str, Any]]:
    path = folder / "fused.onnx"
    torch.onnx.export(model, (torch.randn(steps, 1, 64),), path, dynamo=True, verbose=False)
    names = [str(node.name) for node in unroll(path).graph]
    ours = least(lambda: unroll(path) and None, runs)["all"]
    bare = least(lambda: bare_model(names), runs)["all"]
    return [line(f"ONNX file, T={steps}", 1.0, ours, bare, f"{len(names)} nodes of onnx_ir")]


def line(work: str, most: float, seconds: float, theirs: float | None, what: str) -> dict[str, Any]:
    found = {"work": work, "at most": most, "measured": seconds, "met": seconds <= most, "theirs": theirs, "what": what}
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    steps, runs = (8, 1) if given.tiny else (1000, given.runs)
    model = nn.Sequential(nn.LSTM(64, 128, 3, bidirectional=True)).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = of_graph(model, steps, runs) + of_program(steps, runs)
        lines += of_export(model, steps // 2, runs, folder) + of_file(model, steps, runs, folder)
    if not given.tiny:
        found = {"command": command(), "machine": machine(), "threads": 1, "runs": runs, "lines": lines}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
