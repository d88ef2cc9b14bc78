"""Explicit operations in the place of a call in an FX graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn import functional
from torch.nn.utils import parametrize

from unroll.core import schedule
from unroll.core.arguments import as_result
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.layout import Frozen, Layout, lay_out
from unroll.core.limits import check_written
from unroll.core.options import FIXED, TOLD, choose_steps
from unroll.core.plan import Plan
from unroll.core.presets import Situation
from unroll.core.recurrence import Recurrence
from unroll.core.values import Value
from unroll.graphs.blocks import over_blocks
from unroll.graphs.calls import ZEROS, Call, FunctionCall, Metadata, ModuleCall
from unroll.graphs.effects import is_written, origins, uses
from unroll.graphs.results import Handover, Results, Returned
from unroll.graphs.writer import GraphWriter
from unroll.modules import linears
from unroll.modules.flat_weights import FIX, is_substituted
from unroll.modules.layers import UnrolledLayer

AnyCall = TypeVar("AnyCall", bound=Call)


class Lowering(Generic[AnyCall]):
    """A call and its replacement. The kinds say what the call takes and returns."""

    recurrence: Recurrence
    plan: Plan
    dtype: torch.dtype
    """The dtype of the weights"""
    key: Any
    """A key that calls share whose weights are the same as long as nothing changes them in between"""
    packed = False
    mask: Any = None
    """The rows that have a step, boolean `[T * B, 1]`, where not all have"""
    block: int | None = None
    """The steps of a block, where a compiler is to write one block for all"""
    frozen: Frozen | None = None
    """The buffers of weights that were laid out before, named from the graph's module"""

    def __init__(self, call: AnyCall, writer: GraphWriter, known: Metadata, steps: Any) -> None:
        self.call, self.writer, self.known, self.name = call, writer, known, call.name
        self.plan.refuse_training(self.name)
        self.replaced: dict[fx.Node, fx.Node] = {}
        """Nodes that are gone, and those that now hold their values"""
        shape = known[call.input].shape if call.input in known else None
        frame = None if shape is None else self.recurrence.frame(shape)
        self.batched = frame is None or frame.batched
        self.steps = 1 if self.recurrence.is_cell else self.choose_steps(frame and frame.steps, steps)
        self.at = self.situation(frame and frame.batch)
        self.plan = self.plan.resolve(self.at)
        self.key = (self.key, self.plan)
        if self.plan.block and not self.recurrence.is_cell:
            fix = "export or compile unroll(module, plan=...) in place of this graph, or leave time='explicit'"
            raise UnrollError(Problem(self.name, f"cannot run in blocks, time={self.plan.time}, in this graph", fix))

    def situation(self, batch: Any) -> Situation:
        """Return what the rules of presets ask about the call; its batch may be a number, symbolic, or None."""
        device = getattr(self.known.get(self.call.input), "device", None)
        fixed = batch if isinstance(batch, int) and not self.packed else None  # packed rows have it elsewhere
        sizes, on = (self.steps, fixed, self.packed), device.type if device else ""
        frozen, trained = self.frozen is not None, torch.is_grad_enabled()
        return Situation(self.recurrence, *sizes, on, "graph", frozen=frozen, trained=trained)

    def compile_for(self, device: str, *, in_blocks: bool) -> None:
        """Write for Inductor's code on a device of this type, in blocks if the preset has a rule and these may be."""
        self.writer.compile_for(device)
        self.block = self.plan.resolve(replace(self.at, kind="compiled")).block if in_blocks else None

    def choose_steps(self, known: Any, asked: Any) -> int:
        """Choose the number of steps, from what is known and what was asked for."""
        if isinstance(known, torch.SymInt):
            # With FIXED, whoever traced guards the length of the example.
            known = int(known) if asked == FIXED else None
        closed = asked in (FIXED, TOLD)
        asked = None if closed else asked.get(self.name) if isinstance(asked, Mapping) else asked
        found = choose_steps(self.name, known, asked)
        if found is None:
            fix = "give example inputs, unroll(graph, args), or the number, steps=10"
            if closed:
                fix = "fix it in the export, or export or compile unroll(module, plan=Plan(time=16)), for any number"
            raise UnrollError(Problem(self.name, "the number of time steps is unknown", fix))
        check_written(self.name, found)
        return found

    def weight_writers(self) -> set[fx.Node]:
        """Return the nodes that may write to weights which the graph itself made."""
        return set()

    def weights(self) -> list[Value]:
        """Read the weights, in torch's order."""
        raise NotImplementedError

    def lay_out(self) -> Layout:
        """Lay out the weights as the steps want them."""
        if self.frozen is not None:
            return read_frozen(self.frozen, self.name, self.writer)
        weights = self.recurrence.weights(self.weights())
        return lay_out(self.recurrence, weights, self.plan, self.dtype, self.writer)

    def dropout(self) -> Callable[[Value], Value] | None:
        """Return the function that runs between layers."""
        raise NotImplementedError

    def rows(self, input: Value) -> Value:
        """Return the input as rows, step after step."""
        return schedule.flat_rows(self.recurrence, input, batched=self.batched)

    def starts(self, input: fx.Node, state: Sequence[fx.Node] | None) -> Sequence[fx.Node] | None:
        """Return the states that the steps begin with, given those of the call."""
        return state

    def returned(self, results: Results) -> tuple[Returned | None, list[Returned]]:
        """Return the output of all steps, None for a cell, and the last states."""
        return None if self.recurrence.is_cell else results.output(), results.states()

    def arrange(self, output: Returned | None, finals: list[Returned]) -> Any:
        """Arrange the results as the node returns them."""
        raise NotImplementedError

    def write(self, prepared: dict[Any, Layout], *, asserts: bool = True) -> None:
        """Put explicit operations before the node and hand its results to those that read it.

        Args:
            prepared: weights that earlier calls laid out, by `key`, and that still hold; this call adds its own.
            asserts: whether the graph itself must refuse other shapes.
        """
        node, writer, recurrence = self.call.node, self.writer, self.recurrence
        with node.graph.inserting_before(node):
            writer.enter("given")
            input, state = self.call.input, self.call.hx
            if isinstance(state, fx.Node):
                count = len(recurrence.state_sizes)
                getitem = partial(writer.node, "call_function", operator.getitem)
                state = [getitem((state, k)) for k in range(count)] if count > 1 else [state]
            self.state = state
            if asserts:
                self.assert_shapes(input, state)
            # Zeros are left out of step 0; an only step keeps them, or the weights they meet would have no gradient.
            if state is not None and self.steps > 1 and not self.packed and all(map(_are_zeros, state)):
                writer.made[:0] = state  # dead, unless somebody else reads them
                state = None
            if self.block:
                writer.loop = over_blocks(writer, self.steps, self.block, batch_is_open=self.at.batch is None)
            state = self.starts(input, state)
            if self.key not in prepared:
                prepared[self.key] = self.lay_out()
            result = schedule.run(
                recurrence,
                prepared[self.key],
                self.rows(Value(writer, node=input)),
                None if state is None else tuple(Value(writer, node=s) for s in state),
                steps=self.steps,
                mask=self.mask,
                dropout=self.dropout() if recurrence.dropout and recurrence.num_layers > 1 else None,
                target=writer,
            )
            writer.enter("results")
            results = Results(writer, recurrence, result, batched=self.batched)
            Handover(writer, self.replaced).give(node, self.arrange(*self.returned(results)))
        node.graph.erase_node(node)

    def assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
        """Have the graph refuse other shapes than those unrolled for: they would be cut or broadcast in silence."""
        recurrence, writer = self.recurrence, self.writer

        def of(target: Callable, *args: Any) -> fx.Node:
            return writer.node("call_function", target, args)

        def same(left: fx.Node, right: Any, message: str) -> None:
            of(torch._assert, of(operator.eq, left, right), f"{writer.layer}: {message}")

        features = recurrence.input_size
        again = "unroll again for another"
        rank = recurrence.rank(batched=self.batched)
        same(of(getattr, input, "ndim"), rank, f"the input must be {rank}-D, as it was unrolled for; {again}")
        shape = of(getattr, input, "shape")
        batch = [of(operator.getitem, shape, recurrence.batch_axis)] if self.batched else []
        steps = [] if recurrence.is_cell else [self.steps]
        expected = (*batch, *steps) if recurrence.batch_first else (*steps, *batch)
        what = "" if recurrence.is_cell else f"{self.steps} time steps of "
        same(shape, (*expected, features), f"the input must have {what}{features} features, as unrolled for; {again}")
        # A state is [passes, B, size], a cell's [B, size]; B is that of the input, which the running graph tells.
        lead = [] if recurrence.is_cell else [recurrence.passes]
        for name, tensor, size in zip(recurrence.cell.states, state or (), recurrence.state_sizes):
            form = (*lead, *batch, size)
            wanted = ", ".join("batch" if isinstance(part, fx.Node) else str(part) for part in form)
            same(of(getattr, tensor, "shape"), form, f"{name}_0 must have shape [{wanted}]")
        if state and len(state) == 2:
            same(of(getattr, state[1], "dtype"), of(getattr, state[0], "dtype"), "h_0 and c_0 must have one dtype")


class ModuleLowering(Lowering[ModuleCall]):
    """The lowering of `call_module` of an `Unrolled` layer, whose place in the module tree keeps the weights."""

    def __init__(self, call: ModuleCall, known: Metadata, steps: Any) -> None:
        layer = self.layer = call.layer
        if linears.are_held(layer):
            linears.check_plain(layer)
        # parametrizations are computed anew for each call, as spectral norm goes on with each
        self.key = call.node if parametrize.is_parametrized(layer) else call.name
        self.recurrence, self.plan = self.read_recurrence(), layer.plan
        self.dtype = layer.like.dtype
        self.frozen = layer.frozen and layer.frozen.under(call.name)
        node, problems = call.node, Problems()
        if call.has_own_forward:
            finding = "has a forward of its own, which no graph would run"
            problems.add(call.name, finding, "use unroll(module), or trace into it")
        if unknown := node.kwargs.keys() - {"input", "hx"}:
            problems.add(call.name, f"is called with {', '.join(unknown)}", "a layer takes input and hx")
        if isinstance(layer, UnrolledLayer) and is_substituted(layer):
            finding = "runs with a list of other weights than its parameters, _flat_weights, which no graph would read"
            problems.add(call.name, finding, FIX)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(layer, hook) for hook in hooks):
            fix = "remove them (old weight_norm: use torch.nn.utils.parametrizations), or use unroll(module)"
            problems.add(call.name, "has hooks, which no graph would call", fix)
        with problems:
            super().__init__(call, GraphWriter(call.name, node.graph, node.meta), known, steps)
        problems.check()

    def read_recurrence(self) -> Recurrence:
        """Read the recurrence of the layer, as it is called."""
        return self.layer.recurrence

    def weights(self) -> list[Value]:
        parametrized = getattr(self.layer, "parametrizations", {})
        held = linears.are_held(self.layer)
        found = []
        for name in self.recurrence.flat_names:
            if name in parametrized:
                found.append(self.writer.value("call_module", f"{self.name}.parametrizations.{name}"))
            else:
                path = ".".join(linears.place_of(name)) if held else name
                found.append(self.writer.value("get_attr", f"{self.name}.{path}"))
        return found

    def dropout(self) -> Callable[[Value], Value] | None:
        # A module beside the weights follows train() and eval().
        self.layer.layer_dropout = nn.Dropout(self.recurrence.dropout).train(self.layer.training)
        return lambda rows: self.writer.value("call_module", f"{self.name}.layer_dropout", (rows,))

    def arrange(self, output: Returned | None, finals: list[Returned]) -> Any:
        final = as_result(finals)
        return final if output is None else (output, final)


class FunctionLowering(Lowering[FunctionCall]):
    """The lowering of `call_function` of `torch.lstm`, `aten.lstm.input`, `torch.lstm_cell` and their kin."""

    def __init__(
        self,
        call: FunctionCall,
        plan: Plan,
        known: Metadata,
        steps: Any,
        writer: Callable[..., GraphWriter] = GraphWriter,
    ) -> None:
        self.plan, self.recurrence, self.dtype = plan, call.recurrence, call.dtype
        given = call.given
        # In a program each call of a submodule is to be one by itself, for `torch.export.unflatten`.
        inside = tuple(call.node.meta.get("nn_module_stack") or ()) if isinstance(call.node.target, OpOverload) else ()
        self.key = (*call.weights, given["has_biases"], inside)
        self.train = given["train"]
        super().__init__(call, writer(call.name, call.node.graph, call.node.meta), known, steps)

    def weight_writers(self) -> set[fx.Node]:
        made = {origin for weight in self.call.weights for origin in origins(weight)}
        return {user for origin in made for user, does in uses(origin) if does.writes}

    def weights(self) -> list[Value]:
        return [Value(self.writer, node=w) for w in self.call.weights]

    def dropout(self) -> Callable[[Value], Value] | None:
        if self.train is False:
            return None
        train = self.train if isinstance(self.train, bool) else Value(self.writer, node=self.train)
        return lambda rows: self.writer.call(functional.dropout, (rows, self.recurrence.dropout, train), {})

    def arrange(self, output: Returned | None, finals: list[Returned]) -> Any:
        return as_result(finals) if output is None else (output, *finals)


def _are_zeros(state: fx.Node) -> bool:
    return state.target in ZEROS and not is_written(state)


def read_frozen(frozen: Frozen, name: str, writer: GraphWriter) -> Layout:
    """Write nodes that read laid-out weights from buffers, for a graph that then refuses to run in another dtype."""

    def read(buffer: str, kind: str) -> Value:
        return writer.value("get_attr", buffer).named(f"{writer.layer}.{buffer.rpartition('.')[2]}")

    layout = frozen.mapped(read, operator.attrgetter(frozen.first)(writer.graph.owning_module).dtype)
    first = layout.passes[0].inputs[0].weight.node
    found = writer.node("call_function", getattr, (first, "dtype"))
    same = writer.node("call_function", operator.eq, (found, frozen.dtype))
    message = f"{name}: was frozen in {frozen.dtype}; convert what is not frozen, and freeze that"
    writer.node("call_function", torch._assert, (same, message))
    return layout


def erase_dead(nodes: Iterable[fx.Node]) -> None:
    """Erase those that nobody reads, of nodes in the order in which they were made."""
    # From the last, so that what only dead nodes read is dead by its turn.
    for node in reversed(list(nodes)):
        if not node.users and node.target is not torch._assert:
            node.graph.erase_node(node)
