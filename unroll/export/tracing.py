"""PyTorch models as ONNX models by a trace: torch's older exporter, for code that `torch.export` cannot follow.

A trace sees one run. Branches, loops and numbers that data decide stay as they were in it.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn
from torch.jit import TracerWarning
from torch.utils import _pytree as pytree

from unroll.core.errors import Problem, Problems, UnrollError, innermost
from unroll.core.options import Rules, Where
from unroll.core.patching import alone, collected_warnings
from unroll.export.capture import OURS, TORCH, layers_as_nodes, prepare
from unroll.export.inputs import Leaf, tensor_leaves
from unroll.export.translate import check_asked, check_given, quiet
from unroll.onnx.layers import DOMAIN, LAYER, is_layer

NEWEST = 20
"""The newest version of the standard's operators that torch's older exporter writes"""

OPSET = 18
"""The version of the standard's operators that is written if none is asked for"""


class Traced(NamedTuple):
    """A model as a trace."""

    model: ir.Model
    frozen: list[str]
    """The places, file and line, where the run has decided something for good, and what"""


def trace_model(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    dynamic_shapes: Any = None,
    where: Where = None,
    rules: Rules | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
) -> Traced:
    """Trace a model, and return it with every recurrent layer as one `unroll::Recurrence` node.

    Raises:
        UnrollError: for layers that cannot be honoured, for a model that changes its buffers, and if the trace or
            torch's exporter fails.
    """
    check_asked(input_names, output_names, opset_version, NEWEST)
    place = type(model).__name__
    model, args, kwargs = prepare(model, args, kwargs, where, rules)
    leaves = tensor_leaves(model, args, kwargs, dynamic_shapes)
    asked = list(input_names or ())
    names = asked[: len(leaves)] + [leaf.name for leaf in leaves[len(asked) :]]
    before = {name: (id(value), value._version) for name, value in model.named_buffers()}
    flat = _Flat(model, args, kwargs).eval()
    with (
        tempfile.TemporaryDirectory() as folder,
        alone(exports=True),
        collected_warnings(TracerWarning) as told,
        quiet(),
    ):
        path = Path(folder) / "model.onnx"
        try:
            with layers_as_nodes(model, every=where is None), torch.no_grad():
                torch.onnx.export(
                    flat,
                    tuple(leaf.tensor for leaf in leaves),
                    path,
                    dynamo=False,
                    verbose=False,
                    input_names=names,
                    output_names=None,
                    opset_version=OPSET if opset_version is None else opset_version,
                    dynamic_axes={name: leaf.open for name, leaf in zip(names, leaves) if leaf.open},
                    custom_opsets={DOMAIN: 1},
                )
        except UnrollError:
            raise
        except Exception as error:
            cause = innermost(error)
            finding = f"cannot be traced ({type(cause).__name__}: {str(cause).splitlines()[0]})"
            raise UnrollError(Problem(place, finding, "make torch.jit.trace(model, args) work first")) from error
        written = ir.external_data.load_to_model(ir.load(path))
    problems = Problems(
        Problem(name, "is a buffer that the model changes, and an ONNX file keeps none", "return it instead")
        for name, value in model.named_buffers()
        if before.get(name) != (id(value), value._version)
    )
    problems.check()
    _keep_inputs(written, names, leaves)
    _name_outputs(written, output_names or ())
    check_given(written, input_names, output_names).check()
    _name_layers(written)
    reasons = (f"{place}: {_reason(warning.text)}" for warning in told if (place := _place(warning.frames)))
    return Traced(written, list(dict.fromkeys(reasons)))


class _Flat(nn.Module):
    """A model as a function of tensors alone, which returns a tuple of tensors."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.flat, self.spec = pytree.tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        flat = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.flat]
        args, kwargs = pytree.tree_unflatten(flat, self.spec)
        return tuple(leaf for leaf in pytree.tree_leaves(self.model(*args, **kwargs)) if isinstance(leaf, Tensor))


def _place(frames: Sequence[tuple[str, int, str]]) -> str | None:
    """Return the file and line of the model where something was decided; None for what is known of here."""
    # modes of torch functions stand between a function and its caller
    rest = [f for f in frames if f[2] != "__torch_function__" and f[0] != warnings.__file__]
    if rest[0][0].startswith(OURS) or rest[0][0].endswith(("torch/nn/utils/rnn.py", "torch/nn/modules/rnn.py")):
        return None
    file, line, _ = next((frame for frame in rest if not frame[0].startswith((OURS, TORCH))), rest[0])
    return f"{file}:{line}"


def _reason(text: str) -> str:
    """Return the first words of a warning of the tracer: what it has kept as a constant."""
    return re.split(r"\. | might |, but", text.strip())[0]


def _keep_inputs(model: ir.Model, names: Sequence[str], leaves: Sequence[Leaf]) -> None:
    """Give a model the inputs, too, that nothing reads, and which the exporter has left out."""
    found = {value.name: value for value in model.graph.inputs}
    for name, leaf in zip(names, leaves, strict=True):
        if name not in found:
            shape = [leaf.open.get(axis, size) for axis, size in enumerate(leaf.tensor.shape)]
            found[name] = ir.val(name, tensor_adapters.from_torch_dtype(leaf.tensor.dtype), shape)
    model.graph.inputs[:] = [found[name] for name in names]


def _name_outputs(model: ir.Model, asked: Sequence[str]) -> None:
    """Name the outputs as asked, and those after them by their number."""
    outputs = model.graph.outputs
    names = [*asked, *(f"output_{k}" if len(outputs) > 1 else "output" for k in range(len(asked), len(outputs)))]
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        if value.name in names and value not in outputs:
            value.name = f"{value.name}.inside"
    for value, name in zip(outputs, names, strict=False):
        value.name = name


def _name_layers(model: ir.Model) -> None:
    """Give each layer its path in the model, which the exporter has made the name of its node."""
    for node in model.graph.all_nodes():
        if is_layer(node):
            path = (node.name or "").strip("/").split("/")
            # ["model", "encoder", "rnn", "Recurrence_1"]
            place = ".".join(path[1:-1])
            node.metadata_props[LAYER] = place or str(node.attributes["mode"].value).lower()
