"""ONNX files loaded into ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from unroll.core.errors import Problem, UnrollError

MANY = 10_000
"""Nodes beyond which a file to be compared is loaded without fusions, which take half of the time of loading it"""


def session(path: str | os.PathLike[str], name: str | os.PathLike[str], *, nodes: int = 0) -> Any:
    """Load a file into ONNX Runtime, on the CPU and for one thread; messages call it `name`.

    Of a file with more than `MANY` nodes, of which the caller tells, the operators run as they are written.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if nodes > MANY:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        # ONNX Runtime 1.31 crashes in that optimization, of convolutions, where a float16 file has an open batch.
        return onnxruntime.InferenceSession(
            os.fspath(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["NchwcTransformer"]
        )
    except Exception as error:
        if not os.path.exists(path):
            finding, fix = "cannot be read (No such file or directory)", "give the path of an ONNX file"
        else:
            finding, fix = f"is refused by ONNX Runtime ({first_line(error)})", _fix(str(error))
        raise UnrollError(Problem(os.fspath(name), finding, fix)) from error


def function_of(path: str | os.PathLike[str], name: str | os.PathLike[str] | None = None) -> Callable[..., Any]:
    """Return a function that runs a file on tensors, in the order of its inputs or by name: its outputs, by name.

    It takes what a model takes too, whose tensors are the inputs, however they are nested.

    Args:
        path: where the file lies.
        name: what it is called in messages.

    Raises:
        UnrollError: if ONNX Runtime refuses the file, and when it is called on what the file cannot take.
    """
    place = os.fspath(path if name is None else name)
    runner = session(path, place)
    names, outputs = ([value.name for value in values] for values in (runner.get_inputs(), runner.get_outputs()))

    def run(*args: Any, **named: Any) -> dict[str, torch.Tensor]:
        args, named = (args, named) if named.keys() <= set(names) else ((args, named), {})
        tensors = tensors_in(args)
        given = dict(zip(names, tensors)) | named
        if len(tensors) + len(named) != len(names) or given.keys() != set(names):
            raise UnrollError(Problem(place, f"takes {', '.join(names)}", "give a tensor for each"))
        try:
            found = runner.run(None, {name: tensor.detach().cpu().numpy() for name, tensor in given.items()})
        except Exception as error:
            finding = f"fails in ONNX Runtime ({first_line(error)})"
            raise UnrollError(Problem(place, finding, "give inputs that fit it")) from error
        return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}

    return run


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Return the tensors in what a model takes or returns, in the order that a file of it has.

    Example:
        >>> tensors_in((torch.ones(1), None, {"state": (torch.zeros(2), 3)}))
        [tensor([1.]), tensor([0., 0.])]
    """
    return [value for value in pytree.tree_leaves(values) if isinstance(value, torch.Tensor)]


def named_as(names: Sequence[str], result: Any) -> Any:
    """Return a model's result as that of a file of it, with these names for its tensors, if there are as many.

    Example:
        >>> named_as(["output", "h_n"], (torch.ones(1), [torch.zeros(2)]))
        {'output': tensor([1.]), 'h_n': tensor([0., 0.])}
    """
    tensors = tensors_in(result)
    return dict(zip(names, tensors, strict=True)) if len(tensors) == len(names) else result


# By a part of what ONNX Runtime says: what to do.
FIXES = {
    "NOT_IMPLEMENTED": "export in float32, or pass check=False for another runtime",
    "under development": "ask for an older opset_version, or pass check=False for another runtime",
    "Unsupported model IR version": "install a newer ONNX Runtime, or write the file for an older version",
    "INVALID_PROTOBUF": "give the path of an ONNX file",
    "ShapeInferenceError": "torch's exporter wrote that node if it is no step of a layer: change the operation",
}


def _fix(reason: str) -> str:
    return next((fix for part, fix in FIXES.items() if part in reason), "report this model")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
