"""Uses of operators in an ONNX model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from unroll.core.errors import Problem, UnrollError
from unroll.targets.uses import CONSTANT, INPUT, Operand, Use

CONTROL_FLOW = {"If", "Loop", "Scan", "SequenceMap"}

RANDOM = {"RandomNormal", "RandomUniform"}
"""Operators that take nothing, and are computed anew in each run"""


def read_onnx(model: ir.Model) -> tuple[list[Use], int]:
    """Return the uses of operators in a model, also in loops, branches and functions, and its version of the standard.

    Raises:
        UnrollError: if its functions cannot be written out.
    """
    model = model.clone()  # the passes change it
    try:
        if model.functions:
            common.InlinePass()(model)
        common.ShapeInferencePass(check_type=False, strict_mode=False)(model)
    except Exception as error:
        finding = f"cannot be prepared ({type(error).__name__}: {error.__cause__ or error})"
        raise UnrollError(Problem("model", finding, "make it one that onnx.checker accepts")) from error
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    return list(_Reader(model).uses()), opset


class _Reader:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.known: dict[int, bool] = {}

    def uses(self) -> Iterator[Use]:
        graph = self.model.graph
        for value in graph.inputs:
            if value.name not in graph.initializers:
                yield Use(value.name or INPUT, INPUT, outputs=[self.operand(value)])
        for held in (graph, *graph.subgraphs()):
            for value in held.initializers.values():
                yield Use(value.name or CONSTANT, CONSTANT, outputs=[self.operand(value)])
        for node in graph.all_nodes():
            yield self.use(node)

    def use(self, node: ir.Node) -> Use:
        schema = self.schema(node)
        used = [k for k, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]
        formal = [] if schema is None else list(schema.inputs)
        inputs, variables = {}, {}
        for k, value in enumerate(node.inputs):
            if value is None:
                continue
            # The last parameter takes all inputs that are left, and these are numbered.
            parameter = formal[min(k, len(formal) - 1)] if formal else None
            listed = parameter is not None and (k >= len(formal) or parameter.option.name == "Variadic")
            name = str(k) if parameter is None else parameter.name
            name = f"{name}.{k - len(formal) + 1}" if listed else name
            inputs[name] = self.operand(value)
            variables[name] = "" if parameter is None else parameter.type_str
        outputs = [self.operand(value) for value in node.outputs[: used[-1] + 1 if used else 0]]
        return Use(
            node.name or next((v.name for v in node.outputs if v.name), None) or node.op_type,
            f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type,
            inputs,
            {a.name: _plain(a.value) for a in node.attributes.values() if a.type != ir.AttributeType.GRAPH},
            outputs,
            self.typed(node, schema, inputs, variables, outputs),
            control_flow=node.op_type in CONTROL_FLOW,
        )

    def schema(self, node: ir.Node) -> Any:
        domain = "" if node.domain == "ai.onnx" else node.domain
        version = self.model.opset_imports.get(domain, self.model.opset_imports.get(node.domain, 1))
        known = onnx.defs.has(node.op_type, max_inclusive_version=version, domain=domain)
        return onnx.defs.get_schema(node.op_type, max_inclusive_version=version, domain=domain) if known else None

    def typed(
        self,
        node: ir.Node,
        schema: Any,
        inputs: dict[str, Operand],
        variables: dict[str, str],
        outputs: list[Operand],
    ) -> dict[str, Operand]:
        """Return the inputs of the type that the result has, else those of the first input's; results of any type too.

        What is of one type by the standard, such as shapes, is left out.
        """
        if schema is None:
            return dict(list(inputs.items())[:1])
        # variables of the schema, such as T, that stand for several types
        free = {c.type_param_str for c in schema.type_constraints if len(c.allowed_type_strs) > 1}
        result = schema.outputs[0].type_str if schema.outputs else ""
        main = result if result in variables.values() else next(iter(variables.values()), "")
        typed = {name: inputs[name] for name, variable in variables.items() if variable == main}
        if outputs and result in free and result not in variables.values() and node.op_type not in QUANTIZING:
            typed[schema.outputs[0].name] = outputs[0]
        return typed

    def operand(self, value: ir.Value) -> Operand:
        dtype = None if value.dtype is None else _name(value.dtype)
        if dtype and not isinstance(value.type, (ir.TensorType, type(None))):
            dtype = f"{type(value.type).__name__.removesuffix('Type').lower()} of {dtype}"
        shape = None if value.shape is None else tuple(n if isinstance(n, int) else None for n in value.shape.dims)
        return Operand(dtype, shape, self.constant(value))

    def constant(self, value: ir.Value) -> bool:
        """Tell whether it is stored, or computed from nothing else than what is stored."""
        start = [value]
        while start:  # by hand, as a graph may be deeper than Python's stack
            current = start[-1]
            node = current.producer()
            waits = [v for v in (node.inputs if node else ()) if v is not None and id(v) not in self.known]
            # decided once all inputs of its node are, which are put on the stack above it until then
            if id(current) in self.known or not (node and waits):
                stored = current.is_initializer() or current.const_value is not None
                folded = node is not None and node.op_type not in CONTROL_FLOW | RANDOM and self.fixed(node)
                self.known.setdefault(id(current), stored or folded)
                start.pop()
            else:
                start += waits
        return self.known[id(value)]

    def fixed(self, node: ir.Node) -> bool:
        return all(value is None or self.known[id(value)] for value in node.inputs)


QUANTIZING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
"""Operators that change types by their nature: tables are about what they take."""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())
