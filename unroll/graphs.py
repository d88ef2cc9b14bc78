"""The pass on `torch.fx.GraphModule`: explicit gate operations where recurrent layers were called."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import TraceError
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from unroll import schedule, trees
from unroll.cells import Prepared
from unroll.modules import Unrolled
from unroll.plan import Plan
from unroll.recurrence import Problem, UnrollError, check_arguments
from unroll.trees import Rules, Where
from unroll.values import Value, Writer, many_objects

Steps = int | Mapping[str, int] | None
"""The number of time steps, for all layers or by the layer's name."""


def trace(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """Trace a model symbolically, with recurrent layers and (un)packing of sequences as single nodes.

    Args:
        model: what `torch.fx.symbolic_trace` takes.
        concrete_args: arguments to fix, as for `torch.fx.symbolic_trace`.

    Raises:
        UnrollError: if the model's control flow cannot be traced.

    Example:
        >>> [node.op for node in trace(nn.Sequential(nn.GRU(3, 5))).graph.nodes]
        ['placeholder', 'call_module', 'output']
    """
    if trees.is_recurrent(model):
        mend = "trace a module that holds it, such as nn.Sequential(layer)"
        raise UnrollError(Problem(type(model).__name__, "is itself a recurrent layer, with nothing around it", mend))
    try:
        tracer = _Tracer()
        graph = tracer.trace(model, concrete_args)
    except (TraceError, TypeError) as error:
        mend = "use unroll(module), which needs no trace, or the graph of torch.export"
        raise UnrollError(Problem(type(model).__name__, f"cannot be traced symbolically ({error})", mend)) from error
    return fx.GraphModule(tracer.root, graph, type(model).__name__)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=(rnn.pack_padded_sequence, rnn.pad_packed_sequence))
        self._autowrap_search.append(rnn)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return trees.is_recurrent(m) or isinstance(m, Unrolled) or super().is_leaf_module(m, module_qualified_name)


def unroll_graph(
    module: fx.GraphModule, args: Any, *, where: Where, rules: Rules | None, plan: Plan, steps: Steps
) -> fx.GraphModule:
    """A copy of the graph module with explicit gate operations in place of recurrent layers."""
    copied: Any = trees.replace(module, plan, where, rules)
    layers = {node: copied.get_submodule(node.target) for node in copied.graph.find_nodes(op="call_module")}
    sites = [node for node, layer in layers.items() if isinstance(layer, Unrolled)]
    sites = [node for node in sites if trees.chooses(where, [node.target], layers[node])]
    shapes = _Shapes(copied).of(args) if args is not None else {}
    calls, problems = [], []
    for node in sites:
        try:
            calls.append(_Call(node, layers[node], shapes.get(node), steps))
        except UnrollError as error:
            problems += error.problems
    if problems:
        raise UnrollError(*problems)
    prepared: dict[str, list[Prepared]] = {}
    with many_objects():
        for call in calls:
            call.write(prepared)
        _erase_dead(node for call in calls for node in call.writer.made)
        copied.recompile()
    return copied


class _Shapes(fx.Interpreter):
    """Runs a graph on fake tensors, without the steps of its layers, and keeps the input shape of each layer."""

    def of(self, args: Any) -> dict[fx.Node, tuple[int, ...]]:
        self.found: dict[fx.Node, tuple[int, ...]] = {}
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
        try:
            with mode:
                self.run(*fakes)
        except UnrollError:
            raise
        except Exception as error:
            finding = f"the graph cannot be run on fake tensors like these ({type(error).__name__}: {error})"
            raise UnrollError(Problem("args", finding, "give arguments that fit the graph, or steps=")) from error
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self.fetch_attr(target)
        if not isinstance(layer, Unrolled):
            return super().call_module(target, args, kwargs)
        input, state = _arguments(args, kwargs)
        if not isinstance(input, torch.Tensor):
            return layer(input, state)
        recurrence = layer.recurrence
        check_arguments(recurrence, target, input, state)
        self.found[self.node] = tuple(input.shape)
        lead = input.shape[:-1]
        batch = lead[:-1] if recurrence.batch_first and len(lead) == 2 else lead[1:]
        states = tuple(
            input.new_empty(*(lead if recurrence.is_cell else (recurrence.passes, *batch)), size)
            for size in recurrence.state_sizes
        )
        final = states[0] if len(states) == 1 else states
        if recurrence.is_cell:
            return final
        return input.new_empty(*lead, len(recurrence.directions) * recurrence.output_size), final


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Input and state of a layer's call, however they were passed."""
    given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
    return given.get("input"), given.get("hx")


class _GraphWriter(Writer):
    """Writes nodes into an FX graph, at its current point of insertion."""

    def __init__(self, call: fx.Node) -> None:
        super().__init__(str(call.target))
        self.graph = call.graph
        self.meta = {key: call.meta[key] for key in ("stack_trace", "nn_module_stack") if key in call.meta}
        self.made: list[fx.Node] = []

    def node(
        self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None, name: str | None = None
    ) -> fx.Node:
        name = name or self.name(target.rpartition(".")[2] if isinstance(target, str) else target.__name__)
        node = self.graph.create_node(op, target, args, kwargs, name=name.replace(".", "_"))
        node.meta.update(self.meta)
        self.made.append(node)
        return node

    def value(self, op: str, target: Any, args: tuple = (), kwargs: dict | None = None) -> Value:
        return Value(self, lambda name: self.node(op, target, _nodes(args), kwargs, name))

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func is torch.Tensor.to:
            return self.value("call_method", "to", args)
        result = self.value("call_function", func, args, kwargs)
        if func not in (torch.chunk, torch.split):
            return result
        count = args[1] if func is torch.chunk else len(args[1])
        return [self.value("call_function", operator.getitem, (result, i)) for i in range(count)]


def _nodes(args: Any) -> Any:
    if isinstance(args, Value):
        return args.node
    if isinstance(args, (tuple, list)):
        return type(args)([_nodes(arg) for arg in args])
    return args


class _Result(NamedTuple):
    """A tensor that a call returned, of which a part may be had without the whole."""

    whole: Value
    read: Callable[[Any], Value | None]
    """The part at an index, or None if it takes the whole"""


class _Call:
    """A node that calls a layer, and its replacement."""

    def __init__(self, node: fx.Node, layer: Unrolled, shape: tuple[int, ...] | None, steps: Steps) -> None:
        self.node = node
        self.layer = layer
        self.recurrence = layer.recurrence
        self.name = str(node.target)
        self.writer = _GraphWriter(node)
        input, _ = _arguments(node.args, node.kwargs)
        shape = shape or _known_shape(input)
        problems = []
        if isinstance(input, fx.Node) and input.target is rnn.pack_padded_sequence:
            mend = "use unroll(module) for models that pack"
            problems.append(Problem(self.name, "is called with a PackedSequence in an FX graph", mend))
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(layer, hook) for hook in hooks):
            mend = "remove them (old weight_norm: use torch.nn.utils.parametrizations), or use unroll(module)"
            problems.append(Problem(self.name, "has hooks, which no graph would call", mend))
        self.batched = shape is None or len(shape) == (2 if self.recurrence.is_cell else 3)
        try:
            self.steps = 1 if self.recurrence.is_cell else self._steps(shape, steps)
        except UnrollError as error:
            problems += error.problems
        if problems:
            raise UnrollError(*problems)

    def _steps(self, shape: tuple[int, ...] | None, steps: Steps) -> int:
        name = self.name
        asked = steps.get(name) if isinstance(steps, Mapping) else steps
        known = shape[1 if self.batched and self.recurrence.batch_first else 0] if shape else None
        if not isinstance(known, int):  # a symbol says nothing
            known = None
        found = known if asked is None else asked
        if found is None:
            mend = "give example inputs, unroll(graph, args), or the number, steps=10"
            raise UnrollError(Problem(name, "the number of time steps is unknown", mend))
        if known is not None and found != known:
            raise UnrollError(Problem(name, f"has {known} time steps", f"leave out steps={asked} or make it {known}"))
        if not isinstance(found, int) or found < 1:
            raise UnrollError(Problem(name, f"steps={found!r}", "give a whole number from 1 upwards"))
        return found

    def write(self, prepared: dict[str, list[Prepared]]) -> None:
        """Put explicit operations before the node and hand its results to those that read it."""
        node, writer, recurrence = self.node, self.writer, self.recurrence
        with node.graph.inserting_before(node):
            writer.enter("given")
            input, state = _arguments(node.args, node.kwargs)
            if isinstance(state, fx.Node):
                count = len(recurrence.state_sizes)
                state = (
                    [writer.node("call_function", operator.getitem, (state, k)) for k in range(count)]
                    if count > 1
                    else [state]
                )
            self._assert_shapes(input, state)
            if self.name not in prepared:
                prepared[self.name] = self._prepare()
            result = schedule.run(
                recurrence,
                prepared[self.name],
                schedule.flat_rows(recurrence, Value(writer, node=input), batched=self.batched),
                None if state is None else tuple(Value(writer, node=s) for s in state),
                steps=self.steps,
                dropout=self._dropout(),
                names=writer,
            )
            writer.enter("results")
            finals = schedule.joined_states(recurrence, result.finals, batched=self.batched)
            final: Any = tuple(_Result(whole, partial(self._read_state, result, k)) for k, whole in enumerate(finals))
            final = final if len(final) > 1 else final[0]
            if recurrence.is_cell:
                self._hand_over(node, final)
            else:
                output = schedule.joined_output(recurrence, result.outputs, batched=self.batched)
                self._hand_over(node, (_Result(output, partial(self._read_output, result)), final))
        node.graph.erase_node(node)

    def _prepare(self) -> list[Prepared]:
        writer, recurrence = self.writer, self.recurrence
        parametrized = getattr(self.layer, "parametrizations", {})
        flat = []
        for name in (name for names in recurrence.weight_names for name in names):
            path = f"{writer.layer}.parametrizations.{name}" if name in parametrized else f"{writer.layer}.{name}"
            op = "call_module" if name in parametrized else "get_attr"
            flat.append(writer.value(op, path))
        dtype = self.layer.all_weights[0][0].dtype
        return schedule.prepare(recurrence, recurrence.weights(flat), self.layer.plan, dtype, writer)

    def _dropout(self) -> Callable[[Value], Value] | None:
        """A call of a dropout module beside the weights, which follows `train()` and `eval()`."""
        if not self.recurrence.dropout or self.recurrence.num_layers == 1:
            return None
        self.layer.layer_dropout = nn.Dropout(self.recurrence.dropout).train(self.layer.training)
        path = f"{self.writer.layer}.layer_dropout"
        return lambda rows: self.writer.value("call_module", path, (rows,))

    def _assert_shapes(self, input: fx.Node, state: Sequence[fx.Node] | None) -> None:
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

    def _hand_over(self, node: fx.Node, result: Any) -> None:
        """Give the users of `node` the results, through `getitem` chains of any depth."""
        for user in list(node.users):
            index: Any = user.args[-1]
            if user.target is operator.getitem and user.args[0] is node:
                if isinstance(result, tuple) and not isinstance(result, _Result):
                    self._hand_over(user, result[index])
                    node.graph.erase_node(user)
                    continue
                part = result.read(index)
                if part is not None:
                    user.replace_all_uses_with(part.node)
                    node.graph.erase_node(user)
                    continue
            whole = pytree.tree_map(lambda r: r.whole.node, result, is_leaf=lambda r: isinstance(r, _Result))
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: whole if n is node else n)

    def _read_state(self, result: schedule.Result, k: int, index: Any) -> Any:
        """`h_n[-1]`, and the like: the state of one layer and direction."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        parts = result.finals[k]
        if self.recurrence.is_cell or not isinstance(first, int) or not -len(parts) <= first < len(parts):
            return None
        part = parts[first] if self.batched else torch.reshape(parts[first], (self.recurrence.state_sizes[k],))
        return self._item(part, tuple(rest))

    def _read_output(self, result: schedule.Result, index: Any) -> Value | None:
        """`output[:, -1]`, `output[..., :hidden_size]` and the like: one step, or one direction."""
        index = index if isinstance(index, tuple) else (index,)
        rank = 2 + self.batched
        if index.count(...) == 1:
            at = index.index(...)
            index = index[:at] + (slice(None),) * (rank - len(index) + 1) + index[at + 1 :]
        if len(index) > rank or not all(
            isinstance(part, (int, slice)) and not isinstance(part, bool) for part in index
        ):
            return None
        index += (slice(None),) * (rank - len(index))
        time = 1 if self.batched and self.recurrence.batch_first else 0
        size = self.recurrence.output_size
        outputs, features = result.outputs, index[-1]
        if isinstance(features, slice) and len(outputs) == 2:
            bounds = features.start, features.stop
            if not all(bound is None or isinstance(bound, int) for bound in (*bounds, features.step)):
                return None
            begin, end, stride = features.indices(2 * size)
            if end <= size or begin >= size:
                side = 0 if end <= size else 1
                outputs, features = outputs[side : side + 1], slice(begin - side * size, end - side * size, stride)
        if isinstance(index[time], int) and -self.steps <= index[time] < self.steps:
            row = schedule.joined_rows([[hs[index[time]]] for hs in outputs])
            batch = index[1 - time] if self.batched else 0
            return self._item(row, (batch, features))
        if outputs is result.outputs:
            return None
        output = schedule.joined_output(self.recurrence, outputs, batched=self.batched)
        return self._item(output, (*index[:-1], features))

    def _item(self, value: Any, index: tuple[Any, ...]) -> Value:
        """`value[index]`, or the value where that is all of it."""
        if all(part in (slice(None), slice(0, math.inf)) for part in index):
            return value
        return self.writer.value("call_function", operator.getitem, (value, index))


def _known_shape(input: Any) -> tuple[Any, ...] | None:
    """The shape that a node's metadata tells, wherever its graph came from."""
    meta = getattr(input, "meta", {})
    for key in ("val", "example_value", "tensor_meta"):
        if hasattr(meta.get(key), "shape"):
            return tuple(meta[key].shape)
    return None


def _erase_dead(made: Iterable[fx.Node]) -> None:
    """Remove what nobody reads, of nodes in the order in which they were made."""
    for node in reversed(list(made)):
        if not node.users and node.target is not torch._assert:
            node.graph.erase_node(node)
