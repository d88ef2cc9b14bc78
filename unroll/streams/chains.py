"""Calls of recurrent layers in a graph: the state that each begins with, and the one that it leaves."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils import parametrize

from unroll.core.options import Where, chooses, unknown_names
from unroll.core.recurrence import (
    CELL_MODES,
    LAYERS,
    Problem,
    Recurrence,
    UnrollError,
    check_arguments,
    read_cell,
    read_layer,
)
from unroll.graphs.functions import ARGUMENTS, CLASS_NAMES, bind, calling_module, form_of, layer_name, read_given
from unroll.graphs.lowering import PLAIN_FORWARDS, ZEROS, is_packed, operands
from unroll.graphs.rewrite import graph_parts
from unroll.graphs.users import writers
from unroll.modules.layers import Unrolled
from unroll.modules.replace import is_recurrent
from unroll.streams.carry import packed_problem
from unroll.streams.states import MIXED, call_name, no_state, reads_the_future

aten = torch.ops.aten

FORWARDS = (*PLAIN_FORWARDS, *(kind.forward for kind in (*LAYERS, *CELL_MODES)))
"""Those that take an input and a state"""

Known = Mapping[fx.Node, Any]
Reading = tuple[fx.Node, tuple[int, ...]]
"""A part of a node's result"""


class LayerCall:
    """A call of a recurrent layer in a graph: its state, and where the next one is found."""

    name: str
    """Empty for a layer that is the whole model"""
    names: list[str]
    """What `where` may call it"""
    recurrence: Recurrence
    hx: Any
    packed: bool

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def finals(self) -> list[Reading]:
        """Where the last states are in what the node returns."""
        raise NotImplementedError

    @property
    def stateless(self) -> bool:
        """Whether it begins with zeros of the layer's own."""
        raise NotImplementedError

    def give(self, states: Sequence[fx.Node]) -> None:
        """Let it begin with these."""
        raise NotImplementedError

    def example(self, k: int, known: Known) -> Tensor | None:
        """What state number `k` is like, if that is known."""
        raise NotImplementedError

    @property
    def place(self) -> str:
        """The name for messages."""
        return self.name or self.names[0]

    @property
    def count(self) -> int:
        return len(self.recurrence.state_sizes)

    @property
    def starts(self) -> list[Reading]:
        """Where the states that it is given come from."""
        if isinstance(self.hx, fx.Node):
            node, path = _origin(self.hx)
            return [(node, (*path, k)) for k in range(self.count)] if self.count > 1 else [(node, path)]
        return [_origin(state) for state in self.hx or ()]


class CallOfModule(LayerCall):
    """`call_module` of a layer."""

    def __init__(self, node: fx.Node, layer: Any) -> None:
        super().__init__(node)
        self.name = str(node.target)
        self.names = [self.name]
        self.layer = layer
        if isinstance(layer, Unrolled):
            self.recurrence = layer.recurrence
        elif isinstance(layer, LAYERS):
            self.recurrence = read_layer(layer)
        else:
            self.recurrence = read_cell(
                layer, next(mode for kind, mode in CELL_MODES.items() if isinstance(layer, kind))
            )
        self.input, self.hx = operands(node.args, node.kwargs)
        self.packed = is_packed(self.input)

    @property
    def finals(self) -> list[Reading]:
        before = () if self.recurrence.is_cell else (1,)
        return [(self.node, (*before, k) if self.count > 1 else before) for k in range(self.count)]

    @property
    def stateless(self) -> bool:
        return self.hx is None

    def give(self, states: Sequence[fx.Node]) -> None:
        self.node.args, self.node.kwargs = (self.input, tuple(states) if len(states) > 1 else states[0]), {}

    def example(self, k: int, known: Known) -> Tensor | None:
        if self.input not in known:
            return None
        check_arguments(self.recurrence, self.name, known[self.input], None)
        r, lead = self.recurrence, list(known[self.input].shape[:-1])
        if not r.is_cell:  # the steps, wherever they are, give way to the layers in front
            del lead[1 if r.batch_first and len(lead) == 2 else 0]
            lead.insert(0, r.passes)
        layer = self.layer
        weight = layer.like if isinstance(layer, Unrolled) else getattr(layer, r.weight_names[0][0])
        return weight.new_empty(_hints([*lead, r.state_sizes[k]]))


class CallOfFunction(LayerCall):
    """`torch.lstm`, `aten.gru.input` and their kin. Zeros made in the same module as the call are the layer's own."""

    def __init__(self, node: fx.Node, form: tuple[str, str], known: Known) -> None:
        super().__init__(node)
        kind, self.form = form
        given = bind(self.form, node.args, node.kwargs)
        self.name = _place(node)
        self.names = [layer_name(node), *filter(None, [self.name])]
        weights = [w for w in given["params"] if w is not None][:2]
        if any(w not in known for w in weights):
            raise UnrollError(Problem(self.place, "the shapes of its weights are unknown", "give example inputs"))
        self.recurrence = read_given(kind, self.form, given, [known[w].shape for w in weights])
        self.hx = given["hx"]
        self.packed = self.form == "packed"

    @property
    def finals(self) -> list[Reading]:
        if self.form == "cell":
            return [(self.node, (k,) if self.count > 1 else ()) for k in range(self.count)]
        return [(self.node, (1 + k,)) for k in range(self.count)]

    @property
    def zeros(self) -> list[fx.Node]:
        return [self.hx] if isinstance(self.hx, fx.Node) else list(self.hx or ())

    @property
    def stateless(self) -> bool:
        here = _innermost(self.node)
        return all(_is_zeros(node) and _innermost(node) == here for node in self.zeros)

    def give(self, states: Sequence[fx.Node]) -> None:
        old, hx = self.zeros, states[0] if len(states) == 1 and isinstance(self.hx, fx.Node) else list(states)
        if "hx" in self.node.kwargs:
            self.node.update_kwarg("hx", hx)
        else:
            self.node.update_arg(ARGUMENTS[self.form].index("hx"), hx)
        for node in dict.fromkeys(old):
            if not node.users:
                node.graph.erase_node(node)

    def example(self, k: int, known: Known) -> Tensor | None:
        value = known.get(self.zeros[k])
        return None if value is None else torch.empty(_hints(value.shape), dtype=value.dtype, device=value.device)


class Chain:
    """Calls of a layer that hand a state from one to the next, as it is, of which the first has none."""

    def __init__(self, first: LayerCall) -> None:
        self.first = self.last = first

    def continues(self, call: LayerCall) -> bool:
        if call.starts != self.last.finals:
            return False
        parts = [part for reading in self.last.finals for part in _parts(*reading)]
        return not any(writer < call.node for part in parts for writer in writers(part))


def find_chains(module: fx.GraphModule, where: Where, known: Known) -> dict[str, Chain]:
    """The states of a graph, as the names that `call_name` makes for them without `h` and `c`.

    Raises:
        UnrollError: with every layer that cannot be streamed.
    """
    problems: list[Problem] = []
    calls: list[LayerCall] = []
    for node in module.graph.nodes:
        try:
            if call := _read(module, node, known):
                calls.append(call)
        except UnrollError as error:
            problems += error.problems
    names = [name for call in calls for name in call.names]
    problems += unknown_names(where, names)
    chains: dict[str, list[Chain]] = {}
    foreign: dict[str, LayerCall] = {}
    for call in calls:
        asked = module.get_submodule(call.name) if isinstance(call, CallOfModule) else call.node
        if not chooses(where, call.names, asked):  # pyright: ignore[reportArgumentType]
            continue
        of_layer = chains.setdefault(call.name, [])
        if call.recurrence.bidirectional:
            problems.append(reads_the_future(call.place))
        elif call.packed:
            problems.append(packed_problem(call.place))
        elif call.stateless:
            of_layer.append(Chain(call))
        elif chain := next((chain for chain in of_layer if chain.continues(call)), None):
            chain.last = call
        else:
            foreign[call.name] = call
    problems += [Problem(call.place, *MIXED) for name, call in foreign.items() if chains[name]]
    problems += _out_of_reach(module, where)
    found: dict[str, Chain] = {}
    for name, of_layer in chains.items():
        for k, chain in enumerate(of_layer):
            key = call_name(name, k, "")
            if key in found:
                problems.append(Problem(key or chain.first.place, "is the name of two states", "rename the layer"))
            found[key] = chain
    if not found and not problems:
        problems.append(no_state("graph"))
    if problems:
        raise UnrollError(*dict.fromkeys(problems))
    return found


def _read(module: fx.GraphModule, node: fx.Node, known: Known) -> LayerCall | None:
    """The call that a node is, if it is one of a recurrent layer."""
    if form := form_of(node):
        return CallOfFunction(node, form, known)
    if node.op != "call_module":
        return None
    layer = module.get_submodule(str(node.target))
    if not (is_recurrent(layer) or isinstance(layer, Unrolled)):
        return None
    if parametrize.type_before_parametrizations(layer).forward not in FORWARDS or "forward" in vars(layer):
        finding = "has a forward of its own, which does not tell what state it begins with"
        raise UnrollError(Problem(str(node.target), finding, "use streaming(module), or trace into it"))
    return CallOfModule(node, layer)


def _out_of_reach(module: fx.GraphModule, where: Where) -> Iterator[Problem]:
    """Layers inside of what the graph calls as a whole: other modules, branches and loops."""
    mend = "use streaming(module), or trace into it"
    for part in graph_parts(module)[1:]:
        for node in part.graph.nodes:
            if form_of(node) and chooses(where, [layer_name(node)], node):
                yield Problem(layer_name(node), "runs inside of another graph, such as a branch or a loop", mend)
    for node in module.graph.find_nodes(op="call_module"):
        outer = module.get_submodule(str(node.target))
        for name, layer in outer.named_modules():
            full = f"{node.target}.{name}"
            if name and (is_recurrent(layer) or isinstance(layer, Unrolled)) and chooses(where, [full], layer):
                yield Problem(full, f"runs inside of {node.target}, which the graph calls as a whole", mend)


def _origin(node: Any) -> Reading:
    """What a node is a part of."""
    path: tuple[int, ...] = ()
    while isinstance(node, fx.Node) and node.target is operator.getitem and isinstance(node.args[1], int):
        path = (node.args[1], *path)
        node = node.args[0]
    return node, path


def _parts(node: fx.Node, path: tuple[int, ...]) -> Iterator[fx.Node]:
    """The nodes that hold this part of what a node returned."""
    if not path:
        yield node
        return
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == path[0]:
            yield from _parts(user, path[1:])


def _place(node: fx.Node) -> str:
    """The name of the module that runs a functional call, whatever its class; of the node if there is none.

    That of a layer that is the whole model is empty.
    """
    path, kind = calling_module(node)
    return path if kind in CLASS_NAMES else path or node.name


def _innermost(node: fx.Node) -> Any:
    """The call of a module that a node was made in, the path and the class of that module, if its metadata tells."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    return (stack[-1][0], *stack[-1][1]) if stack else None


def _is_zeros(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target in (aten.full.default, torch.full):
        return bool(node.args[1] == 0)
    return node.target in (*ZEROS, aten.new_zeros.default, "new_zeros")


def _hints(shape: Sequence[Any]) -> list[int]:
    """A shape in which sizes that are open have those of the example."""
    return [size.node.hint if isinstance(size, torch.SymInt) else int(size) for size in shape]
