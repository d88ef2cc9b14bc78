"""PyTorch models as ONNX models by a trace: torch's older exporter, for code that `torch.export` cannot follow.

A trace sees one run. Branches, loops and numbers that data decide stay as they were in it.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor, nn
from torch.jit import TracerWarning
from torch.utils import _pytree as pytree

from unroll.core.alone import alone
from unroll.core.errors import Problem, UnrollError, innermost
from unroll.core.options import Rules, Where
from unroll.core.patching import collected_warnings, seeded
from unroll.export.capture import OURS, TORCH, layers_as_nodes, prepare, refuse_changed
from unroll.export.indices import CountedIndices
from unroll.export.inputs import Leaf, hides_tensors, is_output, tensor_leaves
from unroll.export.samples import varied_inputs
from unroll.export.translate import check_asked, check_given, quiet
from unroll.onnx.layers import LAYER, is_layer

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
    names = _input_names(leaves, input_names or ())
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
                    tuple(leaf.tensor.clone() for leaf in leaves),  # a model may write into its input
                    path,
                    dynamo=False,
                    verbose=False,
                    input_names=names,
                    output_names=None,
                    opset_version=OPSET if opset_version is None else opset_version,
                    dynamic_axes={name: leaf.open for name, leaf in zip(names, leaves) if leaf.open},
                )
        except UnrollError:
            raise
        except Exception as error:
            cause = innermost(error)
            finding = f"cannot be traced ({type(cause).__name__}: {str(cause).splitlines()[0]})"
            raise UnrollError(Problem(place, finding, "make torch.jit.trace(model, args) work first")) from error
        written = ir.external_data.load_to_model(ir.load(path))
    after = {name: (id(value), value._version) for name, value in model.named_buffers()}
    refuse_changed(name for name, state in after.items() if before.get(name) != state)
    _keep_inputs(written, names, leaves)
    _name_outputs(written, output_names or ())
    check_given(written, input_names, output_names).check()
    _name_layers(written)
    reasons = (f"{place}: {_reason(warning.text)}" for warning in told if (place := _place(warning.frames)))
    ranks = _loosen_outputs(written, flat, varied_inputs(leaves, args, kwargs))
    return Traced(written, list(dict.fromkeys([*reasons, *ranks])))


def _input_names(leaves: Sequence[Leaf], asked: Sequence[str]) -> list[str]:
    """Return the names of the inputs: as asked, then those of the arguments, with a number where two are the same."""
    names = list(asked[: len(leaves)])
    for leaf in leaves[len(names) :]:
        candidates = (leaf.name, *(f"{leaf.name}_{k}" for k in range(1, len(leaves) + 1)))
        names.append(next(name for name in candidates if name not in names))
    return names


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
        with CountedIndices():
            return self.results(args, kwargs)

    def results(self, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        results = pytree.tree_leaves(self.model(*args, **kwargs))
        if hidden := next(filter(hides_tensors, results), None):
            fix = "return tensors in tuples or dicts, or register the class by torch.export.register_dataclass"
            finding = f"returns a {type(hidden).__name__}, whose tensors a trace would lose"
            raise UnrollError(Problem(type(self.model).__name__, finding, fix))
        return tuple(map(torch.as_tensor, filter(is_output, results)))


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


def _loosen_outputs(
    model: ir.Model, flat: _Flat, others: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]
) -> list[str]:
    """Leave open, in the shapes of the outputs, what is another on other inputs: the exporter writes that of the trace.

    Inputs that the model refuses tell nothing.

    Returns:
        The outputs, and what is said of them, that have another number of axes on other inputs: a file states one.
    """
    told = []
    for args, kwargs in others:
        try:
            with torch.no_grad(), seeded():
                results = flat.results(args, kwargs)
        except Exception:
            continue
        for value, result in zip(model.graph.outputs, results, strict=False):
            if value.shape is not None and len(value.shape) != result.dim():
                told.append(f"{value.name}: {len(value.shape)} axes, which are {result.dim()} on other inputs")
            elif value.shape is not None:
                sizes = zip(value.shape, result.shape, strict=True)
                value.shape = ir.Shape([n if n == size or not isinstance(n, int) else None for n, size in sizes])
    return told


def _name_outputs(model: ir.Model, asked: Sequence[str]) -> None:
    """Name the outputs as asked, and those after them by their number."""
    outputs = model.graph.outputs
    for k, value in enumerate(outputs):
        if value in outputs[:k]:  # an output has one name, and this has another
            copy = ir.node("Identity", [value])
            copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
            model.graph.append(copy)
            outputs[k] = copy.outputs[0]
    names, taken = list(asked), {value.name for value in model.graph.inputs}
    for k in range(len(asked), len(outputs)):
        name = f"output_{k}" if len(outputs) > 1 else "output"
        names.append(f"{name}.out" if name in taken else name)
    for value in (value for node in model.graph for value in node.outputs):
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
