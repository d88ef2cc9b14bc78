"""The recurrent operators of the ONNX standard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import torch

from unroll.core import schedule
from unroll.core.errors import Problem, Problems, UnrollError, refusing
from unroll.core.options import Steps
from unroll.core.recurrence import Recurrence
from unroll.core.weights import Tensorlike, Variant, Weights
from unroll.onnx.activations import read_activations
from unroll.onnx.calls import Call
from unroll.onnx.constants import known_tensor
from unroll.onnx.sizes import reshape_to
from unroll.onnx.writer import OnnxWriter

STANDARD = ("LSTM", "GRU", "RNN")
"""The recurrent operators of the ONNX standard."""

OF_RUNTIMES = {("com.microsoft", "DynamicQuantizeLSTM"), ("com.microsoft", "AttnLSTM")}
"""Recurrent operators of ONNX Runtime's own, by domain and name"""

INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
"""The inputs of each operator, of which all but an LSTM have the first six"""

GATES = {
    "LSTM": ("input", "output", "forget", "cell"),
    "GRU": ("update", "reset", "new"),
    "RNN": ("hidden",),
}
"""The gates of each operator, in the order in which the standard stacks them."""

ACTIVATED = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "GRU_RESETTING_FIRST": ["Sigmoid", "Tanh"],
    "RNN_TANH": ["Tanh"],
    "RNN_RELU": ["Relu"],
}
"""The standard's activations of one direction, by mode, for a node that names no others."""


def _fits(shape: Sequence[int | None], wanted: Sequence[int | str]) -> bool:
    """Tell whether sizes, None where unknown, are as wanted; a name stands for any size."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(n is None or isinstance(m, str) or n == m for n, m in pairs)


def _listed(sizes: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"


def check_node(node: ir.Node, name: str, opset: int) -> None:
    """Refuse a node whose attributes or number of inputs are not the standard's.

    Args:
        node: a recurrent node of the standard.
        name: what it is called in messages.
        opset: version of the standard's operators in the model.
    """
    context = type(onnx.checker.DEFAULT_CONTEXT)()
    # Version 14 added `layout`, which is honoured in 13 too.
    context.opset_imports, context.ir_version = {"": max(opset, 14)}, onnx.IR_VERSION
    with refusing(name, "is not valid ONNX", "fix it first"):
        onnx.checker.check_node(ir.to_proto(node), context)


class StandardCall(Call):
    """An `LSTM`, `GRU` or `RNN` node of the ONNX standard."""

    def __init__(self, node: ir.Node, name: str, steps: Steps) -> None:
        self.node, self.name = node, name
        self.open: dict[ir.Value, list[tuple[int, int]]] = {}  # axes, and the sizes that the running model must check
        self.recurrence = self._recurrence()
        self.variants = self._variants()
        super().__init__(node, name, steps)

    def _recurrence(self) -> Recurrence:
        kind, direction = self.node.op_type, self.attribute("direction", "forward")
        problems = Problems()
        if direction not in ("forward", "reverse", "bidirectional"):
            fix = "it is forward, reverse or bidirectional"
            problems.add(self.name, f"direction is {direction!r}", fix)
        if self.attribute("layout", 0) not in (0, 1):
            problems.add(self.name, f"layout is {self.attribute('layout')}", "it is 0 or 1")
        w, r, x = (self.shape(self.input(k)) for k in (1, 2, 0))
        hidden = self.attribute("hidden_size") or (r[2] if r and len(r) == 3 else None)
        features = w[2] if w and len(w) == 3 and w[2] else x[2] if x and len(x) == 3 else None
        if hidden is None or features is None:
            fix = "give W and R shapes, or make them initializers"
            problems.add(self.name, "the sizes of its weights are unknown", fix)
        both = direction == "bidirectional"
        if hidden is not None and features is not None:
            problems += self._misfits(1 + both, hidden, features)
        problems += self._mistyped()
        problems.check()
        assert hidden is not None and features is not None
        # torch's GRU is the one with `linear_before_reset`. Other activations of an RNN are left to `_variants`.
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

    def guard(self, trusts: Callable[[ir.Value], bool]) -> None:
        """Choose the axes of inputs that the running model must check.

        Args:
            trusts: tells whether the sizes that are known of a value are checked already in a run.
        """
        checked = trusts(self.given)
        if self.steps is not None:  # a loop's rows are counted
            features = (self.shape(self.given) or [None] * 3)[2]
            self.guarded = [self.time] if self.guarded or not checked else []
            if features is None or not checked:
                self.guarded = [*self.guarded, 2]
        self._check_known_lengths()
        r = self.recurrence
        wanted = self._wanted(len(r.directions), r.hidden_size, r.input_size, ("steps", "batch"))
        for k in (1, 2, 3, 5, 6, 7):
            value = self.input(k)
            if value is not None and known_tensor(value) is None and not self.is_left_out(value):
                known = self.shape(value) if trusts(value) else None
                sizes = zip(known or [None] * len(wanted[k]), wanted[k], strict=True)
                self.open[value] = [
                    (axis, size) for axis, (n, size) in enumerate(sizes) if n is None and isinstance(size, int)
                ]

    def _check_known_lengths(self) -> None:
        lengths = None if self.lengths is None else known_tensor(self.lengths)
        if lengths is not None and any(n < 0 or (self.steps is not None and n > self.steps) for n in lengths.tolist()):
            fix = "give whole numbers from 0 to the number of steps"
            raise UnrollError(Problem(f"{self.name}: sequence_lens", f"is {lengths.tolist()}", fix))

    def read(self, writer: OnnxWriter, value: ir.Value, rank: int) -> Tensorlike:
        found = super().read(writer, value, rank)
        # As many numbers in another order would pass what follows.
        for axis, size in self.open.get(value, ()):
            (found,) = writer.split(found, [size], axis)
        return found

    def _wanted(
        self, directions: int, hidden: int, features: int, lead: tuple[int | str, int | str]
    ) -> list[Sequence[int | str]]:
        """Return the shape that the standard demands of each input, for a `lead` of T and B, either open as a name."""
        count, swap = len(GATES[self.node.op_type]), self.attribute("layout", 0)
        steps, batch = lead
        state = (batch, directions, hidden) if swap else (directions, batch, hidden)
        return [
            (batch, steps, features) if swap else (steps, batch, features),
            (directions, count * hidden, features),
            (directions, count * hidden, hidden),
            (directions, 2 * count * hidden),
            (batch,),
            state,
            state,
            (directions, 3 * hidden),
        ]

    def _misfits(self, directions: int, hidden: int, features: int) -> list[Problem]:
        """Return a problem for each input whose shape is known and is not what the standard demands of it."""
        shapes = [self.shape(self.input(k)) for k in range(8)]
        x, swap = shapes[0] or (), self.attribute("layout", 0)
        batch = x[1 - swap] if len(x) == 3 else None
        wanted = self._wanted(directions, hidden, features, ("steps", "batch" if batch is None else batch))
        return [
            Problem(f"{self.name}: {what}", f"has shape {_listed(shape)}", f"it must be {_listed(sizes)}")
            for what, shape, sizes in zip(INPUTS, shapes, wanted, strict=True)
            if shape is not None and not _fits(shape, sizes)
        ]

    def _mistyped(self) -> list[Problem]:
        """Return a problem for each input whose type is known and is not that of X, or an integer's for lengths."""
        types = [value and value.dtype for value in (self.input(k) for k in range(8))]
        wanted = {4: ir.DataType.INT32}
        return [
            Problem(f"{self.name}: {what}", f"is of {found.name}", f"it must be of {(wanted.get(k) or types[0]).name}")
            for k, (what, found) in enumerate(zip(INPUTS, types, strict=True))
            if found is not None and types[0] is not None and found != wanted.get(k, types[0])
        ]

    def _variants(self) -> list[Variant | None]:
        """Return for each direction how its steps differ from torch's, None if they do not."""
        directions = len(self.recurrence.directions)
        names = list(self.attribute("activations") or ())
        standard = ACTIVATED[self.recurrence.mode]
        size = len(standard)
        if self.node.op_type == "RNN" and directions == 1 and names == ["Tanh", "Tanh"]:
            names = ["Tanh"]  # the standard's default, whatever the direction
        if names and len(names) != size * directions:
            fix = f"give {size} for each direction"
            raise UnrollError(Problem(self.name, f"has {len(names)} activations for {directions} direction(s)", fix))
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
    def rows(self) -> list[ir.Value]:
        return [*super().rows, *([] if self.lengths is None else [self.lengths])]

    @property
    def parameters(self) -> list[ir.Value | None]:
        return [self.input(k) for k in (1, 2, 3, 7)]

    def initial(self, writer: OnnxWriter) -> tuple[Tensorlike | None, ...]:
        # [B, D, H] where the layout puts the batch first
        state = super().initial(writer)
        swap = self.recurrence.batch_first
        return tuple(torch.transpose(s, 0, 1) if swap and s is not None else s for s in state)

    def weights(self, writer: OnnxWriter) -> list[Weights]:
        writer.enter("weights")
        count = len(GATES[self.node.op_type])
        order = [GATES[self.node.op_type].index(gate) for gate in self.recurrence.cell.gates]
        directions, size = len(self.recurrence.directions), self.recurrence.hidden_size

        def each(tensor: Any, shape: tuple[int, ...]) -> list[Any]:
            """Cut a tensor into one of `shape` for each direction."""
            if tensor is None:
                return [None] * directions
            parts = torch.chunk(tensor, directions) if directions > 1 else (tensor,)
            return [torch.reshape(part, shape) for part in parts]

        def ordered(rows: Any, places: Sequence[int]) -> Any:
            """Return rows with the gates at `places` one after the other."""
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

    def results(
        self, writer: OnnxWriter, result: schedule.Result, lead: tuple[Tensorlike, Tensorlike]
    ) -> list[Tensorlike]:
        recurrence = self.recurrence
        size, swap = recurrence.hidden_size, recurrence.batch_first
        # Of each direction [T, 1, B, H]; Y is [T, D, B, H], with the batch first [B, T, D, H].
        if self.steps is not None:
            y = [torch.reshape(output.rows(), (self.steps, 1, -1, size)) for output in result.outputs]
        else:
            y = [reshape_to(writer, output.rows(), lead[0], 1, lead[1], size, batch=2) for output in result.outputs]
        y = torch.cat(y, 1) if len(y) > 1 else y[0]
        if swap:
            y = writer.op("Transpose", y, attributes={"perm": [2, 0, 1, 3]})
        states = schedule.joined_states(recurrence, result)
        return [y, *(torch.transpose(s, 0, 1) if swap else s for s in states)]
