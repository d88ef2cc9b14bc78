"""Engines of TensorRT for RTX on a card: results against float64, times against cuDNN and the file with the operator.

    python benchmarks/tensorrt_gpu.py --build FOLDER            # anywhere: needs TensorRT for RTX, and no GPU
    python benchmarks/tensorrt_gpu.py --build FOLDER --current  # on the card itself, for its own compute capability
    python benchmarks/tensorrt_gpu.py --run FOLDER              # on the card: needs no network and no ONNX packages

Both sides need PyTorch, this checkout (PYTHONPATH=.) and the same version of TensorRT for RTX. The smallest engine
runs first; what the library says of a card that it does not know stands in FOLDER/results.json, and the rest is left
out. The rule for results is that of the GPU tests: at most twice as far from float64 as cuDNN, plus four roundings of
the largest value in float32, and one in float16 and bfloat16. --build has been run; --run has not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

OPERATOR = "operator"
TYPES = {"float32": 4, "float16": 1, "bfloat16": 1}
"""Roundings of the largest value that are allowed beyond twice the error of cuDNN"""

LAYERS = (("RNN", 1, 16, 4), ("LSTM", 2, 128, 32), ("LSTM", 2, 128, 128), ("GRU", 2, 128, 32))
CASES = [
    (kind, {"num_layers": layers, "bidirectional": layers > 1}, hidden, steps, dtype, plan)
    for kind, layers, hidden, steps in LAYERS
    for dtype in TYPES
    for plan in (OPERATOR, "default", "directions=stacked", "time=4")
    if plan in (OPERATOR, "time=4") or steps < 64
]


def name_of(case: tuple[Any, ...]) -> str:
    kind, options, hidden, steps, dtype, plan = case
    return f"{kind}-{options['num_layers']}-{hidden}-T{steps}-{dtype}-{plan}"


def model_of(case: tuple[Any, ...], dtype: torch.dtype | None = None) -> tuple[nn.Module, Tensor]:
    """Return the layer and its input, the same numbers each time."""
    kind, options, hidden, steps, name, _ = case
    torch.manual_seed(0)
    layer, x = getattr(nn, kind)(hidden, hidden, **options).eval(), torch.randn(steps, 4, hidden)
    layer, x = layer.to(getattr(torch, name)), x.to(getattr(torch, name))
    return (layer, x) if dtype is None else (layer.to(dtype), x.to(dtype))


def build(folder: Path, current: bool, only: int | None) -> None:
    """Write an engine for each case."""
    from unroll import UnrollError, export_onnx
    from unroll.targets.building import build_engine

    folder.mkdir(exist_ok=True)
    for case in CASES[:only]:
        model, x = model_of(case)
        path = folder / f"{name_of(case)}.onnx"
        if case[-1] == OPERATOR:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=False)
        else:
            export_onnx(model, x, path, input_names=["x"], plan=case[-1], check=False)
        try:
            engine = build_engine(path, capabilities=["CURRENT"] if current else ())
        except UnrollError as error:
            print(f"{name_of(case)}: {error}", file=sys.stderr)
            continue
        path.with_suffix(".engine").write_bytes(engine.data)
        print(f"{name_of(case)}: {engine}", flush=True)


class Engine:
    """An engine on the card, with its input and its results in tensors of torch."""

    def __init__(self, path: Path, x: Tensor) -> None:
        import tensorrt_rtx_bindings as trt

        from unroll.targets.engines import make_log

        log = make_log()
        self.runtime = trt.Runtime(log)
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        self.context = self.engine and self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError("; ".join(log.errors) or "no context, and no reason")
        self.log, self.x, self.results = log, x, []
        for name in (self.engine.get_tensor_name(k) for k in range(self.engine.num_io_tensors)):
            if self.engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                tensor = x
            else:
                tensor = x.new_empty(tuple(self.engine.get_tensor_shape(name)))
                self.results.append(tensor)
            self.context.set_tensor_address(name, tensor.data_ptr())

    def __call__(self) -> list[Tensor]:
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("; ".join(self.log.errors) or "does not run, and says nothing")
        return self.results


def milliseconds(run: Any, times: int = 30) -> float:
    """The median of a call, on the card's own clock."""
    found = []
    for k in range(times + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if k >= 5:
            found.append(start.elapsed_time(end))
    return statistics.median(found)


@torch.no_grad()
def measure(case: tuple[Any, ...], path: Path) -> dict[str, Any]:
    """Hold one engine against float64, and time it beside cuDNN."""
    model, x = (part.cuda() for part in model_of(case))
    exact, wide = (part.cuda() for part in model_of(case, torch.float64))
    engine = Engine(path, x.contiguous())
    results = (pytree.tree_leaves(exact(wide)), pytree.tree_leaves(model(x)), engine())
    outputs = [judged(*found, roundings=TYPES[case[4]]) for found in zip(*results, strict=True)]
    times = {"milliseconds": milliseconds(engine), "cudnn_milliseconds": milliseconds(lambda: model(x))}
    return times | {"outputs": outputs, "ok": all(output["ok"] for output in outputs)}


def judged(true: Tensor, theirs: Tensor, ours: Tensor, *, roundings: int) -> dict[str, Any]:
    """Hold an output to the rule, by how far it and cuDNN's are from float64."""
    error, known = ((found.double().reshape(true.shape) - true).abs().max().item() for found in (ours, theirs))
    allowed = 2 * known + roundings * torch.finfo(theirs.dtype).eps * true.abs().max().item()
    return {"error": error, "cudnn_error": known, "allowed": allowed, "ok": error <= allowed}


def run(folder: Path) -> int:
    """Run all engines of a folder, write what was found, and return the number of wrong ones."""
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA device; --build needs none")
    # the original must be as exact as float32 is
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    rows: list[dict[str, Any]] = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for case in CASES:
            path = folder / f"{name_of(case)}.engine"
            if not path.exists():
                continue
            try:
                found = measure(case, path)
            except RuntimeError as error:
                found = {"ok": False, "failure": str(error)}
            rows.append({"case": name_of(case), **found})
            print(rows[-1], flush=True)
            told = {"device": device, "torch": torch.__version__, "rows": rows}
            (folder / "results.json").write_text(json.dumps(told, indent=1))
            if "failure" in found and len(rows) == 1:
                sys.exit("the smallest engine does not run here; the reason stands in results.json")
    if not rows:
        sys.exit(f"{folder} has no engines; write them by --build")
    return sum(not row["ok"] for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--build", type=Path, metavar="FOLDER")
    which.add_argument("--run", type=Path, metavar="FOLDER")
    parser.add_argument("--current", action="store_true", help="build for this machine's own GPU")
    parser.add_argument("--only", type=int, help="build the first cases alone")
    given = parser.parse_args()
    if given.build:
        build(given.build, given.current, given.only)
    else:
        sys.exit(run(given.run))
