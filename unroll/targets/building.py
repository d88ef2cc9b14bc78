"""Engines that a target's own library builds of an ONNX file: TensorRT for RTX does so on a machine without a GPU."""

from __future__ import annotations

import os
import re
import time
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

OPEN = (1, 4, 16)
"""The smallest, the usual and the largest of each size that a file leaves open, unless `shapes` says another"""

Shapes = Mapping[str, Sequence[Sequence[int]]]
"""The smallest, the usual and the largest shape of inputs, by their names"""


@dataclass(frozen=True)
class Engine:
    """An engine, and the network that it was built of, as TensorRT for RTX read it from the file.

    Attributes:
        layers: how many layers of each type the network has, those in loops too, by TensorRT's names.
        names: the layers' names, in order: those of the file's nodes, some with a number.
        seconds: how long the parser and the builder took.
        size: bytes of the engine.
        version: of the library.
        data: the engine itself, for `Runtime.deserialize_cuda_engine` of the same version on a machine with a GPU.
    """

    layers: Counter[str]
    names: tuple[str, ...] = field(repr=False)
    seconds: float
    size: int
    version: str
    data: bytes = field(repr=False)

    @property
    def loops(self) -> int:
        """The number of loops in the network."""
        return self.layers["TRIP_LIMIT"]

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON: all but the names and the engine itself."""
        counts = {"layers": self.layers.total(), "loops": self.loops}
        return counts | {"seconds": self.seconds, "size": self.size, "version": self.version}

    def __str__(self) -> str:
        loops = f", {self.loops} loop{'s' * (self.loops > 1)}" if self.loops else ""
        size = f"{self.size / 1e6:.1f} MB"
        return f"{self.layers.total():,} layers{loops}, built in {self.seconds:.1f} s, an engine of {size}"


def build_engine(model: Any, *, shapes: Shapes | None = None, capabilities: Sequence[str] = ()) -> Engine:
    """Build an engine by TensorRT for RTX, for the devices that it chooses by itself; needs no GPU.

    The library takes all that it needs of the machine while it builds, and cannot be interrupted: run it in a process
    of its own where a limit is needed. An engine of many explicit steps may take minutes, see docs/tensorrt.md.

    Args:
        model: the path of a file, an `onnx.ModelProto` or an `onnx_ir.Model`.
        shapes: for inputs that leave sizes open, the smallest, the usual and the largest shape. Without, each such size
            is from 1 to 16, and usually 4.
        capabilities: names of `ComputeCapability` to build for, such as `SM89`; `CURRENT` needs a GPU.

    Raises:
        UnrollError: if the library is not installed, `shapes` names what is not an input, or the library does not read
            the file or builds no engine of it: then with the name of the node, and in the library's own words.
    """
    require_bindings()
    if isinstance(model, (str, os.PathLike)):
        return _build(Path(model), dict(shapes or {}), capabilities)
    from unroll.onnx.files import save
    from unroll.onnx.reading import read_model

    with TemporaryDirectory() as folder:
        save(read_model(model, "build_engine(model)"), path := Path(folder) / "model.onnx")
        return _build(path, dict(shapes or {}), capabilities)


def require_bindings() -> None:
    """Refuse to go on without TensorRT for RTX.

    Raises:
        UnrollError: with the way to install it.
    """
    fix = "pip install --no-deps tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs, both of one version"
    require(BINDINGS, fix=fix)


def _build(path: Path, shapes: dict[str, Sequence[Sequence[int]]], capabilities: Sequence[str]) -> Engine:
    import tensorrt_rtx_bindings as trt  # pyright: ignore[reportMissingImports]

    class Log(trt.ILogger):
        """Keeps the errors, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    start, log = time.perf_counter(), Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(os.fspath(path)):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        raise UnrollError(*(_refusal(error.node_name() or error.node_operator(), error.desc()) for error in errors))
    _check_types(path, network)
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for k, name in enumerate(_known(capabilities, trt.ComputeCapability.__members__)):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], k)
    if profile := _profile(builder, network, shapes):
        config.add_optimization_profile(profile)
    layers = [network.get_layer(k) for k in range(network.num_layers)]
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise UnrollError(_told(log.errors, layers))
    seconds, counts = time.perf_counter() - start, Counter(layer.type.name for layer in layers)
    names = tuple(layer.name for layer in layers)
    return Engine(counts, names, seconds, data.nbytes, trt.__version__, bytes(data))


def _known(names: Sequence[str], members: Mapping[str, Any]) -> Sequence[str]:
    if unknown := [name for name in names if name not in members]:
        fix = f"choose from {', '.join(members)}"
        raise UnrollError(
            *(Problem(f"capabilities: {name!r}", "is not known to TensorRT for RTX", fix) for name in unknown)
        )
    return names


def _check_types(path: Path, network: Any) -> None:
    """Refuse a file of float64, of which the library makes an engine of float32 without a word."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    double = [v.name for v in (*graph.input, *graph.output) if v.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE]
    tensors = [network.get_input(k) for k in range(network.num_inputs)]
    tensors += [network.get_output(k) for k in range(network.num_outputs)]
    if wrong := [tensor for tensor in tensors if tensor.name in double]:
        finding = "is of float64 in the file, and of {} in an engine of TensorRT for RTX"
        fix = "convert the model first"
        raise UnrollError(*(Problem(t.name, finding.format(t.dtype.name), fix) for t in wrong))


def _profile(builder: Any, network: Any, shapes: dict[str, Sequence[Sequence[int]]]) -> Any:
    """Return the sizes that an engine is for; None if the file leaves none open."""
    profile, needed = builder.create_optimization_profile(), False
    for tensor in (network.get_input(k) for k in range(network.num_inputs)):
        given = shapes.pop(tensor.name, None)
        if tensor.is_shape_tensor:  # its values are sizes
            needed = True
            profile.set_shape_input(tensor.name, *(given or [[n] * max(tensor.shape, default=1) for n in OPEN]))
        elif -1 in tuple(tensor.shape):
            needed = True
            profile.set_shape(tensor.name, *(given or [[n if d < 0 else d for d in tensor.shape] for n in OPEN]))
    if shapes:
        fix = "name inputs of the file"
        raise UnrollError(*(Problem(f"shapes[{name!r}]", "is no input", fix) for name in shapes))
    return profile if needed else None


def _told(errors: list[str], layers: list[Any]) -> Problem:
    """Return the builder's error, at the layer that it names, or whose result it names."""
    said = errors[0] if errors else "builds no engine, and says nothing"
    named = {layer.get_output(k).name: layer.name for layer in layers for k in range(layer.num_outputs)}
    named |= {layer.name: layer.name for layer in layers}
    found = [name for name in named if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", said)]
    return _refusal(named[max(found, key=len)] if found else "", said)


def _refusal(place: str, said: str) -> Problem:
    fix = "see docs/tensorrt.md, or let another runtime compute it"
    return Problem(place or "model", f"is refused by TensorRT for RTX ({_short(said)})", fix)


def _short(said: str) -> str:
    """Return an error in one line, without places in the library's own code."""
    said = re.sub(r"\s*\(?In \w+ at /_src\S+\)?", "", said)
    return " ".join(said.split()).rstrip(".:")
