"""Recurrent nodes of an ONNX graph: what each runs, and on what."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from unroll.core import schedule
from unroll.core.errors import Problem, UnrollError
from unroll.core.layout import Layout, lay_out
from unroll.core.options import Steps, choose_steps
from unroll.core.plan import Plan
from unroll.core.presets import Situation
from unroll.core.recurrence import Recurrence
from unroll.core.weights import Tensorlike, Variant, Weights
from unroll.onnx.constants import constant, is_zero, known_tensor
from unroll.onnx.writer import OnnxWriter

FLOATS = {
    tensor_adapters.from_torch_dtype(dtype): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""The types that a node may compute in, as torch's"""


class Call:
    """A recurrent node, read and checked, to be replaced later. The kinds say where they find what it needs."""

    recurrence: Recurrence
    batched = True
    plan: Plan | None = None
    """The plan that a frozen layer was laid out for; None for others"""
    has_any_length = True
    """True if the running model must check lengths, from zero to T, and write zeros past the end of a row, which are
    all that there is of a row of length zero, last states included; False if whoever reads the results does"""
    variants: Sequence[Variant | None] = ()
    trusted = False
    """True if the sizes that are known of the input are checked in a run"""
    uncounted: Collection[ir.Value] = ()
    """The states and lengths whose rows the running model must count, as they may be too many or too few"""

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        self.node = node
        self.name = name
        self.dtype = self._dtype()
        self.steps, guarded = self._steps(steps)
        self.guarded: Sequence[int] = [self.time] if guarded else []

    def weights(self, writer: OnnxWriter) -> list[Weights]:
        """Return the parameters of each layer and direction, as tensors where they are known and else as values."""
        raise NotImplementedError

    def results(
        self, writer: OnnxWriter, result: schedule.Result, lead: tuple[Tensorlike, Tensorlike]
    ) -> list[Tensorlike]:
        """Return the node's results in its order; `lead` is T and B, each of shape `[1]`."""
        raise NotImplementedError

    @property
    def states(self) -> list[ir.Value | None]:
        """The initial states; None for zeros."""
        raise NotImplementedError

    @property
    def lengths(self) -> ir.Value | None:
        return None

    @property
    def time(self) -> int:
        """The axis of the steps in the input."""
        return self.recurrence.time_axis if self.batched else 0

    @property
    def batch(self) -> int | None:
        """The axis of the batch in the input; None where there is none."""
        return self.recurrence.batch_axis if self.batched else None

    @property
    def rows(self) -> list[ir.Value]:
        """The states and lengths, which must have as many rows as the input."""
        return [value for value in self.states if value is not None]

    @property
    def parameters(self) -> list[ir.Value | None]:
        """The node's inputs that are weights."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """The number of dimensions of the input, and of a state."""
        return self.recurrence.rank(batched=self.batched)

    def situation(self) -> Situation:
        """Return what the rules of presets ask about it."""
        shape, axis = self.shape(self.given), self.batch
        batch = None if shape is None or axis is None else shape[axis]
        packed, frozen = self.lengths is not None, self.plan is not None
        return Situation(self.recurrence, self.steps, batch, packed, kind="onnx", frozen=frozen)

    def input(self, k: int) -> ir.Value | None:
        return self.node.inputs[k] if k < len(self.node.inputs) else None

    @property
    def given(self) -> ir.Value:
        """The node's input sequence."""
        x = self.input(0)
        assert x is not None
        return x

    def attribute(self, name: str, default: Any = None) -> Any:
        attribute = self.node.attributes.get(name)
        return default if attribute is None else attribute.value

    def shape(self, value: ir.Value | None) -> tuple[int | None, ...] | None:
        """Return the sizes of a value, None for each that is not known; None if not even their number is."""
        shape = None if value is None else value.shape
        if shape is None:
            tensor = None if value is None else constant(value)
            return None if tensor is None else tuple(int(n) for n in tensor.shape)  # pyright: ignore[reportArgumentType]
        return tuple(n if isinstance(n, int) else None for n in shape.dims)

    def known_size(self, axis: int) -> list[int] | None:
        """Return the size of the input on an axis, as `[size]`; None where the running model may have another."""
        if axis == self.time and self.steps is not None and not self.recurrence.is_cell:
            return [self.steps]
        size = (self.shape(self.given) or {axis: None})[axis] if self.trusted else None
        return None if size is None else [size]

    def _dtype(self) -> torch.dtype:
        for value in self.node.inputs[:3]:
            found = value and (value.dtype or getattr(constant(value), "dtype", None))
            if found:
                if found in FLOATS:
                    return FLOATS[found]
                raise UnrollError(Problem(self.name, f"computes in {found.name}", "use a floating-point type"))
        fix = "give the model's inputs types, which onnx.checker demands too"
        raise UnrollError(Problem(self.name, "the type of its input is unknown", fix))

    def _steps(self, steps: Steps) -> tuple[int | None, bool]:
        """Return the number of time steps, None if it is open, and whether the running model must check it."""
        if self.recurrence.is_cell:
            return 1, False
        asked = steps.get(self.name) if isinstance(steps, Mapping) else steps
        shape = self.shape(self.given)
        known = shape[self.time] if shape else None
        if known == 0:
            raise UnrollError(Problem(self.name, "has 0 time steps", "give it a sequence of at least one"))
        return choose_steps(self.name, known, asked), known is None and asked is not None

    def initial(self, writer: OnnxWriter) -> tuple[Tensorlike | None, ...]:
        """Return the initial states as values, None for zeros."""
        values = [None if value is None or self.is_left_out(value) else value for value in self.states]
        return tuple(None if value is None else self.read(writer, value, self.rank) for value in values)

    def is_left_out(self, state: ir.Value) -> bool:
        """Tell whether an initial state is zeros for sure, and has as many rows as the input."""
        return is_zero(state) and state not in self.uncounted

    def lay_out(self, writer: OnnxWriter, plan: Plan) -> Layout:
        """Lay out the weights as the steps want them."""
        return lay_out(self.recurrence, self.weights(writer), plan, self.dtype, writer)

    def operand(self, writer: OnnxWriter, k: int, rank: int) -> Any:
        """Return an input of the node: a tensor if it is constant, else a value; None if it is not given."""
        value = self.input(k)
        if value is None:
            return None
        constant = known_tensor(value)
        return self.read(writer, value, rank) if constant is None else constant

    def read(self, writer: OnnxWriter, value: ir.Value, rank: int) -> Tensorlike:
        """Return a value of the graph that the node reads."""
        return writer.value(value, self.dtype, rank)
