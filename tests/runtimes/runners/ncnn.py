"""ncnn, by pnnx, which reads ONNX files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Missing, Run, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    folder = path.with_name(f"{path.stem}.ncnn")
    folder.mkdir(exist_ok=True)
    source = folder / "model.onnx"
    source.write_bytes(path.read_bytes())
    # Sizes that are not the same in both are open.
    shapes = [f"{name}={_shapes(inputs)}" for name, inputs in zip(("inputshape", "inputshape2"), given, strict=False)]
    command = [Path(sys.executable).with_name("pnnx"), source, *shapes, "fp16=0"]
    subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)
    return folder / "model.ncnn.param"


def _shapes(inputs: Inputs) -> str:
    kinds = {"f": "f32", "i": "i64", "b": "bool"}
    return ",".join(f"[{','.join(map(str, v.shape))}]{kinds[v.dtype.kind]}" for v in inputs.values())


def count(path: Path) -> Counter[str]:
    return Counter(line.split()[0] for line in path.read_text().splitlines()[2:])


def _script(path: Path) -> Path:
    return path.with_name("model_ncnn.py")


def load(path: Path) -> Run:
    import ncnn

    net = ncnn.Net()
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(path)) or net.load_model(str(path.with_suffix(".bin"))):
        raise ValueError("ncnn does not load the file")
    # Which axis, if any, ncnn shall take for the batch, as pnnx found it; 233 is none.
    batches = [int(axis) for axis in re.findall(r"ex.input.*batch_index=(\d+)", _script(path).read_text())]
    outputs = sorted(name for name in net.output_names() if name.startswith("out"))  # others nobody reads

    def run(inputs: Inputs) -> list[np.ndarray]:
        with net.create_extractor() as extractor:
            names = sorted(net.input_names())
            for name, value, axis in zip(names, inputs.values(), batches, strict=True):
                extractor.input(name, ncnn.Mat(np.ascontiguousarray(value), batch_index=axis).clone())
            found = [extractor.extract(name) for name in outputs]
            if any(code for code, _ in found):
                raise ValueError("ncnn does not run the file")
            return [np.array(value) for _, value in found]

    return run


RUNTIME = Runtime(
    "ncnn, by pnnx",
    "ncnn",
    "ncnn",
    load,
    convert,
    count,
    preset="ncnn",
    plans=("default", "npu", "products=linear"),
    others={
        "native": "of the rows of a batch one alone is put out; lengths and an open batch are refused",
        "default": "a `Gemm` that adds what is computed is not loaded",
    },
    missing={
        "packed": Missing(
            "pnnx leaves what ncnn has no layers for, by each plan: comparisons, such as `torch.gt`, and `torch.where`",
            "the padded batch without lengths, whose valid steps are the same in layers that run forwards",
        ),
        "open length": Missing(
            "pnnx reads no loop whose body takes weights from the graph around it, neither a `Scan` nor a `Loop`",
            "a file for each length",
        ),
    },
)
