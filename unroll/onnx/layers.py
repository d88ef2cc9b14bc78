"""The operator `unroll::Recurrence`: a whole layer or cell of torch, on its way through torch's exporter."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from unroll.core import schedule
from unroll.core.layout import Frozen, Layout
from unroll.core.options import Steps
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence
from unroll.core.weights import Tensorlike, Weights
from unroll.onnx.calls import Call
from unroll.onnx.constants import known_tensor
from unroll.onnx.sizes import reshape_to
from unroll.onnx.writer import OnnxWriter

DOMAIN = "unroll"
"""The domain of the operator `Recurrence`."""

LAYER = "unroll.layer"
"""The key under which the metadata of such a node may hold the layer's name."""


def is_layer(node: ir.Node) -> bool:
    """Tell whether a node is an `unroll::Recurrence`."""
    return node.op_type == "Recurrence" and node.domain == DOMAIN


class LayerCall(Call):
    """An `unroll::Recurrence` node: a whole layer or cell of torch, with torch's arguments and results.

    Inputs are the input, an initial state for each of the cell's, the weights in torch's order, and lengths if the
    input is `padded`; the output is then rows. Attributes are the fields of `Recurrence`, `batched` and `padded`, and
    `plan`: that of a frozen layer, whose weights are laid out for it, else empty.
    """

    has_any_length = False

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        fields: dict[str, Any] = {key: attribute.value for key, attribute in node.attributes.items()}
        self.batched, self.padded = bool(fields.pop("batched")), bool(fields.pop("padded"))
        plan = fields.pop("plan")
        self.plan = Plan.of(plan) if plan else None
        flags = ("bias", "batch_first", "bidirectional", "is_cell", "reverse")
        fields |= {flag: bool(fields[flag]) for flag in flags}
        self.recurrence = Recurrence(**fields)
        super().__init__(node, name, steps)

    @property
    def states(self) -> list[ir.Value | None]:
        return [self.input(1 + k) for k in range(len(self.recurrence.state_sizes))]

    @property
    def lengths(self) -> ir.Value | None:
        return self.node.inputs[-1] if self.padded else None

    @property
    def parameters(self) -> list[ir.Value | None]:
        end = len(self.node.inputs) - self.padded
        return list(self.node.inputs[1 + len(self.recurrence.state_sizes) : end])

    def lay_out(self, writer: OnnxWriter, plan: Plan) -> Layout:
        if self.plan is None:
            return super().lay_out(writer, plan)
        # The form follows from the plan; what is in it was laid out before, and is read in the order of the inputs.
        form = Frozen.form(self.recurrence, self.plan, self.dtype)
        constants = (known_tensor(value) for value in self.parameters if value is not None)
        writer.enter("frozen")
        return form.mapped(lambda _, kind: writer(next(constants), kind), self.dtype)

    def weights(self, writer: OnnxWriter) -> list[Weights]:
        first = 1 + len(self.recurrence.state_sizes)
        ranks = [1 if name.startswith("bias") else 2 for name in self.recurrence.flat_names]
        flat = [self.operand(writer, first + k, rank) for k, rank in enumerate(ranks)]
        return self.recurrence.weights(flat)

    def results(
        self, writer: OnnxWriter, result: schedule.Result, lead: tuple[Tensorlike, Tensorlike]
    ) -> list[Tensorlike]:
        recurrence = self.recurrence
        states = schedule.joined_states(recurrence, result, batched=self.batched)
        if recurrence.is_cell:
            return states
        if self.padded:
            return [schedule.joined_rows(result.outputs), *states]
        if self.steps is not None or not self.batched:
            return [schedule.joined_output(recurrence, result.outputs, batched=self.batched), *states]
        # T is open: the rows get their axes from the running model.
        size = len(result.outputs) * recurrence.output_size
        rows = schedule.joined_rows(result.outputs)
        output = reshape_to(writer, rows, *lead, size, batch=1)
        return [torch.transpose(output, 0, 1) if recurrence.batch_first else output, *states]
