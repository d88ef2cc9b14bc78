"""The recipe in TorchScript: writing a recurrence into its graphs, and layers that `torch.jit.script` compiles.

Where the number of time steps is left open, or the plan has blocks, a `prim::Loop` runs over them, and the recipe
writes its body.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll.core import schedule
from unroll.core.cells import State
from unroll.core.patching import without_warnings
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence
from unroll.core.values import Value, Writer

INT, TENSOR = torch._C.IntType.get(), torch._C.TensorType.get()


class ScriptWriter(Writer):
    """Writes nodes into a TorchScript graph, at its current point of insertion; constants at its top."""

    def __init__(self, layer: str, graph: Any) -> None:
        super().__init__(layer)
        self.graph = graph
        with graph.insert_point_guard(next(iter(graph.nodes()), graph.return_node())):
            self.top = graph.insertConstant(None).node()  # constants go before this
        self.constants: dict[Any, Any] = {}

    def __call__(self, value: Any, name: str) -> Any:
        if isinstance(value, Value):
            value.node.setDebugName(self.name(name))
        return value

    def constant(self, value: Any) -> Value:
        key = id(value) if isinstance(value, Tensor) else (type(value), repr(value))
        if key not in self.constants:
            with self.graph.insert_point_guard(self.top):
                self.constants[key] = Value(self, node=self.graph.insertConstant(value))
        return self.constants[key]

    def insert(self, operator: str, *args: Any) -> Value:
        """The value of an aten operator, in the overload and with the defaults that fit the arguments."""
        return Value(self, node=self.graph.insert(f"aten::{operator}", [self.operand(arg) for arg in args]))

    def node(self, kind: str, args: Sequence[Any], outputs: int = 1) -> Any:
        return self.graph.insertNode(self.graph.create(kind, [self.operand(arg) for arg in args], outputs))

    def list(self, parts: Sequence[Any], kind: Any = TENSOR) -> Value:
        value = self.node("prim::ListConstruct", parts).output()
        return Value(self, node=value.setType(torch._C.ListType(kind)))

    def items(self, values: Value, count: int) -> list[Value]:
        """The parts of a list of tensors, of which there must be `count`."""
        return [Value(self, node=output) for output in self.node("prim::ListUnpack", [values], count).outputs()]

    def run(self, function: Any, *args: Any) -> list[Value]:
        """The results of a scripted function, its graph written here."""
        (result,) = self.graph.insertGraph(function.graph, [self.operand(arg) for arg in args])
        if result.type().kind() != "TupleType":
            return [Value(self, node=result)]
        kinds = result.type().elements()
        parts = self.node("prim::TupleUnpack", [Value(self, node=result)], len(kinds)).outputs()
        return [Value(self, node=part.setType(kind)) for part, kind in zip(parts, kinds, strict=True)]

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        result = self.insert(func.__name__, *args, *kwargs.values())
        if func not in (torch.chunk, torch.split):
            return result
        return self.items(result, args[1] if func is torch.chunk else len(args[1]))

    def operand(self, arg: Any) -> Any:
        """The graph's value of an argument."""
        if isinstance(arg, Value):
            return arg.node
        if isinstance(arg, (list, tuple)) and any(isinstance(part, Value) for part in arg):
            return self.list(arg, INT if any(isinstance(part, int) for part in arg) else TENSOR).node
        return self.constant(list(arg) if isinstance(arg, tuple) else arg).node

    def loop(
        self,
        steps: Value,
        sizes: Value | None,
        block: int,
        step: Callable[[Any, Any, State], State],
        xs: tuple[Value, ...],
        state: State,
        *,
        reverse: bool = False,
    ) -> tuple[Value, State]:
        """Like `schedule.sweep`, over all rows at once, as a loop of the graph.

        A turn of the loop does `block` steps, and those of a second one the steps that fill no block.
        For packed rows `sizes` tells how many have a step `t`; the others keep their state, and a turn is one step.
        """
        pieces = [self.insert("chunk", x, steps) if sizes is None else self.insert("split", x, sizes) for x in xs]
        outputs = self.list([])

        def one_step(name: Any, done: Value, state: State) -> State:
            """The next step, after those that are done."""
            t = self.insert("sub", self.insert("sub", steps, 1), done) if reverse else done
            x = tuple(self.insert("__getitem__", piece, t) for piece in pieces)
            if sizes is None:
                state = step(name, x, state)
                self.insert("append", outputs, state[0])
                return state
            rows = self.insert("__getitem__", sizes, t)
            going = step(name, x, tuple(self.insert("slice", s, 0, 0, rows) for s in state))
            self.insert("append", outputs, going[0])
            idle = [self.insert("slice", s, 0, rows) for s in state]
            return tuple(self.insert("cat", pair) for pair in zip(going, idle, strict=True))

        if sizes is None and block > 1:
            blocks = self.insert("floordiv", steps, block)

            def whole_block(turn: Value, state: State) -> State:
                done = self.insert("mul", turn, block)
                for k in range(block):
                    name = block - 1 - k if reverse else k
                    state = one_step(name, self.insert("add", done, k) if k else done, state)
                return state

            state = self.turns(blocks, whole_block, state)
            done = self.insert("mul", blocks, block)
            rest = self.insert("sub", steps, done)
            state = self.turns(rest, lambda turn, state: one_step("", self.insert("add", done, turn), state), state)
        else:
            state = self.turns(steps, lambda turn, state: one_step("", turn, state), state)
        if reverse:
            self.node("aten::reverse", [outputs], 0)
        return self.insert("cat", outputs), state

    def turns(self, count: Value, body: Callable[[Value, State], State], state: State) -> State:
        """The state after `count` turns of a loop, each of which makes it `body(turn, state)`."""
        loop = self.node("prim::Loop", [count, True, *state], len(state))
        block = loop.addBlock()
        turn = Value(self, node=block.addInputToBlock().setType(INT))
        state = tuple(Value(self, node=block.addInputToBlock()) for _ in state)
        with self.graph.insert_point_guard(block):
            for output in (self.constant(True), *body(turn, state)):
                block.registerOutput(output.node)
        return tuple(Value(self, node=output) for output in loop.outputs())

    def write(
        self,
        recurrence: Recurrence,
        plan: Plan,
        weights: Sequence[Any],
        dtype: torch.dtype,
        input: Value,
        hx: Value,
        *,
        train: Any = False,
        steps: int | None = None,
        batch_sizes: Value | None = None,
    ) -> list[Value]:
        """Write a recurrence in place of its operator.

        Args:
            recurrence: what is run.
            plan: how the steps are laid out.
            weights: in torch's order, values, or tensors for constants.
            dtype: of the weights.
            input: as the operator takes it.
            hx: the initial state, for an LSTM a list.
            train: whether dropout is on, a truth value or the graph's value of one.
            steps: the number of time steps, or None for any number.
            batch_sizes: of packed rows.

        Returns:
            What the operator returns: for a layer the output, then each state.
        """
        self.enter("given")
        features, place, sizes = recurrence.input_size, self.layer, None
        lead: list[Any] = [] if recurrence.is_cell else [recurrence.passes]
        if recurrence.is_cell:
            length, batch = self.run(compiled(check_cell), input, features, place)
        elif batch_sizes is not None:
            length, batch, sizes = self.run(compiled(check_packed), input, batch_sizes, features, place)
        else:
            length, batch = self.run(compiled(check_layer), input, features, recurrence.batch_first, place)
        if steps is not None and not recurrence.is_cell:
            self.run(compiled(check_length), length, steps, place)
        state = self.items(hx, 2) if len(recurrence.state_sizes) == 2 else [hx]
        for s, size in zip(state, recurrence.state_sizes, strict=True):
            self.run(compiled(check_state), s, [*lead, batch, size], place)
        looping = not recurrence.is_cell and (steps is None or plan.block is not None)
        plan = replace(plan, layers="sequential")  # TorchScript's own differentiation fails on a wavefront
        prepared: Any = schedule.prepare(recurrence, recurrence.weights(weights), plan, dtype, self)
        prepared = pytree.tree_map_only(Tensor, self.constant, prepared)
        rows = input if sizes is not None else schedule.flat_rows(recurrence, input)
        drop = recurrence.dropout if train is not False else 0.0
        result = schedule.run(
            recurrence,
            prepared,
            rows,
            tuple(state),
            steps=steps or 1,
            dropout=(lambda rows: self.insert("dropout", rows, drop, train)) if drop else None,
            loop=functools.partial(self.loop, length, sizes, plan.block or 1) if looping else None,
            names=self,
        )
        self.enter("results")
        states = schedule.joined_states(recurrence, result.finals)
        if recurrence.is_cell:
            return states
        output: Any = schedule.joined_rows(result.outputs)
        if sizes is None:
            width = len(recurrence.directions) * recurrence.output_size
            output = self.insert("reshape", output, [length, -1, width])
            output = self.insert("transpose", output, 0, 1) if recurrence.batch_first else output
        return [output, *states]


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notice that TorchScript is deprecated: whoever has a ScriptModule knows."""
    with without_warnings("`torch.jit", category=DeprecationWarning):
        yield


@functools.cache
def compiled(function: Callable) -> Any:
    """A function below in TorchScript."""
    with quiet():
        return torch.jit.script(function)


# What torch's operators check themselves. A state of another shape would be broadcast in silence.


def check_layer(input: Tensor, features: int, batch_first: bool, place: str) -> tuple[int, int]:
    """The number of time steps and the batch size."""
    if input.dim() != 3 or input.size(2) != features:
        raise RuntimeError(f"{place}: the input has shape {input.shape}; it must be 3-D with {features} features")
    length, batch = input.size(0), input.size(1)
    if batch_first:
        length, batch = batch, length
    if length == 0:
        raise RuntimeError(f"{place}: the input has no time steps; give a sequence of at least one")
    return length, batch


def check_length(length: int, steps: int, place: str) -> None:
    if length != steps:
        raise RuntimeError(f"{place}: the input has {length} time steps, unrolled were {steps}; unroll again")


def check_packed(input: Tensor, batch_sizes: Tensor, features: int, place: str) -> tuple[int, int, list[int]]:
    """The number of time steps, of sequences, and of rows in each step."""
    if input.dim() != 2 or input.size(1) != features:
        raise RuntimeError(f"{place}: packed data has shape {input.shape}; it must be 2-D with {features} features")
    rows: list[int] = batch_sizes.tolist()
    return len(rows), rows[0], rows


def check_cell(input: Tensor, features: int, place: str) -> tuple[int, int]:
    """One step, and the batch size."""
    if input.dim() != 2 or input.size(1) != features:
        raise RuntimeError(f"{place}: the input has shape {input.shape}; it must be 2-D with {features} features")
    return 1, input.size(0)


def check_state(state: Tensor, shape: list[int], place: str) -> None:
    if state.shape != shape:
        raise RuntimeError(f"{place}: a state has shape {state.shape}; it must be {shape}")
