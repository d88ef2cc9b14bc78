"""Engines that a target's own library builds of an ONNX file: TensorRT for RTX does so on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unroll.core.errors import Problem, UnrollError
from unroll.extras import require

BINDINGS = "tensorrt_rtx_bindings"
"""The module of TensorRT for RTX. Two wheels hold it, and only `pip install --no-deps` takes them, see README.md."""

LIMIT = 600.0
"""Seconds after which a build is ended"""

Shapes = Mapping[str, Sequence[Sequence[int]]]
"""The smallest, the usual and the largest shape of inputs, by their names"""


@dataclass(frozen=True)
class Engine:
    """An engine, and the network that it was built of, as TensorRT for RTX read it from the file.

    Attributes:
        layers: how many layers of each type the network has, those in loops too, by TensorRT's names.
        names: the layers' names, in order: those of the file's nodes, some with a number.
        seconds: how long the parser and the builder took.
        processor_seconds: the time of a processor in these, which other work on the machine changes less.
        size: bytes of the engine.
        version: of the library.
        data: the engine itself, for `Runtime.deserialize_cuda_engine` of the same version on a machine with a GPU.
    """

    layers: Counter[str]
    names: tuple[str, ...] = field(repr=False)
    seconds: float
    processor_seconds: float
    size: int
    version: str
    data: bytes = field(repr=False)

    @property
    def loops(self) -> int:
        """The number of loops in the network."""
        return self.layers["TRIP_LIMIT"]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON: all but the names and the engine itself."""
        told = {name: getattr(self, name) for name in ("seconds", "processor_seconds", "size", "version")}
        return {"layers": self.layers.total(), "loops": self.loops} | told

    def __str__(self) -> str:
        loops = f", {self.loops} loop{'s' * (self.loops > 1)}" if self.loops else ""
        size = f"{self.size / 1e6:.1f} MB"
        return f"{self.layers.total():,} layers{loops}, built in {self.seconds:.1f} s, an engine of {size}"


def build_engine(
    model: Any, *, shapes: Shapes | None = None, capabilities: Sequence[str] = (), limit: float = LIMIT
) -> Engine:
    """Build an engine by TensorRT for RTX, for the devices that it chooses by itself; needs no GPU.

    The library builds in a process of its own, which is ended after `limit` seconds: it cannot be interrupted, an
    engine of many explicit steps may take minutes, and faults of the library end its process, see docs/tensorrt.md.

    Args:
        model: the path of a file, an `onnx.ModelProto` or an `onnx_ir.Model`.
        shapes: for inputs that leave sizes open, the smallest, the usual and the largest shape. Without, each such size
            is from 1 to 16, and usually 4.
        capabilities: names of `ComputeCapability` to build for, such as `SM89`; `CURRENT` needs a GPU.
        limit: seconds after which the build is ended.

    Raises:
        UnrollError: if the library is not installed, `shapes` names what is not an input, the library does not read
            the file or builds no engine of it: then with the name of the node, and in the library's own words; and if
            it does not end in time, or not at all well.
    """
    require_bindings()
    from unroll.onnx.files import save
    from unroll.onnx.reading import read_model

    read = read_model(model, "build_engine(model)")
    with TemporaryDirectory() as folder:
        if isinstance(model, (str, os.PathLike)):
            path = Path(model)
        else:
            save(read, path := Path(folder) / "model.onnx")
        given = {"path": os.fspath(path), "shapes": dict(shapes or {}), "capabilities": list(capabilities)}
        given |= {"engine": os.fspath(engine := Path(folder) / "model.engine"), "double": _double(read.graph)}
        found = run_apart(given, limit)
        if refused := found.get("refused"):
            raise UnrollError(*(Problem(*told) for told in refused))
        data = engine.read_bytes()
    kinds, names = zip(*found.pop("layers"), strict=True)
    return Engine(layers=Counter(kinds), names=names, size=len(data), data=data, **found)


def require_bindings() -> None:
    """Refuse to go on without TensorRT for RTX.

    Raises:
        UnrollError: with the way to install it.
    """
    fix = "pip install --no-deps tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs, both of one version"
    require(BINDINGS, fix=fix)


def run_apart(given: dict[str, Any], limit: float) -> dict[str, Any]:
    """Return the `answer` of `engines`, from a process of its own.

    Raises:
        UnrollError: if it does not end in time, or ends without an answer.
    """
    # -P: of the folder of that file nothing is to be imported
    command = [sys.executable, "-P", os.fspath(Path(__file__).with_name("engines.py"))]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, input=json.dumps(given), env=variables, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        finding = f"is not built by TensorRT for RTX within {limit:g} s"
        fix = "write fewer explicit steps (time=4), and no products by sums; or build_engine(model, limit=...)"
        raise UnrollError(Problem("model", finding, fix)) from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["and says nothing"])[-1]
        finding = f"ends the process in which TensorRT for RTX builds ({said}; exit code {done.returncode})"
        raise UnrollError(Problem("model", finding, "let another runtime compute it, or build its parts to find which"))
    return json.loads(done.stdout.splitlines()[-1])


def _double(graph: Any) -> list[str]:
    """Return the names of a graph's inputs and outputs that are of float64."""
    return [value.name for value in (*graph.inputs, *graph.outputs) if value.dtype and value.dtype.name == "DOUBLE"]
