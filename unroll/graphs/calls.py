"""Calls of recurrent layers in an FX graph: what each runs, on what, and where its states come from and go."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils import parametrize, rnn

from unroll.core.arguments import as_result, check_arguments
from unroll.core.errors import Problem, Problems
from unroll.core.patching import original
from unroll.core.recurrence import CLASS_NAMES, Recurrence, read_module
from unroll.graphs.effects import is_written
from unroll.graphs.functions import ARGUMENTS, FUNCTIONS, OPTIONS, bind, form_of_call, read_given
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled
from unroll.modules.stand_ins import STAND_INS

aten = torch.ops.aten

Metadata = Mapping[fx.Node, Any]
"""The metadata that is known of a graph's values: anything with `shape` and `dtype`"""

Reading = tuple[fx.Node, tuple[int, ...]]
"""A part of a node's result: the node, and the indices at which it is found in what that returns"""

ZEROS = (torch.zeros, aten.zeros.default, torch.zeros_like, aten.zeros_like.default)

PLAIN_FORWARDS = {kind.forward for pair in STAND_INS.items() for kind in pair}


class Call:
    """A node that runs a recurrent layer. The kinds of call say where they find what it is given."""

    name: str
    """The layer's name, for names of nodes and for messages"""
    path: str
    """The path of the module that runs it; empty if that is the whole model"""
    recurrence: Recurrence
    packed: bool

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def names(self) -> list[str]:
        """The names that `where` may know it by."""
        return [self.name]

    @property
    def place(self) -> str:
        """The name of its state, or of the layer, for messages."""
        return self.path or self.name

    @property
    def input(self) -> Any:
        """The node that it reads, as it is by now."""
        raise NotImplementedError

    @property
    def hx(self) -> Any:
        """Its state, as it is by now: None, a node or several."""
        raise NotImplementedError

    @property
    def finals(self) -> list[Reading]:
        """The places of the last states in what the node returns."""
        raise NotImplementedError

    @property
    def is_stateless(self) -> bool:
        """True if it begins with zeros of the layer's own."""
        raise NotImplementedError

    def give(self, states: Sequence[fx.Node]) -> None:
        """Let it begin with these states."""
        raise NotImplementedError

    def example(self, k: int, known: Metadata) -> Tensor | None:
        """Make a tensor like state number `k`, if that is known."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """The number of its states."""
        return len(self.recurrence.state_sizes)

    @property
    def starts(self) -> list[Reading]:
        """The origins of the states that it is given."""
        if isinstance(self.hx, fx.Node):
            # One node: the only state, or a pair of which state k is item k.
            node, path = _origin(self.hx)
            return [(node, (*path, k)) for k in range(self.count)] if self.count > 1 else [(node, path)]
        return [_origin(state) for state in self.hx or ()]


class ModuleCall(Call):
    """`call_module` of a layer, torch's or an `Unrolled` one."""

    def __init__(self, node: fx.Node, layer: Any) -> None:
        super().__init__(node)
        self.name = self.path = str(node.target)
        self.layer = layer
        self.recurrence = layer.recurrence if isinstance(layer, Unrolled) else read_module(layer)
        self.packed = is_packed(self.input)

    @property
    def input(self) -> Any:
        return operands(self.node.args, self.node.kwargs)[0]

    @property
    def hx(self) -> Any:
        return operands(self.node.args, self.node.kwargs)[1]

    @property
    def has_own_forward(self) -> bool:
        """True if the layer does more than torch's `forward`, or another thing."""
        own = vars(self.layer).keys() & {"forward", "__call__", "carry"}
        forward = original(parametrize.type_before_parametrizations(self.layer), "forward")
        return bool(own) or forward not in PLAIN_FORWARDS

    @property
    def finals(self) -> list[Reading]:
        # (output, h) or (output, (h, c)); a cell returns its state alone.
        before = () if self.recurrence.is_cell else (1,)
        return [(self.node, (*before, k) if self.count > 1 else before) for k in range(self.count)]

    @property
    def is_stateless(self) -> bool:
        return self.hx is None

    def give(self, states: Sequence[fx.Node]) -> None:
        self.node.args, self.node.kwargs = (self.input, as_result(states)), {}

    def example(self, k: int, known: Metadata) -> Tensor | None:
        if self.input not in known:
            return None
        check_arguments(self.recurrence, self.name, known[self.input], None)
        shape = self.recurrence.state_shapes(self.recurrence.frame(known[self.input].shape))[k]
        layer = self.layer
        weight = layer.like if isinstance(layer, Unrolled) else getattr(layer, self.recurrence.flat_names[0])
        return weight.new_empty(_hints(shape))


class FunctionCall(Call):
    """`call_function` of `torch.lstm`, `aten.gru.input`, `torch.lstm_cell` and their kin.

    Zeros made in the same module as the call are the layer's own.

    Raises:
        UnrollError: where what it runs depends on what the graph computes, or is not known.
    """

    def __init__(self, node: fx.Node, form: tuple[str, str], known: Metadata) -> None:
        super().__init__(node)
        kind, self.form = form
        self.name, self.path = layer_name(node), _running_path(node)
        given, weights = self.given, self.weights
        problems = Problems(
            Problem(self.name, f"{key} is computed in the graph", "make it a constant")
            for key in OPTIONS
            if isinstance(given[key], fx.Node)
        )
        if any(w not in known for w in weights[:2]):
            problems.add(self.name, "the shapes of its weights are unknown", "give example inputs")
        problems.check()
        self.dtype = known[weights[0]].dtype
        self.recurrence = read_given(kind, self.form, given, [known[w].shape for w in weights[:2]])
        self.packed = self.form == "packed"

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of the call, as they are by now."""
        return bind(self.form, self.node.args, self.node.kwargs)

    @property
    def weights(self) -> list[fx.Node]:
        """The weights in torch's order."""
        return [w for w in self.given["params"] if w is not None]

    @property
    def names(self) -> list[str]:
        return [self.name, *filter(None, [self.path])]

    @property
    def input(self) -> Any:
        return self.given["input"]

    @property
    def hx(self) -> Any:
        return self.given["hx"]

    @property
    def finals(self) -> list[Reading]:
        if self.form == "cell":
            return [(self.node, (k,) if self.count > 1 else ()) for k in range(self.count)]
        # (output, h) or (output, h, c), flat.
        return [(self.node, (1 + k,)) for k in range(self.count)]

    @property
    def zeros(self) -> list[fx.Node]:
        """The nodes of its states."""
        return [self.hx] if isinstance(self.hx, fx.Node) else list(self.hx or ())

    @property
    def is_stateless(self) -> bool:
        # Zeros of another module's are a state that the model passes.
        here = _innermost(self.node)
        return all(_is_zeros(node) and not is_written(node) and _innermost(node) == here for node in self.zeros)

    def give(self, states: Sequence[fx.Node]) -> None:
        old, hx = self.zeros, states[0] if len(states) == 1 and isinstance(self.hx, fx.Node) else list(states)
        if "hx" in self.node.kwargs:
            self.node.update_kwarg("hx", hx)
        else:
            self.node.update_arg(ARGUMENTS[self.form].index("hx"), hx)
        # The same zeros may be both h and c.
        for node in dict.fromkeys(old):
            if not node.users:
                node.graph.erase_node(node)

    def example(self, k: int, known: Metadata) -> Tensor | None:
        value = known.get(self.zeros[k])
        return None if value is None else torch.empty(_hints(value.shape), dtype=value.dtype, device=value.device)


def call_of(module: fx.GraphModule, node: fx.Node, known: Metadata) -> Call | None:
    """Read the call that a node is, if it is one of a recurrent layer.

    Raises:
        UnrollError: where what it runs depends on what the graph computes, or is not known.
    """
    if form := form_of(node):
        return FunctionCall(node, form, known)
    if node.op != "call_module":
        return None
    layer = module.get_submodule(str(node.target))
    return ModuleCall(node, layer) if isinstance(layer, Unrolled) or is_recurrent(layer) else None


def form_of(node: fx.Node) -> tuple[str, str] | None:
    """Return the kind of recurrence that a node runs by a function, and the form of its arguments, if it does."""
    if node.op != "call_function" or node.target not in FUNCTIONS:
        return None
    return form_of_call(node.target, node.args, node.kwargs)


def graph_parts(module: fx.GraphModule) -> list[fx.GraphModule]:
    """List the graph module and those inside of it: branches of control flow, checkpoints and the like."""
    return [part for part in module.modules() if isinstance(part, fx.GraphModule)]


def tensor_metadata(module: fx.GraphModule) -> dict[fx.Node, Any]:
    """Collect what a graph's metadata tells of its values, wherever the graph came from, and its attributes."""
    found: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        metadata = [node.meta.get(key) for key in ("val", "example_value", "tensor_meta")]
        if node.op == "get_attr":
            metadata.append(operator.attrgetter(str(node.target))(module))
        tensors = [value for value in metadata if hasattr(value, "shape") and hasattr(value, "dtype")]
        if tensors:
            found[node] = tensors[0]
    return found


def operands(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return input and state of a layer's call, however they were passed."""
    given = dict(zip(("input", "hx"), args)) | dict(kwargs)
    return given.get("input"), given.get("hx")


def is_packed(input: Any) -> bool:
    """Tell whether a node gives a `PackedSequence`: by packing, or as the output of a layer that is given one."""
    while isinstance(input, fx.Node):
        if input.target in (rnn.pack_padded_sequence, rnn.pack_sequence, rnn.PackedSequence):
            return True
        if input.op == "call_method" and input.target in ("_replace", "to"):
            input = input.args[0]
            continue
        # Item 0 of a layer's result is its output, packed if its input is.
        layer = input.args[0] if input.target is operator.getitem and input.args[1] == 0 else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module":
            return False
        input, _ = operands(layer.args, layer.kwargs)
    return False


def layer_name(node: fx.Node) -> str:
    """Return the name of the module that a functional call came from, or of the node if that tells nothing."""
    path, kind = calling_module(node)
    return path if path and kind in CLASS_NAMES else ".".join(filter(None, (path, node.name)))


def calling_module(node: fx.Node) -> tuple[str, str]:
    """Return path and class of the innermost module that a call came from, both empty if that is not known."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, kind = stack[-1] if stack else ("", "")
    # Dynamo's `L['self'].encoder['0']` becomes `encoder.0`.
    path = re.sub(r"\['([^']*)'\]", r".\1", re.sub(r"^L\['\w+'\]\.?", "", path)).removeprefix(".")
    return path, (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _running_path(node: fx.Node) -> str:
    """Return the path of the module that runs a call, or the node's name if none does; "" for a layer by itself."""
    path, kind = calling_module(node)
    return path if kind in CLASS_NAMES else path or node.name


def _origin(node: Any) -> Reading:
    """Find what a node is a part of."""
    path: tuple[int, ...] = ()
    while isinstance(node, fx.Node) and node.target is operator.getitem and isinstance(node.args[1], int):
        path = (node.args[1], *path)
        node = node.args[0]
    return node, path


def _innermost(node: fx.Node) -> Any:
    """Return key, path and class of the call of a module that a node was made in, if its metadata tells."""
    stack = list((node.meta.get("nn_module_stack") or {}).items())
    return (stack[-1][0], *stack[-1][1]) if stack else None


def _is_zeros(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target in (aten.full.default, torch.full):
        return bool(node.args[1] == 0)
    return node.target in (*ZEROS, aten.new_zeros.default, "new_zeros")


def _hints(shape: Sequence[Any]) -> list[int]:
    """Return a shape in which sizes that are open are those of the example."""
    return [size.node.hint if isinstance(size, torch.SymInt) else int(size) for size in shape]
