"""Calls of recurrent layers in an FX graph: what they run, and explicit operations in their place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils import parametrize, rnn

from unroll.core import schedule
from unroll.core.layout import Frozen
from unroll.core.plan import Plan
from unroll.core.recurrence import Problem, Recurrence, UnrollError
from unroll.core.scan import Pieces, divided
from unroll.core.values import GraphWriter, Value
from unroll.graphs.indexing import constant_index
from unroll.graphs.users import is_written
from unroll.modules.layers import Unrolled, UnrolledCell, UnrolledLayer

Steps = int | Mapping[str, int] | None
"""The number of time steps, for all layers or by the layer's name."""

FIXED = "fixed"
"""For `steps`: a symbolic length is that of the example, where whoever traces guards it."""

Known = Mapping[fx.Node, Any]
"""What is known of a graph's values: anything with `shape` and `dtype`"""

ZEROS = (torch.zeros, torch.ops.aten.zeros.default, torch.zeros_like, torch.ops.aten.zeros_like.default)


class Returned(NamedTuple):
    """A tensor that a call returned, of which a part may be had without the whole."""

    whole: Value
    rank: int
    read: Callable[[tuple[Any, ...]], Value | None]
    """The part at an index of as many entries as the rank, or None if it takes the whole"""


class Call:
    """A node that runs a recurrence, and its replacement. The kinds of call say where they find what it needs."""

    recurrence: Recurrence
    plan: Plan
    name: str
    """Of the layer, for names and messages"""
    dtype: torch.dtype | None = None
    """Of the weights, if it is known"""
    key: Any
    """The same for calls with the same weights"""
    packed = False
    mask: Any = None
    """Which rows have a step, `[T * B, 1]`, where they differ"""
    frozen: Frozen | None = None
    """Where weights are that were laid out before, named from the graph's module"""

    def __init__(self, node: fx.Node, writer: GraphWriter, known: Known, steps: Any) -> None:
        if self.plan.block and not self.recurrence.is_cell:
            mend = "export or compile unroll(module, plan=...) in place of this graph, or leave time='explicit'"
            raise UnrollError(Problem(self.name, f"cannot run in blocks, time={self.plan.time}, in this graph", mend))
        self.node = node
        self.writer = writer
        self.written = is_written(node)
        self.replaced: dict[fx.Node, fx.Node] = {}
        """Nodes that are gone, and those that now hold their values"""
        input, _ = self.operands()
        shape = known[input].shape if input in known else None
        self.batched = shape is None or len(shape) == (2 if self.recurrence.is_cell else 3)
        time = 1 if self.batched and self.recurrence.batch_first else 0
        self.steps = 1 if self.recurrence.is_cell else self.choose_steps(shape[time] if shape else None, steps)

    def operands(self) -> tuple[Any, Any]:
        """The input node, and the state: None, a node or several."""
        raise NotImplementedError

    def weights(self) -> list[Value]:
        """The weights in torch's order."""
        raise NotImplementedError

    def prepare(self) -> schedule.Layout:
        """The weights as the steps want them."""
        if self.frozen is not None:
            return self.frozen.written(self)
        weights = self.recurrence.weights(self.weights())
        return schedule.prepare(self.recurrence, weights, self.plan, self.dtype, self.writer)

    def dropout(self) -> Callable[[Value], Value] | None:
        """What runs between layers."""
        raise NotImplementedError

    def rows(self, input: Value) -> Value:
        """The input as rows, step after step."""
        return schedule.flat_rows(self.recurrence, input, batched=self.batched)

    def output(self, result: schedule.Result) -> Returned:
        """The output of all steps."""
        return self._view(result.outputs, None)

    def arrange(self, output: Returned, finals: list[Returned]) -> Any:
        """The results as the node returns them."""
        raise NotImplementedError

    def choose_steps(self, known: Any, steps: Any) -> int:
        """The number of steps, from what is known and what was asked for."""
        name = self.name
        asked = steps.get(name) if isinstance(steps, Mapping) else None if steps == FIXED else steps
        if isinstance(known, torch.SymInt):
            known = int(known) if steps == FIXED else None
        found = known if asked is None else asked
        if found is None:
            mend = "give example inputs, unroll(graph, args), or the number, steps=10"
            raise UnrollError(Problem(name, "the number of time steps is unknown", mend))
        if known is not None and found != known:
            raise UnrollError(Problem(name, f"has {known} time steps", f"leave out steps={asked} or make it {known}"))
        if type(found) is not int or found < 1:
            raise UnrollError(Problem(name, f"steps={found!r}", "give a whole number from 1 upwards"))
        return found

    def write(
        self, prepared: dict[Any, schedule.Layout], *, asserts: bool = True, divide: schedule.Divide = divided
    ) -> None:
        """Put explicit operations before the node and hand its results to those that read it.

        Args:
            prepared: weights that earlier calls laid out, by `key`; this call adds its own.
            asserts: whether the graph itself must refuse other shapes.
            divide: as for `schedule.run`.
        """
        node, writer, recurrence = self.node, self.writer, self.recurrence
        with node.graph.inserting_before(node):
            writer.enter("given")
            input, state = self.operands()
            if isinstance(state, fx.Node):
                count = len(recurrence.state_sizes)
                getitem = partial(writer.node, "call_function", operator.getitem)
                state = [getitem((state, k)) for k in range(count)] if count > 1 else [state]
            self.state = state
            if asserts:
                self.assert_shapes(input, state)
            if state is not None and self.steps > 1 and not self.packed and all(s.target in ZEROS for s in state):
                writer.made[:0] = state  # dead, unless somebody else reads them
                state = None
            state = self.starts(input, state)
            if self.key not in prepared:
                prepared[self.key] = self.prepare()
            result = schedule.run(
                recurrence,
                prepared[self.key],
                self.rows(Value(writer, node=input)),
                None if state is None else tuple(Value(writer, node=s) for s in state),
                steps=self.steps,
                mask=self.mask,
                dropout=self.dropout() if recurrence.dropout and recurrence.num_layers > 1 else None,
                divide=divide,
                names=writer,
            )
            writer.enter("results")
            wholes = schedule.joined_states(recurrence, result.finals, batched=self.batched)
            rank = (1 if recurrence.is_cell else 2) + self.batched
            finals = [self.final(w, rank, partial(self._read_state, result, k)) for k, w in enumerate(wholes)]
            self._hand_over(node, self.arrange(self.output(result), finals))
        node.graph.erase_node(node)

    def starts(self, input: fx.Node, state: Sequence[fx.Node] | None) -> Sequence[fx.Node] | None:
        """The states that the steps begin with, given those of the call."""
        return state

    def final(self, whole: Value, rank: int, read: Callable[[tuple[Any, ...]], Any]) -> Returned:
        """A last state, as the layer returns it."""
        return self._returned(whole, rank, read)

    def assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
        """Other shapes than those unrolled for must stop the graph: they would be cut or broadcast in silence."""
        recurrence, writer = self.recurrence, self.writer

        def of(target: Callable, *args: Any) -> fx.Node:
            return writer.node("call_function", target, args)

        def same(left: fx.Node, right: Any, message: str) -> None:
            of(torch._assert, of(operator.eq, left, right), f"{writer.layer}: {message}")

        features = recurrence.input_size
        again = "unroll again for another"
        rank = (1 if recurrence.is_cell else 2) + self.batched
        same(of(getattr, input, "ndim"), rank, f"the input must be {rank}-D, as it was unrolled for; {again}")
        shape = of(getattr, input, "shape")
        time_first = (0,) if recurrence.is_cell or recurrence.batch_first else (1,)
        batch = [of(operator.getitem, shape, *time_first)] if self.batched else []
        steps = [] if recurrence.is_cell else [self.steps]
        expected = (*batch, *steps) if recurrence.batch_first else (*steps, *batch)
        what = "" if recurrence.is_cell else f"{self.steps} time steps of "
        same(shape, (*expected, features), f"the input must have {what}{features} features, as unrolled for; {again}")
        lead = [] if recurrence.is_cell else [recurrence.passes]
        for name, tensor, size in zip(recurrence.cell.states, state or (), recurrence.state_sizes):
            form = (*lead, *batch, size)
            wanted = ", ".join("batch" if isinstance(part, fx.Node) else str(part) for part in form)
            same(of(getattr, tensor, "shape"), form, f"{name}_0 must have shape [{wanted}]")
        if state and len(state) == 2:
            same(of(getattr, state[1], "dtype"), of(getattr, state[0], "dtype"), "h_0 and c_0 must have one dtype")

    def _returned(self, whole: Any, rank: int, read: Callable[[tuple[Any, ...]], Any]) -> Returned:
        if not self.written:
            return Returned(whole, rank, read)
        # Results, and parts of them, may share memory here, which those of the layer do not.
        own: Any = torch.clone(whole)
        return Returned(own, rank, lambda index: None)

    def _hand_over(self, node: fx.Node, result: Any) -> None:
        """Give the users of `node` the results, through `getitem` chains of any depth."""
        for user in list(node.users):
            if isinstance(result, Returned):
                index = constant_index(user, node, result.rank)
                whole = index == (slice(None),) * result.rank
                part = result if whole else result.read(index) if index else None
                if isinstance(part, Returned):
                    self._hand_over(user, part)
                    node.graph.erase_node(user)
                    continue
                if part is not None:
                    user.replace_all_uses_with(part.node)
                    self.replaced[user] = part.node
                    node.graph.erase_node(user)
                    continue
            elif user.target is operator.getitem and user.args[0] is node:
                position: Any = user.args[1]
                self._hand_over(user, result[position])
                node.graph.erase_node(user)
                continue
            whole = _whole(result)
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: whole if n is node else n)
            if isinstance(whole, fx.Node):
                self.replaced[node] = whole

    def _read_state(self, result: schedule.Result, k: int, index: tuple[Any, ...]) -> Any:
        """`h_n[-1]`, and the like: the state of one layer and direction."""
        first, *rest = index
        parts = result.finals[k]
        if self.recurrence.is_cell or not isinstance(first, int) or not -len(parts) <= first < len(parts):
            return None
        part = parts[first] if self.batched else torch.reshape(parts[first], (self.recurrence.state_sizes[k],))
        return self._item(part, tuple(rest))

    def _view(self, outputs: list[schedule.Outputs], step: int | None) -> Returned:
        """The output of some directions, at one step or at all."""
        whole: Any
        if step is None:
            whole = schedule.joined_output(self.recurrence, outputs, batched=self.batched)
        else:
            whole = schedule.joined_rows([Pieces([output.at(step)]) for output in outputs])
            if not self.batched:
                whole = torch.reshape(whole, (len(outputs) * self.recurrence.output_size,))
        rank = 1 + self.batched + (step is None)
        return self._returned(whole, rank, partial(self._read_output, outputs, step))

    def _read_output(self, outputs: list[schedule.Outputs], step: int | None, index: tuple[Any, ...]) -> Any:
        """`output[:, -1]`, `output[..., :hidden_size]` and the like: one step, or one direction."""
        rest, chosen, at = list(index), outputs, step
        size, features = self.recurrence.output_size, index[-1]
        if len(outputs) == 2 and isinstance(features, int) and -2 * size <= features < 2 * size:
            side, rest[-1] = divmod(features % (2 * size), size)
            chosen = outputs[side : side + 1]
        elif len(outputs) == 2 and isinstance(features, slice):
            begin, end, stride = features.indices(2 * size)
            if end <= size or begin >= size:
                side = 0 if end <= size else 1
                chosen = outputs[side : side + 1]
                part = slice(begin - side * size, end - side * size, stride)
                rest[-1] = slice(None) if part == slice(0, size, 1) else part
        time = 1 if self.batched and self.recurrence.batch_first else 0
        if step is None and isinstance(index[time], int) and -self.steps <= index[time] < self.steps:
            at = rest.pop(time) % self.steps
        if chosen is outputs and at == step:
            return None
        view = self._view(chosen, at)
        return view if all(part == slice(None) for part in rest) else self._item(view.whole, tuple(rest))

    def _item(self, value: Any, index: tuple[Any, ...]) -> Value:
        """`value[index]`, or the value where that is all of it."""
        return value if all(part == slice(None) for part in index) else self.writer.index(value, index)


PLAIN_FORWARDS = (UnrolledLayer.forward, UnrolledCell.forward)


class ModuleCall(Call):
    """`call_module` of an `Unrolled` layer, whose place in the module tree goes on holding the weights."""

    def __init__(self, node: fx.Node, layer: Unrolled, known: Known, steps: Any) -> None:
        self.name = self.key = str(node.target)
        self.layer = layer
        self.recurrence, self.plan = self.read_recurrence(), layer.plan
        self.dtype = layer.like.dtype
        self.frozen = layer.frozen and layer.frozen.under(self.name)
        problems = []
        given = vars(layer).keys() & {"forward", "__call__"}
        if given or parametrize.type_before_parametrizations(layer).forward not in PLAIN_FORWARDS:
            finding = "has a forward of its own, which no graph would run"
            problems.append(Problem(self.name, finding, "use unroll(module), or trace into it"))
        if unknown := node.kwargs.keys() - {"input", "hx"}:
            problems.append(Problem(self.name, f"is called with {', '.join(unknown)}", "a layer takes input and hx"))
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(layer, hook) for hook in hooks):
            mend = "remove them (old weight_norm: use torch.nn.utils.parametrizations), or use unroll(module)"
            problems.append(Problem(self.name, "has hooks, which no graph would call", mend))
        try:
            super().__init__(node, GraphWriter(self.name, node.graph, node.meta), known, steps)
        except UnrollError as error:
            problems += error.problems
        if problems:
            raise UnrollError(*problems)

    def read_recurrence(self) -> Recurrence:
        return self.layer.recurrence

    def operands(self) -> tuple[Any, Any]:
        return operands(self.node.args, self.node.kwargs)

    def weights(self) -> list[Value]:
        parametrized = getattr(self.layer, "parametrizations", {})
        found = []
        for name in (name for names in self.recurrence.weight_names for name in names):
            if name in parametrized:
                found.append(self.writer.value("call_module", f"{self.name}.parametrizations.{name}"))
            else:
                found.append(self.writer.value("get_attr", f"{self.name}.{name}"))
        return found

    def dropout(self) -> Callable[[Value], Value] | None:
        # A module beside the weights follows train() and eval().
        self.layer.layer_dropout = nn.Dropout(self.recurrence.dropout).train(self.layer.training)
        return lambda rows: self.writer.value("call_module", f"{self.name}.layer_dropout", (rows,))

    def arrange(self, output: Any, finals: list[Any]) -> Any:
        final = tuple(finals) if len(finals) > 1 else finals[0]
        return final if self.recurrence.is_cell else (output, final)


def known_values(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """What a graph's metadata tells of its values, wherever the graph came from, and its attributes."""
    found: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        metadata = [node.meta.get(key) for key in ("val", "example_value", "tensor_meta")]
        if node.op == "get_attr":
            metadata.append(operator.attrgetter(str(node.target))(module))
        tensors = [value for value in metadata if hasattr(value, "shape") and hasattr(value, "dtype")]
        if tensors:
            found[node] = tensors[0]
    return found


def erase_dead(nodes: Iterable[fx.Node]) -> None:
    """Remove what nobody reads, of nodes in the order in which they were made."""
    for node in reversed(list(nodes)):
        if not node.users and node.target is not torch._assert:
            node.graph.erase_node(node)


def operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Input and state of a layer's call, however they were passed."""
    given = dict(zip(("input", "hx"), args)) | dict(kwargs)
    return given.get("input"), given.get("hx")


def is_packed(input: Any) -> bool:
    """Whether a node gives a `PackedSequence`: by packing, or as the output of a layer that is given one."""
    while isinstance(input, fx.Node):
        if input.target in (rnn.pack_padded_sequence, rnn.pack_sequence, rnn.PackedSequence):
            return True
        if input.op == "call_method" and input.target in ("_replace", "to"):
            input = input.args[0]
            continue
        layer = input.args[0] if input.target is operator.getitem and input.args[1] == 0 else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module":
            return False
        input, _ = operands(layer.args, layer.kwargs)
    return False


def unknown_steps(steps: Any, names: Iterable[str]) -> list[Problem]:
    """A problem for each layer in `steps`, if it is by name, that is not among these."""
    if not isinstance(steps, Mapping):
        return []
    names = list(dict.fromkeys(names))
    mend = f"the layers with steps are: {', '.join(names) or 'none'}"
    return [Problem(f"steps[{name!r}]", "names no recurrent layer", mend) for name in steps if name not in names]


def _whole(result: Any) -> Any:
    """The nodes of a result, in its structure."""
    return result.whole.node if isinstance(result, Returned) else tuple(map(_whole, result))
