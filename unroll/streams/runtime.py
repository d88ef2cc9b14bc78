"""Runs streaming models that are ONNX files, in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.streams.states import ARGUMENT, NEXT, State, check_state_names, fixed_rows


def runner(model: Any) -> tuple[Callable[..., tuple[Any, State]], Callable[..., State | None]]:
    """Return functions to run one piece in ONNX Runtime and to make the first state: None if a piece tells its sizes.

    Args:
        model: the path of a file, or an `onnxruntime.InferenceSession`.
    """
    if isinstance(model, (str, os.PathLike)):
        from unroll.onnx.runtime import session

        model = session(model, model)
    runtime = model
    outputs = [value.name for value in runtime.get_outputs()]
    # An input `x` is a state if there is an output `x.next`.
    states = [value for value in runtime.get_inputs() if f"{value.name}{NEXT}" in outputs]
    inputs = [value.name for value in runtime.get_inputs() if value not in states]
    if not states:
        finding = f"has no input x with an output x{NEXT}"
        raise UnrollError(Problem("Stream(file)", finding, "write it by export_onnx(streaming(model, args), ...)"))
    names = [value.name for value in states]
    results = [name for name in outputs if name.removesuffix(NEXT) not in names]

    def run(*args: Any, state: State | None, **kwargs: Any) -> tuple[Any, State]:
        if state is not None:
            check_state_names(ARGUMENT, state, dict.fromkeys(names))
        given = dict(zip((name for name in inputs if name not in kwargs), args)) | kwargs
        if len(args) + len(kwargs) != len(inputs) or given.keys() != set(inputs):
            finding = f"{len(args)} arguments and {', '.join(kwargs) or 'none'} by name were given"
            raise UnrollError(Problem("Stream", finding, f"give {', '.join(inputs)}"))
        tensors = {name: torch.as_tensor(value) for name, value in given.items()}
        tensors |= _zeros(states, _open_sizes(runtime, tensors)) if state is None else state
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        try:
            arrays = runtime.run(outputs, feed)
        except Exception as error:
            wanted = ", ".join(f"{value.name} {value.shape}" for value in runtime.get_inputs())
            finding = f"fails in ONNX Runtime ({str(error).splitlines()[0]})"
            raise UnrollError(Problem("Stream", finding, f"the file takes {wanted}")) from error
        found = dict(zip(outputs, map(torch.from_numpy, arrays)))
        output = tuple(found[name] for name in results)
        return output[0] if len(output) == 1 else output, {name: found[f"{name}{NEXT}"] for name in names}

    return run, lambda batch=None: _first(states, batch)


TYPES = {"tensor(float)": torch.float32, "tensor(double)": torch.float64, "tensor(float16)": torch.float16}


def _first(states: list[Any], batch: int | None) -> State | None:
    """Make zeros for this many rows; None for as many as the first piece has, if the file leaves that open."""
    sizes = {size for value in states for size in value.shape if not isinstance(size, int)}
    if batch is None:
        return None if sizes else _zeros(states, {})
    problems = Problems(
        fixed_rows(batch, value.name, value.shape)
        for value in states
        if all(isinstance(size, int) for size in value.shape) and (len(value.shape) < 2 or value.shape[-2] != batch)
    )
    problems.check()
    # The only open size is the batch; of several none tells which is.
    return _zeros(states, dict.fromkeys(sizes, batch) if len(sizes) == 1 else {})


def _open_sizes(runtime: Any, given: Mapping[str, Tensor]) -> dict[Any, int]:
    """Read from a piece the sizes that a file leaves open, by their names in it."""
    return {
        size: found
        for value in runtime.get_inputs()
        if value.name in given
        for size, found in zip(value.shape, given[value.name].shape)
        if isinstance(size, str)
    }


def _zeros(states: list[Any], sizes: Mapping[Any, int]) -> State:
    """Make zeros of the shapes that a file asks for, with these sizes where it leaves them open."""
    shapes = {value.name: [sizes.get(size, size) for size in value.shape] for value in states}
    fix = "set the state yourself, a dictionary of tensors"
    problems = Problems(
        Problem(value.name, f"has shape {value.shape}, of which the batch is not told", fix)
        for value in states
        if not all(isinstance(size, int) for size in shapes[value.name])
    )
    problems.check()
    return {value.name: torch.zeros(shapes[value.name], dtype=TYPES[value.type]) for value in states}
