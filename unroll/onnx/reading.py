"""What is given as an ONNX model, as an `onnx_ir.Model` of its own in which every value that is read is there."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from unroll.core.errors import Problem, Problems, UnrollError, refusing
from unroll.onnx.layers import is_layer

LARGEST_DENSE = 2**28
"""Bytes of a sparse tensor, written out, above which it is refused: a file of a few bytes may tell of any size"""


def read_model(source: Any, argument: str = "unroll(model)") -> ir.Model:
    """Return what is given as an ONNX model, as a copy of its own, to be rewritten.

    Sparse initializers and constants, which `onnx_ir` has not, are dense in it.

    Args:
        source: an `onnx.ModelProto`, an `onnx_ir.Model`, or the path of a file.
        argument: what it was given as, for messages.

    Raises:
        UnrollError: if it is none of these, cannot be read, or is broken.

    Example:
        >>> read_model(onnx.ModelProto())
        Traceback (most recent call last):
        unroll.UnrollError: model: is not an ONNX file: it names no operator set; write it again
    """
    if isinstance(source, (str, os.PathLike)):
        place = os.fspath(source)
        model = _from_proto(_loaded(place), place, os.path.dirname(os.path.abspath(place)))
    elif isinstance(source, onnx.ModelProto):
        model = _from_proto(source, "model", os.getcwd())
    elif isinstance(source, ir.Model):
        with refusing("model", "cannot be copied", "make its clone() work first"):
            model = source.clone()
    else:
        fix = "give an onnx.ModelProto, an onnx_ir.Model or a path"
        raise UnrollError(Problem(argument, f"got {type(source).__module__}.{type(source).__name__}", fix))
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    problems = Problems(_outside(model.graph))
    for graph in graphs:
        problems += [*_dangling(graph, set()), *_foreign(graph, model)]
    problems.check()
    return model


def _loaded(path: str) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        finding = f"cannot be read ({error.strerror or error})"
        raise UnrollError(Problem(path, finding, "give the path of an ONNX file")) from error
    except Exception as error:
        finding, fix = f"is not an ONNX file, or is cut short ({type(error).__name__})", "write it again"
        if zipfile.is_zipfile(path):  # as torch writes its own
            finding, fix = "is a file of PyTorch's", "read it by torch.load, torch.jit.load or torch.export.load first"
        elif path.endswith(".py"):
            finding, fix = "is Python code", f"name the function in it that makes the model, {path}:name"
        raise UnrollError(Problem(path, finding, fix)) from error


def _from_proto(proto: onnx.ModelProto, place: str, folder: str) -> ir.Model:
    """Return the model; `folder`, which must have a name to be a bound for `onnx_ir`, holds its external data."""
    if not proto.opset_import:
        raise UnrollError(Problem(place, "is not an ONNX file: it names no operator set", "write it again"))
    if proto.training_info:
        raise UnrollError(Problem(place, "holds training information, which would be lost", "clear training_info"))
    with refusing(place, "is not valid ONNX", "fix it first"):
        model = ir.from_proto(_without_sparse(proto))
        for graph in (model.graph, *(function.graph for function in model.functions.values())):
            ir.external_data.set_base_dir(graph, folder)
    return model


def _without_sparse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with dense tensors in place of sparse ones; itself if it has none."""
    if not any(map(_is_sparse, _holders(proto))):
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for holder in _holders(copy):
        if isinstance(holder, onnx.GraphProto):
            holder.initializer.extend(map(_dense, holder.sparse_initializer))
            holder.ClearField("sparse_initializer")
        elif _is_sparse(holder):
            (attribute,) = holder.attribute
            dense = onnx.helper.make_attribute("value", _dense(attribute.sparse_tensor))
            attribute.CopyFrom(dense)
    return copy


def _is_sparse(holder: onnx.GraphProto | onnx.NodeProto) -> bool:
    if isinstance(holder, onnx.GraphProto):
        return len(holder.sparse_initializer) > 0
    return holder.op_type == "Constant" and [a.name for a in holder.attribute] == ["sparse_value"]


def _holders(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.NodeProto]:
    """Yield all graphs and nodes of a model, each graph before its nodes."""
    left: list[Any] = [proto.graph, *proto.functions]
    while left:
        graph = left.pop()
        if isinstance(graph, onnx.GraphProto):
            yield graph
        for node in graph.node:
            yield node
            for attribute in node.attribute:
                left += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    place = sparse.values.name or "sparse_value"
    with refusing(place, "is no valid sparse tensor", "write it dense"):
        onnx.checker.check_sparse_tensor(sparse)
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        size = prod(sparse.dims) * values.itemsize
        if size > LARGEST_DENSE:
            finding = f"is sparse, and of {size / 1e6:,.0f} MB when it is not"
            raise UnrollError(Problem(place, finding, "write it dense"))
        dense = np.zeros(tuple(sparse.dims), values.dtype)
        # [count] of places in all values in order, or [count, rank]
        dense[np.unravel_index(indices, dense.shape) if indices.ndim == 1 else tuple(indices.T)] = values
        return numpy_helper.from_array(dense, sparse.values.name)


def _outside(graph: ir.Graph) -> Iterator[Problem]:
    """Yield a problem for each initializer whose data is said to lie outside of the folder of its model."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            folder = os.path.realpath(tensor.base_dir or os.getcwd())
            if os.path.commonpath([folder, os.path.realpath(os.path.join(folder, tensor.location))]) != folder:
                finding = f"its data is in {os.fspath(tensor.location)}, outside of the folder of the model"
                yield Problem(str(value.name), finding, "put it beside the model")


def _dangling(graph: ir.Graph, there: set[ir.Value]) -> Iterator[Problem]:
    """Yield a problem for each value that is read before it is there; `there` are those of the graphs around."""
    own = {*graph.inputs, *graph.initializers.values()}
    there |= own
    for node in graph:
        yield from map(_unknown, (value for value in node.inputs if value is not None and value not in there))
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                yield from _dangling(attribute.as_graph(), there)
        own.update(node.outputs)
        there.update(node.outputs)
    yield from map(_unknown, (value for value in graph.outputs if value not in there))
    there -= own


def _unknown(value: ir.Value) -> Problem:
    finding = "is read before anything gives it a value"
    return Problem(str(value.name), finding, "fix the model first: onnx.checker tells where")


def _foreign(graph: ir.Graph, model: ir.Model) -> Iterator[Problem]:
    """Yield a problem for each node of the operator that stands for a layer of torch on its way to a file."""
    fix = "export the model by unroll.export_onnx, or call the operator by another name"
    for node in graph.all_nodes():
        if is_layer(node) and node.op_identifier() not in model.functions:
            place = node.name or next((str(value.name) for value in node.outputs), node.op_type)
            yield Problem(place, "is an unroll::Recurrence, which no file can hold", fix)
