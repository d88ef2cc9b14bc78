"""Recurrent nodes of an ONNX graph: what each runs, and plain operators in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from unroll import schedule
from unroll.cells import Prepared, Value, Variant, Weights
from unroll.onnx import loops
from unroll.onnx.activations import read_activations
from unroll.onnx.values import OnnxWriter
from unroll.plan import Plan
from unroll.recurrence import Problem, Recurrence, UnrollError

Steps = int | Mapping[str, int] | None
"""The number of time steps, for all layers or by the node's name."""

STANDARD = ("LSTM", "GRU", "RNN")
"""The recurrent operators of the ONNX standard."""

DOMAIN = "unroll"
"""Of the operator `Recurrence`: a whole layer or cell of torch, on its way through torch's exporter."""

LAYER = "unroll.layer"
"""Under which the metadata of such a node may hold the layer's name."""

GATES = {
    "LSTM": ("input", "output", "forget", "cell"),
    "GRU": ("update", "reset", "new"),
    "RNN": ("hidden",),
}
"""In the order in which the standard stacks them."""

ACTIVATED = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "GRU_RESETTING_FIRST": ["Sigmoid", "Tanh"],
    "RNN_TANH": ["Tanh"],
    "RNN_RELU": ["Relu"],
}
"""The standard's activations for what a node runs, if it names no others."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Site:
    """A recurrent node, read and checked, to be replaced later. The kinds say where they find what it needs."""

    recurrence: Recurrence
    batched = True
    variants: Sequence[Variant | None] = ()

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        self.node = node
        self.name = name
        self.dtype = self._dtype()
        self.steps, self.asked = self._steps(steps)

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
            tensor = None if value is None else ir.convenience.get_const_tensor(value)
            return None if tensor is None else tuple(int(n) for n in tensor.shape)  # pyright: ignore[reportArgumentType]
        return tuple(n if isinstance(n, int) else None for n in shape.dims)

    def _dtype(self) -> torch.dtype:
        for value in self.node.inputs[:3]:
            found = value and (value.dtype or getattr(ir.convenience.get_const_tensor(value), "dtype", None))
            if found:
                dtype = tensor_adapters.to_torch_dtype(found)
                if dtype in FLOATS:
                    return dtype
                raise UnrollError(Problem(self.name, f"computes in {dtype}", "use a floating-point type"))
        mend = "give the model's inputs types, which onnx.checker demands too"
        raise UnrollError(Problem(self.name, "the type of its input is unknown", mend))

    def _steps(self, steps: Steps) -> tuple[int | None, bool]:
        """The number of time steps, or None if only the running model knows it; and whether it was asked for."""
        if self.recurrence.is_cell:
            return 1, False
        asked = steps.get(self.name) if isinstance(steps, Mapping) else steps
        shape = self.shape(self.given)
        known = shape[1 if self.batched and self.recurrence.batch_first else 0] if shape else None
        if asked is None or asked == known:
            return known, False
        if known is not None:
            mend = f"leave out steps={asked} or make it {known}"
            raise UnrollError(Problem(self.name, f"has {known} time steps", mend))
        if type(asked) is not int or asked < 1:
            raise UnrollError(Problem(self.name, f"steps={asked!r}", "give a whole number from 1 upwards"))
        return asked, True

    def write(self, writer: OnnxWriter, plan: Plan, prepared: dict[Any, list[Prepared]]) -> list[Value]:
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
        if self.asked:
            x = self._fixed(writer, x)
        rows = schedule.flat_rows(recurrence, x, batched=self.batched)
        state = self._state(writer)
        weights = self._prepared(writer, plan, prepared)
        wide = torch.float32 if weights[0].precision else self.dtype
        loop, masks, mask = None, None, self._mask(writer, lead)
        padding = None if mask is None else torch.reshape(mask, (-1, 1))
        if self.steps is None:
            widths = [len(g) * recurrence.hidden_size for g in recurrence.cell.input_products(plan.gates)]
            loop = loops.scan(writer, recurrence, lead, widths, (self.dtype, wide)[: len(recurrence.state_sizes)], mask)
        elif padding is not None:
            masks = torch.chunk(padding, self.steps) if self.steps > 1 else [padding]
            state = self._zeros_for(writer, state, lead)
        result = schedule.run(
            recurrence, weights, rows, state, steps=self.steps or 1, masks=masks, loop=loop, names=writer
        )
        writer.enter("results")
        if padding is not None:
            joined = [[torch.cat(list(hs)) if len(hs) > 1 else hs[0]] for hs in result.outputs]
            result = result._replace(outputs=[[torch.where(padding, rows, 0.0)] for (rows,) in joined])
        return self.results(writer, result, lead)

    def _lead(self, writer: OnnxWriter, x: Value) -> tuple[Value, Value]:
        """T and B when the model runs, each of shape `[1]`. Not written unless something reads it."""
        shape = writer.op("Shape", x, dtype=torch.int64, rank=1)
        time, batch = (1, 0) if self.batched and self.recurrence.batch_first else (0, 1)
        one = writer.operand([1], torch.int64)
        assert one is not None
        steps = writer.op("Gather", shape, [time], rank=1)
        return steps, writer.op("Gather", shape, [batch], rank=1) if self.batched else writer.value(one, torch.int64, 1)

    def _fixed(self, writer: OnnxWriter, x: Value) -> Value:
        """The input, by an operator that fails for any other number of steps than was asked for.

        A Split into one piece of that many does; two Reshapes in a row would be made one by ONNX Runtime, and pass.
        """
        assert self.steps is not None
        (piece,) = writer.split(x, [self.steps], 1 if self.batched and self.recurrence.batch_first else 0)
        return piece

    def _state(self, writer: OnnxWriter) -> tuple[Value | None, ...]:
        values = [None if value is None or _is_zero(value) else value for value in self.states]
        return tuple(None if value is None else writer.value(value, self.dtype, self.rank) for value in values)

    def _zeros_for(
        self, writer: OnnxWriter, state: tuple[Value | None, ...], lead: tuple[Value, Value]
    ) -> tuple[Value, ...]:
        """The state, with zeros written out."""
        passes, (_, batch) = self.recurrence.passes, lead
        count = batch if passes == 1 else writer.op("Mul", batch, [passes], rank=1)
        sizes = self.recurrence.state_sizes
        return tuple(loops.zeros(writer, count, size, self.dtype) if s is None else s for s, size in zip(state, sizes))

    def _mask(self, writer: OnnxWriter, lead: tuple[Value, Value]) -> Value | None:
        """`[T, B, 1]`, boolean: the rows that have a step `t`; None if all have."""
        if self.lengths is None:
            return None
        lengths = writer.op("Cast", writer.value(self.lengths, torch.int32, 1), dtype=torch.int64, attributes={"to": 7})
        if self.steps is not None:
            steps: Any = torch.arange(self.steps).reshape(-1, 1, 1)
        else:
            zero, one = (writer.operand(n, torch.int64) for n in (0, 1))
            assert zero is not None and one is not None
            end = writer.op("Squeeze", lead[0], rank=0)
            steps = writer.op(
                "Range", writer.value(zero, torch.int64, 0), end, writer.value(one, torch.int64, 0), rank=1
            )
            steps = torch.reshape(steps, (-1, 1, 1))
        return writer.op("Less", steps, torch.reshape(lengths, (1, -1, 1)), dtype=torch.bool, rank=3)

    def _prepared(self, writer: OnnxWriter, plan: Plan, prepared: dict[Any, list[Prepared]]) -> list[Prepared]:
        """The weights as the steps want them, laid out once for nodes that share them."""
        weights = self.weights(writer)
        known = all(w is None or isinstance(w, torch.Tensor) for group in weights for w in group)
        key = (self.recurrence, tuple(map(id, self.parameters))) if known else self
        if key not in prepared:
            prepared[key] = schedule.prepare(self.recurrence, weights, plan, self.dtype, writer)
        if not self.variants:
            return prepared[key]
        return [p._replace(variant=variant) for p, variant in zip(prepared[key], self.variants, strict=True)]

    def operand(self, writer: OnnxWriter, k: int, rank: int) -> Any:
        """An input of the node: a tensor if it is constant, else a value."""
        value = self.input(k)
        if value is None:
            return None
        constant = known_tensor(value)
        return writer.value(value, self.dtype, rank) if constant is None else constant


class StandardSite(Site):
    """An `LSTM`, `GRU` or `RNN` node of the ONNX standard."""

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        self.node, self.name = node, name
        self.recurrence = self._recurrence()
        self.variants = self._variants()
        super().__init__(node, name, steps)

    def _recurrence(self) -> Recurrence:
        kind, direction = self.node.op_type, self.attribute("direction", "forward")
        problems = []
        if direction not in ("forward", "reverse", "bidirectional"):
            mend = "it is forward, reverse or bidirectional"
            problems.append(Problem(self.name, f"direction is {direction!r}", mend))
        if self.attribute("layout", 0) not in (0, 1):
            problems.append(Problem(self.name, f"layout is {self.attribute('layout')}", "it is 0 or 1"))
        w, r, x = (self.shape(self.input(k)) for k in (1, 2, 0))
        hidden = self.attribute("hidden_size") or (r[2] if r and len(r) == 3 else None)
        features = w[2] if w and len(w) == 3 and w[2] else x[2] if x and len(x) == 3 else None
        if hidden is None or features is None:
            mend = "give W and R shapes, or make them initializers"
            problems.append(Problem(self.name, "the sizes of its weights are unknown", mend))
        count, both = len(GATES[kind]), direction == "bidirectional"
        for what, shape, wanted in (
            ("W", w, (1 + both, count * (hidden or 0), features)),
            ("R", r, (1 + both, count * (hidden or 0), hidden)),
            ("B", self.shape(self.input(3)), (1 + both, 2 * count * (hidden or 0))),
        ):
            sizes = zip(shape or (), wanted, strict=False)
            if (
                hidden
                and shape is not None
                and (len(shape) != len(wanted) or any(n not in (None, m) for n, m in sizes))
            ):
                problems.append(
                    Problem(f"{self.name}: {what}", f"has shape {list(shape)}", f"it must be {list(wanted)}")
                )
        if problems:
            raise UnrollError(*problems)
        assert hidden is not None and features is not None
        mode = kind
        if kind == "GRU" and not self.attribute("linear_before_reset", 0):
            mode = "GRU_RESETTING_FIRST"
        if kind == "RNN":
            names = {name.lower() for name in self.attribute("activations") or ()}
            mode = "RNN_RELU" if names == {"relu"} else "RNN_TANH"
        return Recurrence(
            mode,
            features,
            hidden,
            bias=self.input(3) is not None,
            batch_first=bool(self.attribute("layout", 0)),
            bidirectional=both,
            reverse=direction == "reverse",
        )

    def _variants(self) -> list[Variant | None]:
        """For each direction, how its steps differ from torch's."""
        directions = len(self.recurrence.directions)
        names = list(self.attribute("activations") or ())
        standard = ACTIVATED[self.recurrence.mode]
        size = len(standard)
        if self.node.op_type == "RNN" and directions == 1 and names == ["Tanh", "Tanh"]:
            names = ["Tanh"]  # the standard's default, whatever the direction
        if names and len(names) != size * directions:
            mend = f"give {size} for each direction"
            raise UnrollError(Problem(self.name, f"has {len(names)} activations for {directions} direction(s)", mend))
        clip = self.attribute("clip")
        coupled = self.node.op_type == "LSTM" and bool(self.attribute("input_forget", 0))
        alphas, betas = (list(self.attribute(f"activation_{kind}") or ()) for kind in ("alpha", "beta"))
        # Read even if they are the standard's, to find parameters that nothing takes.
        functions = read_activations(self.name, names or standard * directions, alphas, betas)
        if [name.lower() for name in names] in ([], [name.lower() for name in standard * directions]):
            functions = []
        if not functions and clip is None and not coupled:
            return [None] * directions
        groups = [tuple(functions[k * size : (k + 1) * size]) for k in range(directions)]
        return [Variant(group, clip, coupled) for group in groups]

    @property
    def states(self) -> list[ir.Value | None]:
        return [self.input(5), self.input(6)][: len(self.recurrence.state_sizes)]

    @property
    def lengths(self) -> ir.Value | None:
        return self.input(4)

    @property
    def parameters(self) -> list[ir.Value | None]:
        return [self.input(k) for k in (1, 2, 3, 7)]

    def _state(self, writer: OnnxWriter) -> tuple[Value | None, ...]:
        # [B, D, H] where the layout puts the batch first
        state = super()._state(writer)
        swap = self.recurrence.batch_first
        return tuple(torch.transpose(s, 0, 1) if swap and s is not None else s for s in state)

    def weights(self, writer: OnnxWriter) -> list[Weights]:
        writer.enter("weights")
        count = len(GATES[self.node.op_type])
        order = [GATES[self.node.op_type].index(gate) for gate in self.recurrence.cell.gates]
        directions, size = len(self.recurrence.directions), self.recurrence.hidden_size

        def each(tensor: Any, shape: tuple[int, ...]) -> list[Any]:
            """One for each direction."""
            if tensor is None:
                return [None] * directions
            parts = torch.chunk(tensor, directions) if directions > 1 else (tensor,)
            return [torch.reshape(part, shape) for part in parts]

        def ordered(rows: Any, places: Sequence[int]) -> Any:
            """With the gates in torch's order."""
            parts = torch.chunk(rows, len(places)) if len(places) > 1 else (rows,)
            return torch.cat([parts[k] for k in places])

        w = each(self.operand(writer, 1, 3), (count * size, self.recurrence.input_size))
        r = each(self.operand(writer, 2, 3), (count * size, size))
        biases = each(self.operand(writer, 3, 2), (2 * count * size,))
        peepholes = each(self.operand(writer, 7, 2) if self.node.op_type == "LSTM" else None, (3 * size,))
        found = []
        for w_ih, w_hh, b, peephole in zip(w, r, biases, peepholes, strict=True):
            b_ih, b_hh = (None, None) if b is None else (ordered(part, order) for part in torch.chunk(b, 2))
            # stacked as input, output, forget
            peephole = None if peephole is None else ordered(peephole, [0, 2, 1])
            found.append(Weights(ordered(w_ih, order), ordered(w_hh, order), b_ih, b_hh, peephole=peephole))
        return found

    def results(self, writer: OnnxWriter, result: schedule.Result, lead: tuple[Value, Value]) -> list[Value]:
        recurrence = self.recurrence
        size, swap = recurrence.hidden_size, recurrence.batch_first
        outputs, directions = result.outputs, len(result.outputs)
        if self.steps is not None and len(outputs[0]) == self.steps:
            rows = torch.cat(list(chain.from_iterable(zip(*outputs, strict=True))))
            y = torch.reshape(rows, (self.steps, directions, -1, size))
        else:
            y = torch.cat([loops.reshaped(writer, rows, lead[0], 1, lead[1], size) for (rows,) in outputs], 1)
        if swap:
            y = writer.op("Transpose", y, attributes={"perm": [2, 0, 1, 3]})
        states = schedule.joined_states(recurrence, result.finals)
        return [y, *(torch.transpose(s, 0, 1) if swap else s for s in states)]


class TorchSite(Site):
    """An `unroll::Recurrence` node: a whole layer or cell of torch, with torch's arguments and results.

    Inputs are the input, an initial state for each of the cell's, and the weights in torch's order.
    Attributes are the fields of `Recurrence`, and `batched`.
    """

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        fields: dict[str, Any] = {key: attribute.value for key, attribute in node.attributes.items()}
        self.batched = bool(fields.pop("batched"))
        flags = ("bias", "batch_first", "bidirectional", "is_cell", "reverse")
        fields |= {flag: bool(fields[flag]) for flag in flags}
        self.recurrence = Recurrence(**fields)
        super().__init__(node, name, steps)

    @property
    def states(self) -> list[ir.Value | None]:
        return [self.input(1 + k) for k in range(len(self.recurrence.state_sizes))]

    @property
    def parameters(self) -> list[ir.Value | None]:
        return list(self.node.inputs[1 + len(self.recurrence.state_sizes) :])

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
        if self.steps is not None or not self.batched:
            return [schedule.joined_output(recurrence, result.outputs, batched=self.batched), *states]
        size = len(result.outputs) * recurrence.output_size
        rows = schedule.joined_rows(result.outputs)
        output = loops.reshaped(writer, rows, *lead, size)
        return [torch.transpose(output, 0, 1) if recurrence.batch_first else output, *states]


def known_tensor(value: ir.Value) -> torch.Tensor | None:
    """What a value always is, if that is known: an initializer that is no input of the model, or a constant."""
    if value.is_graph_input():
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Identity" and producer.domain == "" and producer.inputs[0]:
        return known_tensor(producer.inputs[0])
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    raw = tensor.raw if isinstance(tensor, tensor_adapters.TorchTensor) else None
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    dtype = tensor_adapters.to_torch_dtype(tensor.dtype)
    try:
        array = tensor.numpy()
    except OSError as error:
        mend = "give the path of the model in place of what was read from it"
        raise UnrollError(
            Problem(str(value.name), f"its data is in a file that cannot be read ({error})", mend)
        ) from error
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.view("uint16").copy()).view(dtype)
    return torch.from_numpy(array.copy())


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
