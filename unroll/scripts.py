"""The pass on TorchScript: explicit gate operations where recurrent operators were called.

Every method of every submodule is rewritten where it stands, so that control flow, `train()` and `eval()`,
parameters and the names of submodules stay as they were.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll import scripting
from unroll.calls import Steps
from unroll.plan import Plan
from unroll.recurrence import CELL_MODES, LAYERS, Problem, Recurrence, UnrollError, read_call
from unroll.scripting import ScriptWriter
from unroll.trees import SCRIPT_KINDS, Where, chooses
from unroll.values import Value, many_objects

LAYER_NAMES = {kind.__name__ for kind in (*LAYERS, *CELL_MODES)}
"""The classes whose submodules give a layer its name"""

OTHER_KINDS = re.compile(r"(aten|quantized)::\w*(lstm|gru|rnn)(?!\w*(prepack|flatten|backward))\w*")
"""Quantized operators and those of one backend, which are recurrent and refused"""


def unroll_script(module: Any, args: Any = None, *, where: Where = None, plan: Plan, steps: Steps = None) -> Any:
    """A copy of the script module with explicit gate operations in place of recurrent operators.

    The copy is what saving and loading would give, but shares its tensors with the original: parameters, buffers
    and lists of them. A layer is called by the path of its module; where a module calls an operator itself, or was
    frozen, by the operator's name after the path, such as `encoder.lstm` or, for the next one, `encoder.lstm_2`.

    Raises:
        UnrollError: with everything that cannot be honoured.
    """
    copied = _prepared_copy(module)
    _share(module, copied)
    sites = list(_sites(copied))
    problems = _unmatched(where, sites, copied)
    picked = []
    for number, site in enumerate(sites):
        picks = {chooses(where, [name], instance) for name, instance in site.instances.items()}
        if len(picks) > 1:
            mend = "choose all of them, or freeze the module (torch.jit.freeze)"
            problems.append(Problem(", ".join(site.instances), "share one piece of compiled code", mend))
        if True in picks:
            picked.append(number)
    _refuse(problems)
    seen = None if args is None else _run_and_note(copied, args)
    jobs = []
    for number in picked:
        try:
            noted = None if seen is None else seen.get(number, [])
            jobs.append((sites[number], *sites[number].read(noted), sites[number].steps(steps, noted)))
        except UnrollError as error:
            problems += error.problems
    problems += _unknown_names(steps, [sites[number] for number in picked])
    _refuse(problems)
    with many_objects():
        for site, reading, weights, count in jobs:
            site.write(reading, weights, count, plan)
    for graph in {id(site.graph): site.graph for site, *_ in jobs}.values():
        torch._C._jit_pass_dce_graph(graph)
        torch._C._jit_pass_constant_pooling(graph)  # pyright: ignore[reportAttributeAccessIssue]
        torch._C._jit_pass_lint(graph)
    left = [site for number, site in enumerate(sites) if number not in picked]
    if len(list(_sites(copied))) != len(left):
        raise UnrollError(Problem(module.original_name, "is still recurrent in the copy", "report this model"))
    return copied


def _refuse(problems: Iterable[Problem]) -> None:
    """Two methods of one layer, for padded and for packed input, may have the same."""
    if different := list(dict.fromkeys(problems)):
        raise UnrollError(*different)


def _copy(module: Any) -> Any:
    try:
        with scripting.quiet():
            return torch.jit.load(io.BytesIO(module.save_to_buffer()))
    except Exception as error:
        finding = f"cannot be saved and loaded ({str(error).strip().splitlines()[0]})"
        mend = "take out what cannot be saved, such as functions under torch.jit.ignore"
        raise UnrollError(Problem(module.original_name, finding, mend)) from error


def _prepared_copy(module: Any) -> Any:
    """A copy in which operators stand in methods, none of them in a function that methods call."""
    copied = _copy(module)
    graphs: dict[int, tuple[Any, Any]] = {}
    for part in copied.modules():
        for name in part._c._method_names():
            found = _walk(part._c._get_method(name).graph)
            graphs |= {id(graph): (part, graph) for node, graph in found if node.kind() == "prim::CallFunction"}
    if not graphs:
        return copied
    for graph in [graph for part, graph in graphs.values() if _calls_recurrent_function(part, graph)]:
        torch._C._jit_pass_inline(graph)
    return _copy(copied)  # inlining has compiled what is called; nothing that is to change may be compiled yet


def _share(module: Any, copied: Any) -> None:
    """Give the copy the very tensors of the original."""
    originals = dict(module.named_modules(remove_duplicate=False))
    for path, ours in copied.named_modules(remove_duplicate=False):
        theirs = originals[path]
        for name in ours._concrete_type.get_attributes():
            value = theirs._c.getattr(name)
            leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
            if leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
                ours._c.setattr(name, value)


class _Unknown:
    """What is only known when the graph runs."""


def _known(value: Any, module: Any) -> Any:
    """What a graph's value is for this module, as far as the module tells."""
    node = value.node()
    kind = node.kind()
    if kind == "prim::Constant":
        return value.toIValue()
    if kind == "prim::ListConstruct":
        return [_known(part, module) for part in node.inputs()]
    if kind == "prim::GetAttr":
        owner = _known(node.input(), module)
        return owner if owner is _Unknown else getattr(owner, node.s("name"))
    return module if kind == "prim::Param" and value.type() == module._c._type() else _Unknown


def _owner(value: Any) -> list[str] | None:
    """The path, from its method's module, to the module that holds a value or the first of a list."""
    node = value.node()
    if node.kind() == "prim::ListConstruct" and node.inputsSize():
        return _owner(node.inputsAt(0))
    path = []
    while node.kind() == "prim::GetAttr":
        path.append(node.s("name"))
        node = node.input().node()
    return path[:0:-1] if path else None


@dataclass(frozen=True)
class _Reading:
    recurrence: Recurrence
    dtype: torch.dtype


class _Site:
    """A node that runs a recurrent operator, in the code that some submodules share."""

    def __init__(self, node: Any, graph: Any, instances: Mapping[str, Any], *, is_called: bool) -> None:
        self.node = node
        self.graph = graph
        self.instances = instances
        """The submodules by the layer's name there"""
        self.is_called = is_called
        """Whether the model itself calls the method, and not only who takes a submodule out of it"""
        self.operator = node.kind()
        self.kind = self.operator.removeprefix("aten::").removesuffix("_cell")
        self.is_cell = self.operator.endswith("_cell")
        self.packed = "batch_sizes" in node.schema()

    @property
    def name(self) -> str:
        return next(iter(self.instances))

    def argument(self, name: str) -> Any:
        return self.node.namedInput(name)

    def weights(self) -> list[Any] | Any:
        """The graph's values of the weights, or that of a list of them."""
        if self.is_cell:
            values = [self.argument(name) for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
            return [value for value in values if not value.node().mustBeNone()]
        params = self.argument("params")
        return list(params.node().inputs()) if params.node().kind() == "prim::ListConstruct" else params

    def read(self, noted: list[Any] | None) -> tuple[_Reading, list[Any]]:
        """What the operator runs, and its weights as far as they are known."""
        if self.operator not in SCRIPT_KINDS:
            mend = "unroll the model before it is traced or quantized, or leave the layer out by where="
            raise UnrollError(Problem(self.name, f"runs {self.operator}, whose weights are in a form of its own", mend))
        readings = [self._read(name, instance, noted) for name, instance in self.instances.items()]
        if any(reading != readings[0][0] for reading, _ in readings):
            mend = "freeze the module first (torch.jit.freeze)"
            finding = "share one piece of compiled code but not sizes and dtype"
            raise UnrollError(Problem(", ".join(self.instances), finding, mend))
        return readings[0]

    def _read(self, name: str, instance: Any, noted: list[Any] | None) -> tuple[_Reading, list[Any]]:
        problems = []
        options: dict[str, Any] = {}
        names = () if self.is_cell else ("has_biases", "num_layers", "dropout", "bidirectional")
        for option in (*names, *(() if self.is_cell or self.packed else ("batch_first",))):
            options[option] = value = _known(self.argument(option), instance)
            if self.argument(option).node().kind() != "prim::Constant":
                mend = "make it a constant of the graph, by Final[...] or torch.jit.freeze"
                found = "when it runs" if value is _Unknown else "in an attribute that may change"
                problems.append(Problem(name, f"has its {option} only {found}", mend))
        values = self.weights()
        whole = not isinstance(values, list)
        weights: Any = _known(values, instance) if whole else [_known(value, instance) for value in values]
        if self.is_cell:
            weights = [weight for weight in weights if weight is not None]
        if weights is _Unknown or not all(isinstance(weight, Tensor) for weight in weights):
            weights = noted[0][1] if noted else []
        if not weights:
            mend = "give example inputs, unroll(module, args)"
            problems.append(Problem(name, "computes its weights, so that their shapes are unknown", mend))
        if self.is_cell:
            options["has_biases"] = len(weights) == 4
        if problems:
            raise UnrollError(*problems)
        recurrence = read_call(self.kind, [w.shape for w in weights], **options, is_cell=self.is_cell)
        expected = sum(map(len, recurrence.weight_names))
        if len(weights) != expected:
            finding = f"is given {len(weights)} weights, where its options ask for {expected}"
            raise UnrollError(Problem(name, finding, "give all weights, and biases to both input and state or none"))
        return _Reading(recurrence, weights[0].dtype), weights

    def steps(self, asked: Steps, noted: list[Any] | None) -> int | None:
        """The number of time steps to write, or None for a loop over any number."""
        if self.is_cell or not self.is_called:
            return None
        if isinstance(asked, Mapping):
            found = {asked[name] for name in self.instances if name in asked}
            partial = found and not all(name in asked for name in self.instances)
        else:
            found, partial = set() if asked is None else {asked}, False
        if noted is not None and self.packed:
            found = found or {0}
        elif noted is not None:
            first = _known(self.argument("batch_first"), next(iter(self.instances.values())))
            lengths = {shape[1 if first else 0] for shape, _ in noted}
            if len(lengths) != 1:
                finding = f"runs with {sorted(lengths)} time steps" if lengths else "does not run with these args"
                raise UnrollError(Problem(self.name, finding, "leave args out for a loop over any number"))
            if found and found != lengths:
                finding = f"has {lengths.pop()} time steps with these args, but steps={found.pop()!r} was given"
                raise UnrollError(Problem(self.name, finding, "leave out one of them"))
            found = lengths
        if not found:
            return None
        if partial or len(found) > 1:
            mend = "give the same number for each, or freeze the module (torch.jit.freeze)"
            raise UnrollError(Problem(", ".join(self.instances), "share one piece of compiled code", mend))
        if self.packed:
            mend = "leave its length open, without args and steps, or leave the layer out by where="
            raise UnrollError(Problem(self.name, "runs on packed data, whose batch sizes are known when it runs", mend))
        (count,) = found
        if not isinstance(count, int) or count < 1:
            raise UnrollError(Problem(self.name, f"steps={count!r}", "give a whole number from 1 upwards"))
        return count

    def write(self, reading: _Reading, known: list[Any], steps: int | None, plan: Plan) -> None:
        """Put explicit operations before the node and hand their results to those that read it."""
        node, writer = self.node, ScriptWriter(self.name, self.graph)
        with self.graph.insert_point_guard(node):
            values = self.weights()
            if isinstance(values, list):
                weights: list[Any] = [Value(writer, node=value) for value in values]
                constant = all(value.node().kind() == "prim::Constant" for value in values)
            else:
                constant = values.node().kind() == "prim::Constant"
                weights = [] if constant else writer.items(Value(writer, node=values), len(known))
            train: Any = False
            if not self.is_cell:
                value = self.argument("train")
                train = value.toIValue() if value.node().kind() == "prim::Constant" else Value(writer, node=value)
            results = writer.write(
                reading.recurrence,
                plan,
                known if constant else weights,
                reading.dtype,
                Value(writer, node=node.inputsAt(0)),
                Value(writer, node=self.argument("hx")),
                train=train,
                steps=steps,
                batch_sizes=Value(writer, node=self.argument("batch_sizes")) if self.packed else None,
            )
        for output, result in zip(node.outputs(), results, strict=True):
            output.replaceAllUsesWith(result.node)
        node.destroy()


def _walk(graph: Any) -> Iterator[tuple[Any, Any]]:
    """All nodes in their order, those in blocks and in the graphs of parallel tasks included, with their graph."""
    blocks = [graph]
    while blocks:
        block = blocks.pop(0)
        if isinstance(block, tuple):
            yield block
            continue
        inside: list[Any] = []
        for node in block.nodes():
            inside += [(node, graph), *node.blocks()]
            for name in node.attributeNames():
                if node.kindOf(name) == "g":
                    inside += _walk(node.g(name))
        blocks = inside + blocks


def _recurrent(kind: str) -> bool:
    return kind in SCRIPT_KINDS or OTHER_KINDS.fullmatch(kind) is not None


def _count(graph: Any) -> int:
    return sum(_recurrent(node.kind()) for node, _ in _walk(graph))


def _sites(root: Any) -> Iterator[_Site]:
    kinds: dict[str, dict[str, Any]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        kinds.setdefault(str(module._c._type()), {})[path] = module
    called = _called(root)
    for kind, modules in kinds.items():
        module = next(iter(modules.values()))
        seen: Counter[str] = Counter()
        for method in module._c._method_names():
            for node, graph in _walk(module._c._get_method(method).graph):
                if _recurrent(node.kind()):
                    suffix = _suffix(node, module, seen)
                    names = {".".join(filter(None, (path, suffix))): m for path, m in modules.items()}
                    instances = {name or m.original_name: m for name, m in names.items()}
                    yield _Site(
                        node,
                        graph,
                        instances,
                        is_called=module is root or bool(called & {(kind, method), ("", method)}),
                    )


def _called(root: Any) -> set[tuple[str, str]]:
    """Methods that some method calls, by the name of their type; by none where only an interface is known."""
    found = set()
    for module in root.modules():
        for method in module._c._method_names():
            for node, _ in _walk(module._c._get_method(method).graph):
                if node.kind() == "prim::CallMethod":
                    kind = node.inputsAt(0).type()
                    found.add(("" if kind.is_interface_type() else str(kind), node.s("name")))
    return found


def _suffix(node: Any, module: Any, seen: Counter[str]) -> str:
    """What a layer is called after the path of the module in whose method it runs."""
    weights = re.search(r"w_ih|params|weight", node.schema())
    path = _owner(node.namedInput(weights[0])) if weights else None
    if path is not None and functools.reduce(getattr, path, module).original_name in LAYER_NAMES:
        return ".".join(path)
    kind = node.kind().removeprefix("aten::")
    seen[kind] += 1
    return kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"


def _calls_recurrent_function(module: Any, graph: Any) -> bool:
    """Whether a function that is not a method, called from this graph, holds a recurrent operator."""
    inlined = graph.copy()
    torch._C._jit_pass_inline(inlined)
    count = _count(inlined) - _count(graph)
    for call in graph.findAllNodes("prim::CallMethod"):
        owner = _known(call.inputsAt(0), module)
        if owner is not _Unknown:
            count -= _count(owner._c._get_method(call.s("name")).inlined_graph)
    return count > 0


def _unmatched(where: Where, sites: Iterable[_Site], root: Any) -> list[Problem]:
    """A problem for each pattern that names neither a layer nor what may have been one."""
    if where is None or callable(where):
        return []
    names = [(name, instance) for site in sites for name, instance in site.instances.items()]
    done = [(name, module) for name, module in root.named_modules() if module.original_name in LAYER_NAMES]
    known = ", ".join(dict.fromkeys(name for name, _ in names)) or "none"
    return [
        Problem(f"where={pattern!r}", "names no recurrent layer", f"the recurrent layers are: {known}")
        for pattern in ([where] if isinstance(where, str) else where)
        if not any(chooses(pattern, [name], module) for name, module in itertools.chain(names, done))
    ]


def _unknown_names(steps: Steps, sites: Iterable[_Site]) -> list[Problem]:
    if not isinstance(steps, Mapping):
        return []
    names = list(dict.fromkeys(name for site in sites if not site.is_cell for name in site.instances))
    mend = f"the layers with steps are: {', '.join(names) or 'none'}"
    return [Problem(f"steps[{name!r}]", "names no recurrent layer", mend) for name in steps if name not in names]


_noted: ContextVar[dict[int, list[Any]]] = ContextVar("noted")


@torch.jit.ignore()
def _note(number: int, input: Tensor, weights: list[Tensor]) -> None:
    kinds = [torch.empty_like(weight, device="meta") for weight in weights]
    _noted.get().setdefault(number, []).append((tuple(input.shape), kinds))


_note.__annotations__ = get_type_hints(_note)  # TorchScript calls it from compiled code, and does not read strings


def _noting(number: int, input: Tensor, weights: list[Tensor]) -> None:
    _note(number, input, weights)


def _run_and_note(module: Any, args: Any) -> dict[int, list[Any]]:
    """Input shape and weights of each site, by its number, at every call in a run of the module."""
    copied = _copy(module)
    for number, site in enumerate(_sites(copied)):
        writer = ScriptWriter("", site.graph)
        with site.graph.insert_point_guard(site.node):
            values = site.weights()
            weights: Any = [Value(writer, node=value) for value in values] if isinstance(values, list) else None
            weights = Value(writer, node=values) if weights is None else weights
            input = Value(writer, node=site.node.inputsAt(0))
            writer.run(scripting.compiled(_noting), number, input, weights)
    found: dict[int, list[Any]] = {}
    token = _noted.set(found)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            copied(*(args if isinstance(args, (tuple, list)) else (args,)))
    except Exception as error:
        finding = f"the module cannot be run on them ({str(error).strip().splitlines()[-1]})"
        raise UnrollError(Problem("args", finding, "give arguments that fit it, or steps=")) from error
    finally:
        _noted.reset(token)
    return found
