"""Builds one engine by TensorRT for RTX, in a process of its own: `building` runs this file, by its path.

It imports nothing of `unroll`, whose import takes longer than most builds. Read from standard input and written to
standard output is JSON; the engine itself is written to a file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OPEN = (1, 4, 16)
"""The smallest, the usual and the largest of each size that a file leaves open, unless `shapes` says another"""

Told = tuple[str, str, str]
"""The place, finding and fix of an `unroll.core.errors.Problem`"""


class Refused(Exception):
    """The library, or this file, refuses; the arguments are `Told`."""


def make_log() -> Any:
    """Return a logger of TensorRT that keeps errors, in its list `errors`, and prints nothing."""
    import tensorrt_rtx_bindings as trt  # pyright: ignore[reportMissingImports]

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def build(
    path: str,
    engine: str,
    shapes: dict[str, Sequence[Sequence[int]]],
    capabilities: Sequence[str],
    double: Sequence[str],
) -> dict[str, Any]:
    """Build an engine, and return what there is to know of it and its network.

    Args:
        path: of the ONNX file.
        engine: the path of the file that the engine is written to.
        shapes: as for `build_engine`.
        capabilities: the same.
        double: names of inputs and outputs that are of float64 in the file.

    Raises:
        Refused: by the parser, the builder, or for one of the arguments.
    """
    import tensorrt_rtx_bindings as trt  # pyright: ignore[reportMissingImports]

    start, before, log = time.perf_counter(), os.times().user, make_log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(k) for k in range(parser.num_errors)]
        raise Refused(*(_refusal(error.node_name() or error.node_operator(), error.desc()) for error in errors))
    _check_types(network, double)
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
        raise Refused(_told(log.errors, layers))
    seconds, processor = time.perf_counter() - start, os.times().user - before
    Path(engine).write_bytes(bytes(data))
    return {
        "layers": [(layer.type.name, layer.name) for layer in layers],
        "seconds": seconds,
        "processor_seconds": processor,
        "version": trt.__version__,
    }


def _known(names: Sequence[str], members: Any) -> Sequence[str]:
    if unknown := [name for name in names if name not in members]:
        finding, fix = "is not known to TensorRT for RTX", f"choose from {', '.join(members)}"
        raise Refused(*((f"capabilities: {name!r}", finding, fix) for name in unknown))
    return names


def _check_types(network: Any, double: Sequence[str]) -> None:
    """Refuse a file of float64, of which the library makes an engine of float32 without a word."""
    tensors = [network.get_input(k) for k in range(network.num_inputs)]
    tensors += [network.get_output(k) for k in range(network.num_outputs)]
    if wrong := [tensor for tensor in tensors if tensor.name in double]:
        finding = "is of float64 in the file, and of {} in an engine of TensorRT for RTX"
        raise Refused(*((t.name, finding.format(t.dtype.name), "convert the model first") for t in wrong))


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
        raise Refused(*((f"shapes[{name!r}]", "is no input", "name inputs of the file") for name in shapes))
    return profile if needed else None


def _told(errors: list[str], layers: list[Any]) -> Told:
    """Return the builder's error, at the layer that it names, or whose result it names."""
    said = errors[0] if errors else "builds no engine, and says nothing"
    named = {layer.get_output(k).name: layer.name for layer in layers for k in range(layer.num_outputs)}
    named |= {layer.name: layer.name for layer in layers}
    found = [name for name in named if name and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", said)]
    return _refusal(named[max(found, key=len)] if found else "", said)


def _refusal(place: str, said: str) -> Told:
    fix = "see docs/tensorrt.md, or let another runtime compute it"
    return place or "model", f"is refused by TensorRT for RTX ({_short(said)})", fix


def _short(said: str) -> str:
    """Return an error in one line, without places in the library's own code."""
    said = re.sub(r"\s*\(?In \w+ at /_src\S+\)?", "", said)
    return " ".join(said.split()).rstrip(".:")


def answer(given: dict[str, Any]) -> dict[str, Any]:
    """Return what `build` does with these arguments; `refused` has the reasons why there is no engine."""
    try:
        return build(**given)
    except Refused as error:
        return {"refused": error.args}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
