"""Models of one node, which the ONNX standard's own tests bring along, in other types too."""

from __future__ import annotations

import warnings
from collections import defaultdict
from functools import cache

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT32", "INT64", "INT8", "UINT8", "BOOL")


@cache
def node_models() -> dict[str, list[tuple[str, onnx.ModelProto]]]:
    """The standard's models of one node, by operator, each with its name.

    What is of one type by the standard, such as sizes and axes, is a constant in them, as exporters write it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    found = defaultdict(list)
    for case in cases:
        nodes = [node for node in case.model.graph.node if node.op_type != "Constant"]
        if len(nodes) == 1 and not nodes[0].domain:
            model = onnx.ModelProto()
            model.CopyFrom(case.model)
            feeds = case.data_sets[0][0] if case.data_sets else []
            fix_sizes(model, nodes[0], dict(zip((value.name for value in model.graph.input), feeds)))
            found[nodes[0].op_type].append((case.name, model))
    return dict(found)


def schema_of(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.defs.OpSchema:
    (version,) = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    return onnx.defs.get_schema(node.op_type, max_inclusive_version=version)


SIZES = {"T1", "Tind", "T2"}
"""Variables of schemas under which some operators take sizes and axes"""


def fix_sizes(model: onnx.ModelProto, node: onnx.NodeProto, feeds: dict) -> None:
    schema = schema_of(model, node)
    results = {output.type_str for output in schema.outputs}
    variables = {constraint.type_param_str for constraint in schema.type_constraints}
    for k, name in enumerate(node.input):
        variable = schema.inputs[min(k, len(schema.inputs) - 1)].type_str
        if not k or not isinstance(feeds.get(name), np.ndarray):
            continue
        if variable not in variables or (variable in SIZES - results and feeds[name].dtype.kind in "iub"):
            model.graph.initializer.append(numpy_helper.from_array(feeds[name], name))
            (value,) = [value for value in model.graph.input if value.name == name]
            model.graph.input.remove(value)


def in_type(model: onnx.ModelProto, name: str) -> onnx.ModelProto | None:
    """The same model with inputs of another type, all that are of the first one's; None if the standard has none."""
    (node,) = [node for node in model.graph.node if node.op_type != "Constant"]
    kind, schema = getattr(TensorProto, name), schema_of(model, node)
    allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    text = {"BOOL": "bool"}.get(name, name.lower())
    first = model.graph.input[0].type.tensor_type.elem_type
    variables = {
        schema.inputs[min(k, len(schema.inputs) - 1)].type_str
        for k, given in enumerate(node.input)
        for value in model.graph.input
        if value.name == given and value.type.tensor_type.elem_type == first
    }
    if not all(f"tensor({text})" in allowed.get(variable, ()) for variable in variables):
        return None
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for value in changed.graph.input:
        if value.type.tensor_type.elem_type == first:
            value.type.tensor_type.elem_type = kind
    outputs = [helper.make_empty_tensor_value_info(value.name) for value in changed.graph.output]
    del changed.graph.output[:]
    changed.graph.output.extend(outputs)
    return onnx.shape_inference.infer_shapes(changed)
