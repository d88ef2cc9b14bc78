"""Uses of operators in an ExportedProgram, or a graph of aten operators."""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.targets.tables import Target
from unroll.targets.uses import CONSTANT, INPUT, RECURRENT, Operand, Unknown, Use

CONTROL_FLOW = {"cond", "while_loop", "scan", "map_impl", "associative_scan"}

SIZES = (torch.Tensor, torch.SymInt, torch.SymBool, torch.SymFloat, int)
"""Types of the values that a node of Python's own may give: a piece of a result, or arithmetic on sizes"""

Operands = Mapping[fx.Node, Operand]


def read_aten(model: ExportedProgram | fx.GraphModule, target: Target) -> list[Use]:
    """Return the uses of operators in a program or graph, also in loops and branches.

    An operator that the target does not offer counts as those that PyTorch's decompositions make of it, unless it is
    recurrent.

    Args:
        model: a result of `torch.export` or `make_fx`.
        target: tells which operators it has, and which are decomposed for it.

    Raises:
        UnrollError: naming calls of what is no aten operator, and values without metadata.
    """
    program = isinstance(model, ExportedProgram)
    module = model.graph_module if program else model
    # Names of placeholders that the user gives (None for all), and of those that the program holds.
    given = set(model.graph_signature.user_inputs) if program else None
    specs = model.graph_signature.input_specs if program else ()
    held = frozenset(spec.arg.name for spec in specs if spec.kind is not InputKind.USER_INPUT)
    uses: list[Use] = []
    problems = Problems()
    for name, part in module.named_modules():
        if not isinstance(part, fx.GraphModule) or name.endswith("_guards_fn"):
            continue
        reader = _Reader(target, held if part is module else frozenset())
        for node in part.graph.nodes:
            mine = part is module and (given is None or node.name in given)
            with problems:
                uses += reader.uses(node, mine)
    problems.check()
    return uses


class _Reader:
    """A reader of the nodes of one graph, in their order."""

    def __init__(self, target: Target, held: frozenset[str]) -> None:
        self.target = target
        self.held = held
        self.operands: dict[fx.Node, Operand] = {}  # of placeholders and attributes, which alone may be constant
        self.parts: dict[Any, list[fx.Node] | None] = {}

    def uses(self, node: fx.Node, given: bool) -> Iterator[Use]:
        """Yield what a node uses; a placeholder only if it is `given` by the model's user, or held by the model."""
        if node.op == "output" or (node.op == "call_module" and node.target == "_guards_fn"):
            return
        if node.op in ("placeholder", "get_attr"):
            held = node.op == "get_attr" or node.name in self.held
            value = node.meta.get("val", _attribute(node) if node.op == "get_attr" else None)
            if isinstance(value, torch.Tensor):
                self.operands[node] = _operand(value, constant=held)
                if given or held:
                    yield Use(node.name, CONSTANT if held else INPUT, outputs=[self.operands[node]])
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            name = node.target.__name__
            yield Use(node.name, name, control_flow=name in CONTROL_FLOW)
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.returns:  # else it checks something, and computes nothing
                yield from self.call(node, node.target)
        elif not isinstance(node.meta.get("val"), SIZES) and not _only_checked(node):
            fix = "give what torch.export.export makes of the model, or make_fx with tracing_mode='fake'"
            finding = f"is a {node.op} of {_name(node.target)}, which is no aten operator"
            raise UnrollError(Problem(node.name, finding, fix))

    def call(self, node: fx.Node, operator: Any) -> Iterator[Use]:
        if "val" not in node.meta:
            fix = "give what torch.export.export makes of the model"
            raise UnrollError(Problem(node.name, "has no metadata of its value", fix))
        if not _gives_tensors(node):
            return  # arithmetic on sizes
        operands = {n: self.operands.get(n) or _operand(n.meta["val"]) for n in _tensors(node)}
        name = str(operator)
        # judged as it is, if it is offered or recurrent; else by the operators it is decomposed into
        whole = self.target.restriction(name) is not None or name.startswith(RECURRENT)
        parts = None if whole else self.decomposed(node, operator, list(operands))
        if parts is None:
            yield _use(node, operator, operands, node.name)
            return
        # one placeholder for each operand, in the same order, and then for computed sizes
        inner = dict(zip((part for part in parts if part.op == "placeholder"), operands.values(), strict=False))
        for part in parts:
            if isinstance(part.target, torch._ops.OpOverload) and _gives_tensors(part):
                found = {n: inner.get(n) or _operand(n.meta["val"]) for n in _tensors(part)}
                yield _use(part, part.target, found, node.name, origin=name)

    def decomposed(self, node: fx.Node, operator: Any, tensors: list[fx.Node]) -> list[fx.Node] | None:
        """Do as `_decomposed` does, once for each operator and kind of arguments."""
        kinds = map_arg((node.args, dict(node.kwargs)), lambda n: _kind(n, tensors))
        key = operator, str(kinds)
        if key not in self.parts:
            self.parts[key] = _decomposed(node, operator, tensors, self.target.decomposed)
        return self.parts[key]


def _kind(node: fx.Node, tensors: list[fx.Node]) -> Any:
    """Return what tells operands apart, with their place among the tensors of a call."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return str(value)
    return tensors.index(node), str(value.dtype), *map(str, (*value.shape, "|", *value.stride()))


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that it reads tensors from."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _only_checked(node: fx.Node) -> bool:
    """Tell whether all that it leads to is an assertion, which computes nothing."""
    return node.target is torch._assert or (bool(node.users) and all(map(_only_checked, node.users)))


def _gives_tensors(node: fx.Node) -> bool:
    return any(isinstance(value, torch.Tensor) for value in _flat(node.meta.get("val")))


def _use(node: fx.Node, target: Any, operands: Operands, place: str, origin: str = "") -> Use:
    """Read a call, by the names of its schema."""
    inputs: dict[str, Operand] = {}
    attributes: dict[str, Any] = {}
    for k, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        value = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name, default)
        # an input if a tensor is in it, and then each tensor of a list is one; else an attribute
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(part in operands for part in parts if isinstance(part, fx.Node)):
            for number, part in enumerate(parts):
                if isinstance(part, fx.Node) and part in operands:
                    inputs[f"{argument.name}.{number}" if parts is value else argument.name] = operands[part]
        else:
            attributes[argument.name] = _plain(value)
    results = [value for value in _flat(node.meta["val"]) if isinstance(value, torch.Tensor)]
    # Of several results those up to the last one taken out and used; all if none is.
    taken: list[Any] = [user.args[1] for user in node.users if user.target is python_operator.getitem and user.users]
    outputs = [_operand(value) for value in results[: max(taken) + 1 if taken else None]]
    typed = inputs | {f"result {k}" if k else "result": output for k, output in enumerate(outputs)}
    return Use(place, str(target), inputs, attributes, outputs, typed, origin=origin)


def _operand(value: torch.Tensor, *, constant: bool = False) -> Operand:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Operand(str(value.dtype).removeprefix("torch."), shape, constant)


def _plain(value: Any) -> Any:
    """Return an argument without nodes: what is computed is `Unknown`."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (fx.Node, torch.SymInt)):
        return Unknown()
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _flat(value: Any) -> list[Any]:
    return [part for parts in value for part in _flat(parts)] if isinstance(value, (list, tuple)) else [value]


def _attribute(node: fx.Node) -> Any:
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target))


@cache
def _table(names: tuple[str, ...]) -> dict[Any, Callable[..., Any]]:
    """Return PyTorch's decompositions of these operators, or the core ones if there are none."""
    if not names:
        return dict(default_decompositions().items())
    found = (_resolved(name) for name in names)
    return get_decompositions([operator for operator in found if operator is not None])


def _resolved(name: str) -> Any:
    """Return `aten.add` or `aten.add.Tensor` by its name; None if this version of PyTorch does not have it."""
    value: Any = torch.ops
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _decomposed(node: fx.Node, operator: Any, tensors: list[fx.Node], names: tuple[str, ...]) -> list[fx.Node] | None:
    """Return what decompositions make of a call, one placeholder for each of its tensors, and of its sizes after them.

    None if nothing.
    """
    given = [*tensors, *(n for n in node.all_input_nodes if n not in tensors and isinstance(n.meta.get("val"), SIZES))]

    def call(*values: Any) -> Any:
        found = dict(zip(given, values, strict=True))
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: found.get(n, n.meta.get("val")))
        return operator(*args, **kwargs)

    # traced in the fake mode of the values themselves, which knows their symbolic sizes
    examples = [n.meta["val"] for n in given]
    mode = next(
        (value.fake_mode for value in _flat([*examples, node.meta["val"]]) if hasattr(value, "fake_mode")), None
    )
    with mode or nullcontext(), enable_python_dispatcher():
        made = make_fx(functionalize(call, remove="mutations"), decomposition_table=_table(names))(*examples)
    made.graph.eliminate_dead_code()
    calls = [n for n in made.graph.nodes if n.op == "call_function"]
    if any(n.target is operator for n in calls):
        return None  # no decomposition has changed it
    return [n for n in made.graph.nodes if n.target is not torch.ops.aten.copy_.default]  # back to what it was given
