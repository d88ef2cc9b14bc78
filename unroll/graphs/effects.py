"""What the operations of a graph do to the memory of their operands, as torch's own schemas and signatures tell it.

An operation of which nothing is known counts as one that writes to its operands and returns their memory.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn.utils import rnn

from unroll.core.rows import copy_apart
from unroll.graphs.tracing import trace_inside
from unroll.modules.find import is_recurrent
from unroll.modules.layers import Unrolled
from unroll.packed.sequences import initial_states, pad_rows, restore_order, unpad_rows

Place = int | str
"""The place of an argument: a position or a keyword"""


class Effect(NamedTuple):
    """The effect of an operation on the memory of an operand."""

    writes: bool
    """True if it may write to it"""
    shares: bool
    """True if its result may be in the same memory"""


READS, SHARES, ANYTHING = Effect(False, False), Effect(False, True), Effect(True, True)

RETURNS_OPERAND = {
    *("alpha_dropout", "dropout", "feature_alpha_dropout", "feature_dropout"),
    *("atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "meshgrid", "cartesian_prod", "chain_matmul"),
    *("conj_physical", "einsum", "set_", "sum_to_size", "type_as", "unsafe_chunk", "unsafe_split"),
}
"""Operators of aten that may return an operand's memory although their schemas do not say so"""

STATISTICS = ("running_mean", "running_var")
"""Arguments that operators write to in training, most of them without a word in their schemas"""

LEAVING = ("backward", "functional", "no_training", "no_update")
"""Parts of the names of operators that leave them alone"""

IN_PLACE = {f for name, f in vars(operator).items() if name[:3] == "__i" and f"__{name[3:]}" in vars(operator)}
"""Functions of `operator` such as `iadd`"""

PLAIN = {
    **dict.fromkeys((rnn.pack_padded_sequence, rnn.pack_sequence, rnn.pad_packed_sequence, initial_states), ()),
    **dict.fromkeys((torch._assert, torch._check), ()),
    **dict.fromkeys((copy_apart, pad_rows), (0,)),
    **dict.fromkeys((restore_order, unpad_rows), (1,)),
    rnn.PackedSequence: (0, 1, 2, 3, "data", "batch_sizes", "sorted_indices", "unsorted_indices"),
}
"""Functions in Python that write nowhere, with the places of the operands whose memory their results may be in"""


def effect(user: fx.Node, operand: fx.Node) -> Effect:
    """Tell what a node does to the memory of one of its operands.

    Example:
        >>> x, first, doubled, _ = torch.fx.symbolic_trace(lambda x: x[0].mul_(2)).graph.nodes
        >>> effect(first, x), effect(doubled, first)
        (Effect(writes=False, shares=True), Effect(writes=True, shares=True))
    """
    if user.op == "output":
        return READS
    places: list[Place] = [k for k, arg in enumerate(user.args) if _holds(arg, operand)]
    places += [key for key, arg in user.kwargs.items() if _holds(arg, operand)]
    return _either(_at(user, place) for place in places)


def may_change_more(node: fx.Node) -> bool:
    """Tell whether a node may do more than write to its operands: to modes such as that of gradients, or to anything.

    Example:
        >>> graph = torch.fx.Graph()
        >>> may_change_more(graph.call_function(torch._C._set_grad_enabled, (False,)))
        True
    """
    if node.op == "call_module":
        module = _called_module(node)
        inner = None if module is None or _is_layer(module) else _body(module)
        if inner is None:
            return not (_is_layer(module) or _is_torchs(module))
        return any(map(changes_what_is_given, inner.graph.nodes))
    if node.op != "call_function" or isinstance(node.target, OpOverload) or node.target in PLAIN:
        return False
    if isinstance(node.target, HigherOrderOperator):
        inner = _nested(node)
        return not inner or any(changes_what_is_given(n) for part in inner for n in part.graph.nodes)
    return not (_is_pythons(node.target) or _schemas(node.target) or _is_overridable(node.target))


def changes_what_is_given(node: fx.Node) -> bool:
    """Tell whether a node may change what its graph did not make itself: inputs, attributes, modes."""
    if may_change_more(node):
        return True
    written = (operand for operand in node.all_input_nodes if effect(node, operand).writes)
    return any(origin.op in ("placeholder", "get_attr") for operand in written for origin in origins(operand))


def origins(node: fx.Node) -> set[fx.Node]:
    """Return the nodes whose memory a node's value may be in, as far back as operations return that of operands."""
    found, stack = {node}, [node]
    while stack:
        user = stack.pop()
        before = {operand for operand in user.all_input_nodes if effect(user, operand).shares} - found
        found |= before
        stack += before
    return found


def _holds(arg: Any, node: fx.Node) -> bool:
    found = []
    fx.map_arg(arg, lambda n: found.append(n is node))
    return any(found)


def _either(effects: Iterable[Effect]) -> Effect:
    writes, shares = zip(*effects, strict=True)
    return Effect(any(writes), any(shares))


def _at(user: fx.Node, place: Place) -> Effect:
    """Tell what a node does to the operand at a place."""
    target: Any = user.target
    if user.op == "call_module":
        return _of_module(_called_module(user))
    if isinstance(target, HigherOrderOperator):
        inner = _nested(user)
        return _either(map(_of_body, inner)) if inner else ANYTHING
    if user.op == "call_function" and _unsaid(target) and _writes_unsaid(user, place):
        return ANYTHING
    if isinstance(target, OpOverload):
        return _of_schemas(target, place)
    if user.op == "call_method":
        return _of_method(target, place)
    if target in PLAIN:
        return Effect(False, place in PLAIN[target])
    if target is getattr:
        return Effect(False, _is_of_memory(str(user.args[1])))
    if _is_pythons(target):
        writes = place == 0 and (target in IN_PLACE or target is operator.setitem)
        fresh = target.__module__ == "_operator" and target not in (operator.getitem, operator.pos)
        return Effect(writes, writes or not fresh)
    if place == "out":
        return ANYTHING
    if _schemas(target) or _is_overridable(target):
        found = _of_schemas(target, place)
        return ANYTHING if (place == 0 or isinstance(place, str)) and _is_inplace(user) else found
    return ANYTHING


@functools.cache
def _of_schemas(target: Any, place: Place) -> Effect:
    """Tell what an operator does to an operand by its schema, of a function by those of the operators of its name."""
    found = []
    for schema in _schemas(target):
        for k, argument in enumerate(schema.arguments):
            if place in (k, argument.name):
                lies = schema.name.partition("::")[2] in RETURNS_OPERAND
                info = argument.alias_info
                found.append(Effect(info is not None and info.is_write, info is not None or lies))
    return _either(found) if found else SHARES


@functools.cache
def _schemas(target: Any) -> tuple[Any, ...]:
    """Return the schemas of an operator, or of the operators that have the name of a function of torch's."""
    if isinstance(target, OpOverload):
        return (target._schema,)
    home = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    if not isinstance(target, str) and home != "torch":
        return ()
    packet = getattr(torch.ops.aten, target if isinstance(target, str) else target.__name__, None)
    found = [getattr(packet, name)._schema for name in packet.overloads()] if packet is not None else []
    return tuple(schema for schema in found if not any(argument.is_out for argument in schema.arguments))


@functools.cache
def _unsaid(target: Any) -> bool:
    """Tell whether a function may write to operands of which its schema, or that of its name, does not say so."""
    name = str(getattr(target, "__name__", target))
    return not any(part in name for part in LEAVING) and not {*STATISTICS, "max_norm"}.isdisjoint(_names(target))


def _writes_unsaid(user: fx.Node, place: Place) -> bool:
    given, names = _given(user), _names(user.target)
    name = place if isinstance(place, str) else names[place] if place < len(names) else ""
    if name in STATISTICS:
        return not any(given.get(flag) is False for flag in ("train", "training", "use_input_stats"))
    return name == "weight" and given.get("max_norm") is not None


def _names(target: Any) -> list[str]:
    """Return the names of a function's arguments, none of a function of C++ that has no signature in Python."""
    if isinstance(target, OpOverload):
        return [argument.name for argument in target._schema.arguments]
    signature = _signature(target)
    return [] if signature is None else list(signature.parameters)


@functools.cache
def _signature(target: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(_signatures().get(target, target))
    except (TypeError, ValueError):
        return None


def _given(user: fx.Node) -> dict[str, Any]:
    """Return what a call is given, by name, with what its signature gives by default."""
    signature = None if isinstance(user.target, OpOverload) else _signature(user.target)
    try:
        bound = signature.bind_partial(*user.args, **user.kwargs) if signature else None
    except TypeError:
        bound = None
    if bound is None:
        return dict(zip(_names(user.target), user.args, strict=False)) | user.kwargs
    bound.apply_defaults()
    return bound.arguments


def _of_method(name: str, place: Place) -> Effect:
    """Tell what a method of tensors does; those in place are known by their names."""
    in_place = name.endswith("_") and not name.startswith("__")
    in_place = in_place or getattr(operator, name, None) in IN_PLACE or name == "__setitem__"
    return ANYTHING if in_place and place == 0 else _of_schemas(name, place)


def _of_module(module: nn.Module | None) -> Effect:
    """Tell what a module that a graph calls as a whole does to what it is given, by a trace of its `forward`."""
    if _is_layer(module):
        return READS
    body = None if module is None else _body(module)
    if body is not None:
        return _of_body(body)
    return SHARES if _is_torchs(module) and not getattr(module, "inplace", False) else ANYTHING


def _of_body(body: fx.GraphModule) -> Effect:
    """Tell what a graph does to what it is given."""
    writes = shares = False
    for given in body.graph.find_nodes(op="placeholder"):
        for user, does in uses(given):
            writes, shares = writes or does.writes, shares or user.op == "output"
    return Effect(writes, shares)


def is_written(node: fx.Node) -> bool:
    """Tell whether something may write into a value, or into what may be in its memory.

    Example:
        >>> graph = torch.fx.symbolic_trace(lambda x: (x + 1)[0].mul_(2)).graph
        >>> [is_written(node) for node in graph.nodes]
        [False, True, True, False, False]
    """
    return any(does.writes for _, does in uses(node))


def uses(node: fx.Node) -> list[tuple[fx.Node, Effect]]:
    """Return all nodes that are given a value or what may be in its memory, and what they do to that."""
    found: list[tuple[fx.Node, Effect]] = []
    stack, seen = [node], {node}
    while stack:
        value = stack.pop()
        for user in value.users:
            does = effect(user, value)
            found.append((user, does))
            if does.shares and user not in seen:
                seen.add(user)
                stack.append(user)
    return found


def _body(module: nn.Module) -> fx.GraphModule | None:
    """Return the graph of a module, or None if its code cannot be traced, or is not all that a call runs."""
    if isinstance(module, fx.GraphModule):
        return module
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if any(getattr(part, hook) for part in module.modules() for hook in hooks):
        return None
    return trace_inside(module)


def _called_module(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    return None if owner is None else owner.get_submodule(str(node.target))


def _nested(node: fx.Node) -> list[fx.GraphModule]:
    """Return the graphs that a higher-order operator is given."""
    owner = node.graph.owning_module
    attributes = [operand for operand in node.all_input_nodes if operand.op == "get_attr" and owner is not None]
    found = (operator.attrgetter(str(operand.target))(owner) for operand in attributes)
    return [part for part in found if isinstance(part, fx.GraphModule)]


def _is_layer(module: Any) -> bool:
    """Tell whether a module is a recurrent layer of torch's, or stands for one."""
    return isinstance(module, Unrolled) or (_is_torchs(module) and is_recurrent(module))


def _is_torchs(module: Any) -> bool:
    """Tell whether a module is one of PyTorch's, which write to their own buffers at most, or `inplace`."""
    return type(module).__module__.startswith("torch.nn.")


def _is_pythons(function: Any) -> bool:
    return getattr(function, "__module__", None) in ("_operator", builtins.__name__, math.__name__)


@functools.cache
def _signatures() -> dict[Any, Any]:
    return torch.overrides.get_testing_overrides()


def _is_overridable(function: Any) -> bool:
    return function in _signatures()


def _is_inplace(user: fx.Node) -> bool:
    """Tell whether a function of torch's is called with `inplace`, or has a name that ends with an underscore."""
    target: Any = user.target
    if target.__name__.endswith("_"):
        return True
    return bool(_given(user).get("inplace"))


@functools.cache
def _is_of_memory(attribute: str) -> bool:
    """Tell whether an attribute of a tensor is a tensor, which is then in its memory."""
    try:
        return not isinstance(getattr(torch.empty(1, 1), attribute), (int, bool, tuple, torch.dtype, torch.device))
    except (AttributeError, RuntimeError):
        return True
