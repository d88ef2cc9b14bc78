"""Recurrent nodes of an ONNX graph: what each runs, and plain operators in its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from unroll.core import schedule
from unroll.core.cells import Value, Variant, Weights
from unroll.core.layout import Frozen
from unroll.core.plan import Plan
from unroll.core.recurrence import Problem, Recurrence, UnrollError
from unroll.core.scan import Rows
from unroll.onnx import loops
from unroll.onnx.writer import OnnxWriter

Steps = int | Mapping[str, int] | None
"""The number of time steps, for all layers or by the node's name."""

DOMAIN = "unroll"
"""Of the operator `Recurrence`: a whole layer or cell of torch, on its way through torch's exporter."""

LAYER = "unroll.layer"
"""Under which the metadata of such a node may hold the layer's name."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Site:
    """A recurrent node, read and checked, to be replaced later. The kinds say where they find what it needs."""

    recurrence: Recurrence
    batched = True
    plan: Plan | None = None
    """Of a layer that has its own, frozen in it"""
    zeros_past_end = True
    """Whether the output of a row that has ended is read, and must be zeros then"""
    variants: Sequence[Variant | None] = ()
    uncounted: Collection[ir.Value] = ()
    """Of the states and lengths, those whose rows the running model must count, as they may be too many or too few"""

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        self.node = node
        self.name = name
        self.dtype = self._dtype()
        self.steps, guarded = self._steps(steps)
        self.guarded: Sequence[int] = [self.time] if guarded else []

    def weights(self, writer: OnnxWriter) -> list[Weights]:
        """The parameters of each layer and direction, as tensors where they are known and else as values."""
        raise NotImplementedError

    def results(self, writer: OnnxWriter, result: schedule.Result, lead: tuple[Value, Value]) -> list[Value]:
        """What the node returns, in its order."""
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
        return 1 if self.batched and self.recurrence.batch_first else 0

    @property
    def batch(self) -> int | None:
        """The axis of the batch in the input; None where there is none."""
        return (0 if self.recurrence.is_cell else 1 - self.time) if self.batched else None

    @property
    def rows(self) -> list[ir.Value]:
        """What must have as many rows as the input, a state or lengths."""
        return [value for value in self.states if value is not None and not _is_zero(value)]

    @property
    def parameters(self) -> list[ir.Value | None]:
        """The node's inputs that are weights."""
        raise NotImplementedError

    @property
    def rank(self) -> int:
        """Of the input, and of a state."""
        return (1 if self.recurrence.is_cell else 2) + self.batched

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
        """The sizes of a value, with None for those that are not known."""
        shape = None if value is None else value.shape
        if shape is None:
            tensor = None if value is None else _constant(value)
            return None if tensor is None else tuple(int(n) for n in tensor.shape)  # pyright: ignore[reportArgumentType]
        return tuple(n if isinstance(n, int) else None for n in shape.dims)

    def _dtype(self) -> torch.dtype:
        for value in self.node.inputs[:3]:
            found = value and (value.dtype or getattr(_constant(value), "dtype", None))
            if found:
                dtype = tensor_adapters.to_torch_dtype(found)
                if dtype in FLOATS:
                    return dtype
                raise UnrollError(Problem(self.name, f"computes in {dtype}", "use a floating-point type"))
        mend = "give the model's inputs types, which onnx.checker demands too"
        raise UnrollError(Problem(self.name, "the type of its input is unknown", mend))

    def _steps(self, steps: Steps) -> tuple[int | None, bool]:
        """The number of time steps, or None if only the running model knows it; and whether it must be checked then."""
        if self.recurrence.is_cell:
            return 1, False
        asked = steps.get(self.name) if isinstance(steps, Mapping) else steps
        shape = self.shape(self.given)
        known = shape[self.time] if shape else None
        if known == 0:
            raise UnrollError(Problem(self.name, "has 0 time steps", "give it a sequence of at least one"))
        if asked is None or asked == known:
            return known, False
        if known is not None:
            mend = f"leave out steps={asked} or make it {known}"
            raise UnrollError(Problem(self.name, f"has {known} time steps", mend))
        if type(asked) is not int or asked < 1:
            raise UnrollError(Problem(self.name, f"steps={asked!r}", "give a whole number from 1 upwards"))
        return asked, True

    def write(self, writer: OnnxWriter, plan: Plan, prepared: dict[Any, schedule.Layout]) -> list[Value]:
        """Write what the node computes and return its results.

        Args:
            writer: of the graph that holds the node.
            plan: how the steps are laid out.
            prepared: constant weights that other nodes laid out, for nodes that share them.
        """
        recurrence = self.recurrence
        writer.enter("given")
        x = writer.value(self.given, self.dtype, self.rank)
        lead = self._lead(writer, x)
        for axis in self.guarded:
            x = self._fixed(writer, x, axis)
        rows = schedule.flat_rows(recurrence, x, batched=self.batched)
        state = self._counted(writer, self._state(writer), lead)
        layout = self._prepared(writer, plan, prepared)
        wide = torch.float32 if layout.passes[0].precision else self.dtype
        looping = not recurrence.is_cell and (self.steps is None or plan.block is not None)
        loop, padding = None, self._mask(writer, lead, looping=looping)
        if looping:
            dtypes = (self.dtype, wide)[: len(recurrence.state_sizes)]
            loop = loops.scan(
                writer, recurrence, lead, layout.widths, dtypes, padding, steps=self.steps, block=plan.block or 1
            )
        elif padding is not None:
            state = self._zeros_for(writer, state, lead)
        result = schedule.run(
            recurrence, layout, rows, state, steps=self.steps or 1, mask=padding, loop=loop, names=writer
        )
        writer.enter("results")
        if padding is not None and self.zeros_past_end:
            size = recurrence.output_size
            shown = [torch.where(padding, output.rows(), 0.0) for output in result.outputs]
            result = result._replace(outputs=[Rows(rows, self.steps, size) for rows in shown])
        return self.results(writer, result, lead)

    def _lead(self, writer: OnnxWriter, x: Value) -> tuple[Value, Value]:
        """T and B when the model runs, each of shape `[1]`. Not written unless something reads it."""
        shape = writer.op("Shape", x, dtype=torch.int64, rank=1)

        def size(axis: int | None) -> Value:
            if axis is None:
                return writer.value(writer.operand([1], torch.int64), torch.int64, 1)
            if writer.opset < 15:
                return writer.op("Gather", shape, [axis], rank=1)
            attributes = {"start": axis, "end": axis + 1}
            return writer.op("Shape", x, dtype=torch.int64, rank=1, attributes=attributes)

        return size(self.time), size(self.batch)

    def _fixed(self, writer: OnnxWriter, x: Value, axis: int) -> Value:
        """The input, by an operator that fails for another number of steps, or of features, than is written out.

        A Split into one piece of that many does; two Reshapes in a row would be made one by ONNX Runtime, and pass.
        """
        size = self.steps if axis == self.time else self.recurrence.input_size
        assert size is not None
        (piece,) = writer.split(x, [size], axis)
        return piece

    def _state(self, writer: OnnxWriter) -> tuple[Value | None, ...]:
        values = [None if value is None or _is_zero(value) else value for value in self.states]
        return tuple(None if value is None else writer.value(value, self.dtype, self.rank) for value in values)

    def _counted(
        self, writer: OnnxWriter, state: tuple[Value | None, ...], lead: tuple[Value, Value]
    ) -> tuple[Value | None, ...]:
        """The state, as rows where they must be counted: a Reshape fails for another number than the input's.

        It does so if it allows zeros, as it can from version 14 on. Before, ONNX Runtime puts -1 for a size that is
        not known; there a Split into one piece counts.
        """
        sizes = self.recurrence.state_sizes
        count = self._rows_of_all(writer, lead)
        shapes = {size: loops.shape_of(writer, count, size) for size in sizes}

        def counted(given: ir.Value | None, value: Value | None, size: int) -> Value | None:
            if value is None or given not in self.uncounted:
                return value
            if writer.opset < 14:
                return loops.piece(writer, value, lead[1], value.rank - 2)
            rows = loops.shaped(writer, value, shapes[size], rank=2)
            rows.width = size
            return rows

        return tuple(map(counted, self.states, state, sizes))

    def _zeros_for(
        self, writer: OnnxWriter, state: tuple[Value | None, ...], lead: tuple[Value, Value]
    ) -> tuple[Value, ...]:
        """The state, with zeros written out."""
        count, sizes = self._rows_of_all(writer, lead), self.recurrence.state_sizes
        return tuple(loops.zeros(writer, count, size, self.dtype) if s is None else s for s, size in zip(state, sizes))

    def _rows_of_all(self, writer: OnnxWriter, lead: tuple[Value, Value]) -> Value:
        """How many rows the states of all layers and directions have."""
        passes, (_, batch) = self.recurrence.passes, lead
        return batch if passes == 1 else writer.op("Mul", batch, [passes], rank=1)

    def _mask(self, writer: OnnxWriter, lead: tuple[Value, Value], *, looping: bool) -> Value | None:
        """`[T * B, 1]`, boolean: the rows that have a step; None if all have."""
        if self.lengths is None:
            return None
        lengths = writer.op("Cast", writer.value(self.lengths, torch.int32, 1), dtype=torch.int64, attributes={"to": 7})
        if self.steps is not None and not looping:
            steps: Any = torch.arange(self.steps).reshape(-1, 1)
        else:
            zero, one = (writer.operand(n, torch.int64) for n in (0, 1))
            assert zero is not None and one is not None
            end = writer.op("Squeeze", lead[0], rank=0)
            steps = writer.op(
                "Range", writer.value(zero, torch.int64, 0), end, writer.value(one, torch.int64, 0), rank=1
            )
            steps = torch.reshape(steps, (-1, 1))
        if self.lengths in self.uncounted:
            lengths = loops.piece(writer, lengths, lead[1], 0)
        going = writer.op("Less", steps, torch.reshape(lengths, (1, -1)), dtype=torch.bool, rank=2)
        return torch.reshape(going, (-1, 1))

    def _prepared(self, writer: OnnxWriter, plan: Plan, prepared: dict[Any, schedule.Layout]) -> schedule.Layout:
        """The weights as the steps want them, laid out once for nodes that share them."""
        known = all(value is None or _known(value) is not None for value in self.parameters)
        key = (self.recurrence, tuple(map(id, self.parameters))) if known else self
        if key not in prepared:
            prepared[key] = self._layout(writer, plan)
        if not self.variants:
            return prepared[key]
        passes, stacks, widths = prepared[key]
        passes = [p._replace(variant=variant) for p, variant in zip(passes, self.variants, strict=True)]
        alike = len(set(self.variants)) == 1
        return schedule.Layout(passes, [p._replace(variant=self.variants[0]) for p in stacks if alike], widths)

    def _layout(self, writer: OnnxWriter, plan: Plan) -> schedule.Layout:
        return schedule.prepare(self.recurrence, self.weights(writer), plan, self.dtype, writer)

    def operand(self, writer: OnnxWriter, k: int, rank: int) -> Any:
        """An input of the node: a tensor if it is constant, else a value."""
        value = self.input(k)
        if value is None:
            return None
        constant = known_tensor(value)
        return writer.value(value, self.dtype, rank) if constant is None else constant


class TorchSite(Site):
    """An `unroll::Recurrence` node: a whole layer or cell of torch, with torch's arguments and results.

    Inputs are the input, an initial state for each of the cell's, the weights in torch's order, and lengths if the
    input is `padded`; the output is then rows. Attributes are the fields of `Recurrence`, `batched` and `padded`, and
    `plan`: that of a frozen layer, whose weights are laid out for it, else empty.
    """

    zeros_past_end = False

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

    def _layout(self, writer: OnnxWriter, plan: Plan) -> schedule.Layout:
        if self.plan is None:
            return super()._layout(writer, plan)
        # Its form follows from the plan; what is in it was laid out before.
        shapes = [torch.empty(shape, device="meta") for shape in self.recurrence.weight_shapes]
        form = schedule.prepare(self.recurrence, self.recurrence.weights(shapes), self.plan)
        constants = (known_tensor(value) for value in self.parameters if value is not None)
        writer.enter("frozen")
        return Frozen(form, self.dtype).filled(lambda kind: writer(next(constants), kind), self.dtype)

    def weights(self, writer: OnnxWriter) -> list[Weights]:
        first = 1 + len(self.recurrence.state_sizes)
        names = [name for group in self.recurrence.weight_names for name in group]
        ranks = [1 if name.startswith("bias") else 2 for name in names]
        flat = [self.operand(writer, first + k, rank) for k, rank in enumerate(ranks)]
        return self.recurrence.weights(flat)

    def results(self, writer: OnnxWriter, result: schedule.Result, lead: tuple[Value, Value]) -> list[Value]:
        recurrence = self.recurrence
        states = schedule.joined_states(recurrence, result.finals, batched=self.batched)
        if recurrence.is_cell:
            return states
        if self.padded:
            return [schedule.joined_rows(result.outputs), *states]
        if self.steps is not None or not self.batched:
            return [schedule.joined_output(recurrence, result.outputs, batched=self.batched), *states]
        size = len(result.outputs) * recurrence.output_size
        rows = schedule.joined_rows(result.outputs)
        output = loops.reshaped(writer, rows, *lead, size)
        return [torch.transpose(output, 0, 1) if recurrence.batch_first else output, *states]


def _known(value: ir.Value) -> Any:
    """What a value always is, if that is known: an initializer that is no input of the model, or a constant."""
    if value.is_graph_input():
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Identity" and producer.domain == "" and producer.inputs[0]:
        return _known(producer.inputs[0])
    return _constant(value)


def known_tensor(value: ir.Value) -> torch.Tensor | None:
    """What a value always is, as a tensor of torch, if that is known."""
    tensor = _known(value)
    if tensor is None:
        return None
    raw = tensor.raw if isinstance(tensor, tensor_adapters.TorchTensor) else None
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    dtype = tensor_adapters.to_torch_dtype(tensor.dtype)
    try:
        array = tensor.numpy()
    except (OSError, ValueError) as error:  # no file there, or one that is too short
        mend = "give the path of the model in place of what was read from it, with its data whole"
        raise UnrollError(
            Problem(str(value.name), f"its data is in a file that cannot be read ({error})", mend)
        ) from error
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.view("uint16").copy()).view(dtype)
    return torch.from_numpy(array.copy())


def _constant(value: ir.Value) -> Any:
    """The tensor of an initializer or a `Constant` node, if the value is one."""
    producer = value.producer()
    if (
        producer is not None
        and producer.op_type == "Constant"
        and producer.domain == ""
        and "value" in producer.attributes
    ):
        attribute = producer.attributes["value"]
        return None if attribute.is_ref() else attribute.as_tensor()  # get_const_tensor would name the tensor
    return ir.convenience.get_const_tensor(value)


def _is_zero(value: ir.Value) -> bool:
    """Whether a value is known to be zeros, also of a size that only the running model knows."""
    producer = value.producer()
    if producer is not None and producer.domain == "" and producer.op_type in ("Expand", "Identity"):
        first = producer.inputs[0]
        return first is not None and _is_zero(first)
    if producer is not None and producer.domain == "" and producer.op_type == "ConstantOfShape":
        filled = producer.attributes.get("value")
        return filled is None or (filled.ref_attr_name is None and not filled.as_tensor().numpy().any())
    tensor = known_tensor(value)
    return tensor is not None and not tensor.any()
