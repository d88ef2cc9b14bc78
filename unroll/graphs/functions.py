"""Functional calls of recurrent layers, as Dynamo, `make_fx` and `torch.export` leave them in a graph."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from unroll.core import schedule
from unroll.core.layout import freeze_attributes
from unroll.core.plan import Plan
from unroll.core.recurrence import CELL_MODES, LAYERS, Problem, Recurrence, UnrollError, read_call
from unroll.core.values import GraphWriter, Value
from unroll.graphs.lowering import Call, Known, Returned

CLASS_NAMES = {kind.__name__ for kind in (*LAYERS, *CELL_MODES)}

KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")


OPTIONS = ("has_biases", "num_layers", "dropout", "bidirectional", "batch_first")


def _functions() -> dict[Any, tuple[str, str]]:
    """Every function that runs a recurrence: its kind, and the form of its arguments, `layer`, `packed` or `cell`."""
    found: dict[Any, tuple[str, str]] = {}
    for kind in KINDS:
        packet, cell = getattr(torch.ops.aten, kind), getattr(torch.ops.aten, f"{kind}_cell")
        found |= {packet.input: (kind, "layer"), packet.data: (kind, "packed"), cell.default: (kind, "cell")}
        for home in (torch, torch._VF):
            # `packed` too, told apart by its arguments
            found |= {getattr(home, kind): (kind, "layer"), getattr(home, f"{kind}_cell"): (kind, "cell")}
    return found


FUNCTIONS = _functions()

ARGUMENTS = {
    "layer": ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"],
    "packed": ["input", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional"],
    "cell": ["input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"],
}


class FunctionCall(Call):
    """`call_function` of `torch.lstm`, `aten.lstm.input`, `torch.lstm_cell` and their kin."""

    def __init__(
        self,
        node: fx.Node,
        form: tuple[str, str],
        plan: Plan,
        known: Known,
        steps: Any,
        writer: Callable[..., GraphWriter] = GraphWriter,
    ) -> None:
        kind, self.form = form
        self.plan = plan
        self.known = known
        self.name = layer_name(node)
        self.node = node
        given = self.given
        flat = [w for w in given["params"] if w is not None]
        self.key = (*flat, given["has_biases"])
        self.train = given["train"]
        problems = [
            Problem(self.name, f"{key} is computed in the graph", "make it a constant")
            for key in OPTIONS
            if isinstance(given[key], fx.Node)
        ]
        if any(w not in known for w in flat[:2]):
            problems.append(Problem(self.name, "the shapes of its weights are unknown", "give example inputs"))
        if problems:
            raise UnrollError(*problems)
        self.dtype = known[flat[0]].dtype
        self.recurrence = read_given(kind, self.form, given, [known[w].shape for w in flat[:2]])
        super().__init__(node, writer(self.name, node.graph, node.meta), known, steps)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of the call, as they are by now."""
        return bind(self.form, self.node.args, self.node.kwargs)

    def operands(self) -> tuple[Any, Any]:
        return self.given["input"], self.given["hx"]

    def weights(self) -> list[Value]:
        return [Value(self.writer, node=w) for w in self.given["params"] if w is not None]

    def freeze(self) -> list[str]:
        """Lay out the weights now, and return the names of attributes that may be needed no more.

        Raises:
            UnrollError: if the graph does not read them from attributes.
        """
        weights, module = [w for w in self.given["params"] if w is not None], self.node.graph.owning_module
        self.frozen = freeze_attributes(module, self.name, self.recurrence, weights, self.plan)  # pyright: ignore[reportArgumentType]
        return [*(str(w.target) for w in weights), *self.frozen.names]

    def dropout(self) -> Callable[[Value], Value] | None:
        if self.train is False:
            return None
        train = self.train if isinstance(self.train, bool) else Value(self.writer, node=self.train)
        return lambda rows: self.writer.call(functional.dropout, (rows, self.recurrence.dropout, train), {})

    def arrange(self, output: Any, finals: list[Any]) -> Any:
        if self.form == "cell":
            return tuple(finals) if len(finals) > 1 else finals[0]
        return (output, *finals)


class PackedCall(FunctionCall):
    """A call on packed rows, whose batch sizes are known only when it runs.

    The rows are spread out to as many for each step as the first step has, with those past the end of
    a sequence masked, and gathered again after the steps. Dropout between layers therefore draws for
    more rows than torch's does, and other numbers.
    """

    packed = True

    def __init__(self, node: fx.Node, *rest: Any) -> None:
        super().__init__(node, *rest)
        self.batched = True  # for the states; the rows are handled here

    def choose_steps(self, known: Any, steps: Any) -> int:
        sizes = self.given["batch_sizes"]
        return super().choose_steps(self.known[sizes].shape[0] if sizes in self.known else None, steps)

    def assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
        steps = self.writer.node("call_function", len, (self.given["batch_sizes"],))
        same = self.writer.node("call_function", operator.eq, (steps, self.steps))
        message = f"{self.name}: the longest sequence must have {self.steps} time steps, as unrolled for"
        self.writer.node("call_function", torch._assert, (same, message))

    def rows(self, input: Any) -> Any:
        self.count = self._size(self.state[0], 1)
        sizes: Any = Value(self.writer, node=self.given["batch_sizes"])
        self.ends = torch.cumsum(sizes, 0)
        self.begins = torch.sub(self.ends, sizes)
        row = self.writer.call(torch.arange, (self.count,), {})
        mask = torch.lt(row, torch.reshape(sizes, (-1, 1)))
        index = torch.where(mask, torch.add(row, torch.reshape(self.begins, (-1, 1))), row)
        self.mask = self._beside(input, torch.reshape(mask, (-1, 1)))
        return torch.index_select(input, 0, self._beside(input, torch.reshape(index, (-1,))))

    def output(self, result: schedule.Result) -> Returned:
        input: Any = Value(self.writer, node=self.given["input"])
        entry = self.writer.call(torch.arange, (self._size(input.node, 0),), {})
        step = torch.searchsorted(self.ends, entry, right=True)
        position = torch.sub(entry, torch.index_select(self.begins, 0, step))
        position = torch.add(torch.mul(step, self.count), position)
        rows: Any = torch.index_select(schedule.joined_rows(result.outputs), 0, self._beside(input, position))
        return Returned(rows, 2, lambda index: None)

    def _size(self, node: fx.Node, dim: int) -> Any:
        """A size of a tensor: a number if it is known, else a value."""
        size = self.known[node].shape[dim] if node in self.known else None
        if isinstance(size, int):
            return size
        return self.writer.value("call_function", torch.ops.aten.sym_size.int, (node, dim))

    def _beside(self, input: Value, index: Any) -> Any:
        """An index, which comes from batch sizes on the CPU, on the device of what it is for."""
        device = getattr(self.known.get(input.node), "device", torch.device("cpu"))
        return index if device.type == "cpu" else index.to(device)


def bind(form: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a functional call by name; those of a cell as if it were a layer."""
    given = dict.fromkeys(ARGUMENTS[form]) | dict(zip(ARGUMENTS[form], args)) | dict(kwargs)
    if form == "cell":
        given["params"] = [given[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
        given |= {"has_biases": given["b_ih"] is not None, "num_layers": 1, "dropout": 0.0}
        given |= {"train": False, "bidirectional": False}
    return {"batch_first": False, **given}


def form_of_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[str, str]:
    """The kind of recurrence that a call of one of `FUNCTIONS` runs, and the form of its arguments."""
    kind, form = FUNCTIONS[function]
    packed = "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], (list, tuple)))
    return kind, "packed" if form == "layer" and packed else form


def form_of(node: fx.Node) -> tuple[str, str] | None:
    """The same for a node, or None if it runs no recurrence."""
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return None
    return form_of_call(node.target, node.args, node.kwargs)


def read_given(kind: str, form: str, given: Mapping[str, Any], shapes: Sequence[Any]) -> Recurrence:
    """The recurrence of a call, from its bound arguments and the shapes of its weights."""
    return read_call(kind, shapes, **{key: given[key] for key in OPTIONS}, is_cell=form == "cell")


def layer_name(node: fx.Node) -> str:
    """The name of the module that a call came from, or of the node if that tells nothing."""
    path, kind = calling_module(node)
    return path if path and kind in CLASS_NAMES else ".".join(filter(None, (path, node.name)))


def calling_module(node: fx.Node) -> tuple[str, str]:
    """The path and the class of the innermost module that a call came from, both empty if that is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    path = re.sub(r"\['([^']*)'\]", r".\1", re.sub(r"^L\['\w+'\]\.?", "", path)).removeprefix(".")
    return path, (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
