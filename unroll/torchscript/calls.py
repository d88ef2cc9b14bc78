"""Calls of recurrent operators in TorchScript: where they stand, and what they run."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Steps
from unroll.core.recurrence import CLASS_NAMES, Recurrence, read_call
from unroll.torchscript.operators import SCRIPT_KINDS, count_recurrent, is_recurrent, methods, walk


class Unknown:
    """A stand-in for what is only known when the graph runs."""


class Observed(NamedTuple):
    """The arguments that a call was seen to be given."""

    shape: tuple[int, ...]
    """The shape of the input"""
    weights: list[Tensor]
    """The weights, on the meta device"""


class ScriptCall:
    """A node that runs a recurrent operator, in code that several submodules may share."""

    def __init__(self, node: Any, graph: Any, instances: Mapping[str, Any], *, is_called: bool) -> None:
        self.node = node
        self.graph = graph
        self.instances = instances
        """The submodules by the layer's name in each"""
        self.is_called = is_called
        """True if the model itself calls the method, and not only who takes a submodule out of it"""
        self.operator = node.kind()
        self.kind = self.operator.removeprefix("aten::").removesuffix("_cell")
        self.is_cell = self.operator.endswith("_cell")
        self.packed = "batch_sizes" in node.schema()
        self.name = next(iter(instances))
        self.names = ", ".join(instances)

    def argument(self, name: str) -> Any:
        return self.node.namedInput(name)

    def weights(self) -> list[Any] | Any:
        """Return the graph's values of the weights, or that of a list of them."""
        if self.is_cell:
            values = [self.argument(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
            return [value for value in values if not value.node().mustBeNone()]
        params = self.argument("params")
        return list(params.node().inputs()) if params.node().kind() == "prim::ListConstruct" else params

    def read(self, noted: list[Observed] | None) -> tuple[Recurrence, list[Tensor]]:
        """Return the recurrence that the operator runs, and its weights.

        Args:
            noted: the arguments that it was given in a run, if there was one.
        """
        if self.operator not in SCRIPT_KINDS:
            fix = "unroll the model before it is traced or quantized, or leave the layer out by where="
            raise UnrollError(Problem(self.name, f"runs {self.operator}, whose weights are in a form of its own", fix))
        first, *others = [self._read(name, instance, noted) for name, instance in self.instances.items()]
        if any(other[0] != first[0] or other[1][0].dtype != first[1][0].dtype for other in others):
            finding = "share one piece of compiled code but not sizes and dtype"
            raise UnrollError(Problem(self.names, finding, "freeze the module first (torch.jit.freeze)"))
        return first

    def _read(self, name: str, instance: Any, noted: list[Observed] | None) -> tuple[Recurrence, list[Tensor]]:
        problems = Problems()
        options: dict[str, Any] = {}
        wanted = () if self.is_cell else ("has_biases", "num_layers", "dropout", "bidirectional")
        for option in (*wanted, *(() if self.is_cell or self.packed else ("batch_first",))):
            options[option] = value = known(self.argument(option), instance)
            if not is_constant(self.argument(option)):
                fix = "make it a constant of the graph, by Final[...] or torch.jit.freeze"
                found = "when it runs" if value is Unknown else "in an attribute that may change"
                problems.add(name, f"has its {option} only {found}", fix)
        values = self.weights()
        weights = known(values, instance)
        if weights is Unknown or not all(isinstance(weight, Tensor) for weight in weights):
            weights = noted[0].weights if noted else []
        if not weights:
            fix = "give example inputs, unroll(module, args)"
            problems.add(name, "computes its weights, so that their shapes are unknown", fix)
        problems.check()
        if self.is_cell:
            options["has_biases"] = len(weights) == 4
        recurrence = read_call(self.kind, [w.shape for w in weights], **options, is_cell=self.is_cell)
        expected = sum(map(len, recurrence.weight_names))
        if len(weights) != expected:
            finding = f"is given {len(weights)} weights, where its options ask for {expected}"
            raise UnrollError(Problem(name, finding, "give all weights, and biases to both input and state or none"))
        return recurrence, weights

    def steps(self, asked: Steps, noted: list[Observed] | None) -> int | None:
        """Return the number of time steps to write, or None for a loop over any number."""
        if self.is_cell or not self.is_called:
            return None
        if isinstance(asked, Mapping):
            wanted = [asked[name] for name in self.instances if name in asked]
        else:
            wanted = [] if asked is None else [asked]
        if self.packed and (wanted or noted is not None):
            fix = "leave its length open, without args and steps, or leave the layer out by where="
            raise UnrollError(Problem(self.name, "runs on packed data, whose batch sizes are known when it runs", fix))
        if noted is not None:
            axis = 1 if known(self.argument("batch_first"), next(iter(self.instances.values()))) else 0
            lengths = sorted({call.shape[axis] for call in noted})
            if len(lengths) != 1:
                finding = f"runs with {lengths} time steps" if lengths else "does not run with these args"
                raise UnrollError(Problem(self.name, finding, "leave args out for a loop over any number"))
            if any(count != lengths[0] for count in wanted):
                finding = f"has {lengths[0]} time steps with these args, but steps={asked!r} was given"
                raise UnrollError(Problem(self.name, finding, "leave out one of them"))
            wanted = lengths
        elif isinstance(asked, Mapping) and wanted and wanted != wanted[:1] * len(self.instances):
            fix = "give the same number for each, or freeze the module (torch.jit.freeze)"
            raise UnrollError(Problem(self.names, "share one piece of compiled code", fix))
        if not wanted:
            return None
        if not isinstance(wanted[0], int) or wanted[0] < 1:
            raise UnrollError(Problem(self.name, f"steps={wanted[0]!r}", "give a whole number from 1 upwards"))
        return wanted[0]


def is_constant(value: Any) -> bool:
    """Tell whether the graph has a value, or all of a list of them, as constants."""
    if isinstance(value, list):
        return all(map(is_constant, value))
    return value.node().kind() == "prim::Constant"


def known(value: Any, module: Any) -> Any:
    """Evaluate a graph's value, or each of a list of them, in a method of this module, as far as the module tells."""
    if isinstance(value, list):
        return [known(part, module) for part in value]
    node = value.node()
    kind = node.kind()
    if kind == "prim::Constant":
        return value.toIValue()
    if kind == "prim::ListConstruct":
        return known(list(node.inputs()), module)
    if kind == "prim::GetAttr":
        owner = known(node.input(), module)
        return owner if owner is Unknown else getattr(owner, node.s("name"))
    return module if kind == "prim::Param" and value.type() == module._c._type() else Unknown


def find_calls(root: Any) -> list[ScriptCall]:
    """Find all calls of recurrent operators in the methods of a module and its submodules."""
    # submodules of one type share its code: by type and path
    by_kind: dict[str, dict[str, Any]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        by_kind.setdefault(str(module._c._type()), {})[path] = module
    called = _called(root)
    found = []
    seen: dict[str, Counter[str]] = {}
    for module, method, whole in methods(root):
        kind = str(module._c._type())
        is_called = module is root or not called.isdisjoint({(kind, method), ("", method)})
        for node, graph in walk(whole):
            if is_recurrent(node):
                suffix = _suffix(node, module, seen.setdefault(kind, Counter()))
                paths = {".".join(filter(None, (path, suffix))): m for path, m in by_kind[kind].items()}
                instances = {name or m.original_name: m for name, m in paths.items()}
                found.append(ScriptCall(node, graph, instances, is_called=is_called))
    return found


def _called(root: Any) -> set[tuple[str, str]]:
    """Return methods that some method calls, by the name of their type; by none where only an interface is known."""
    found = set()
    for _, _, graph in methods(root):
        for node, _ in walk(graph):
            if node.kind() == "prim::CallMethod":
                kind = node.inputsAt(0).type()
                found.add(("" if kind.is_interface_type() else str(kind), node.s("name")))
    return found


def _suffix(node: Any, module: Any, seen: Counter[str]) -> str:
    """Return the name of a layer after the path of the module in whose method it runs."""
    weights = re.search(r"w_ih|params|weight", node.schema())
    path = _owner(node.namedInput(weights[0])) if weights else None
    if path is not None and functools.reduce(getattr, path, module).original_name in CLASS_NAMES:
        return ".".join(path)
    kind = node.kind().partition("::")[2]
    seen[kind] += 1
    return kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"


def _owner(value: Any) -> list[str] | None:
    """Return the path, from its method's module, to the module that holds a value or the first of a list."""
    node = value.node()
    if node.kind() == "prim::ListConstruct" and node.inputsSize():
        return _owner(node.inputsAt(0))
    path = []
    while node.kind() == "prim::GetAttr":
        path.append(node.s("name"))
        node = node.input().node()
    # found from the value outwards; without the value's own name
    return path[:0:-1] if path else None


def calls_recurrent_function(module: Any, graph: Any) -> bool:
    """Tell whether a function that is not a method, called from this graph, holds a recurrent operator.

    Compiles what the graph calls as it is now.
    """
    inlined = graph.copy()
    torch._C._jit_pass_inline(inlined)
    # operators in all that is called; those in methods are taken off, and those in functions stay
    count = count_recurrent(inlined) - count_recurrent(graph)
    for call in graph.findAllNodes("prim::CallMethod"):
        owner = known(call.inputsAt(0), module)
        if owner is not Unknown:
            count -= count_recurrent(owner._c._get_method(call.s("name")).inlined_graph)
    return count > 0
