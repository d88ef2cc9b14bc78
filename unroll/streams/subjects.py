"""Streaming models of every kind, as they are run to be checked."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Container, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from unroll.core.arguments import check_arguments
from unroll.core.patching import without_warnings
from unroll.core.recurrence import read_module
from unroll.graphs.calls import form_of, operands
from unroll.graphs.functions import bind, form_of_call, read_given
from unroll.modules.find import walk_objects
from unroll.modules.layers import Unrolled
from unroll.streams.chains import Chain
from unroll.streams.modules import Streaming
from unroll.streams.states import ARGUMENT, State
from unroll.streams.watching import Events, Interpreted, watched


class Run(NamedTuple):
    """The results of a model for a piece."""

    output: Any
    state: State
    steps: dict[str, int]
    """The number of steps that each of its layers ran"""


class Subject(Protocol):
    """A streaming model that is checked."""

    def fresh(self, *, double: bool = False) -> Any:
        """Return a copy that has not run yet, in evaluation mode if it has modes, on request in float64."""
        ...

    def run(
        self, model: Any, args: Any, kwargs: Mapping[str, Any], state: State | None, events: Events | None = None
    ) -> Run:
        """Run a copy on a piece, from zeros where there is no state, and collect what it computes."""
        ...

    @property
    def is_one_step(self) -> bool:
        """True if all layers are cells that are called once: a piece is one step then, along which nothing looks."""
        ...


class ModuleSubject:
    """A streaming module.

    Args:
        make: makes it anew.
        name: of the class of its model.
    """

    def __init__(self, make: Callable[[], Streaming], name: str) -> None:
        self.make, self.name = make, name

    def fresh(self, *, double: bool = False) -> Streaming:
        model = self.make()
        return (copy.deepcopy(model).double() if double else model).eval()

    def run(
        self,
        model: Streaming,
        args: Any,
        kwargs: Mapping[str, Any],
        state: State | None,
        events: Events | None = None,
    ) -> Run:
        steps: dict[str, int] = {}
        for layer in model.layers:
            layer.carry.run = partial(_counted, steps, layer)
        try:
            with nullcontext() if events is None else watched(model.model, self.name, events):
                output, after = model(*args, state=state, **kwargs)
                return Run(output, after, steps)
        finally:
            for layer in model.layers:
                del layer.carry.run

    @property
    def is_one_step(self) -> bool:
        layers = self.make().layers
        return all(layer.recurrence.is_cell and layer.carry.count in (0, 1) for layer in layers)


def _counted(steps: dict[str, int], layer: Any, forward: Any, input: Any, hx: Any) -> Any:
    """Run a layer as its carry does, and count its steps."""
    carry = layer.carry
    steps[carry.name] = steps.get(carry.name, 0) + layer.recurrence.frame(input.shape).steps
    return type(carry).run(carry, forward, input, hx)


class GraphSubject:
    """A streaming graph or program, of which a copy is interpreted without the guards on its sizes.

    Args:
        model: the graph or program.
        chains: of its calls, as `find_chains` returns them.
        zeros: its first state.
    """

    def __init__(self, model: fx.GraphModule | ExportedProgram, chains: Mapping[str, Chain], zeros: State) -> None:
        self.model, self.chains, self.zeros = model, list(chains.values()), zeros

    def fresh(self, *, double: bool = False) -> fx.GraphModule:
        if isinstance(self.model, ExportedProgram):
            module: Any = self.model.module(check_guards=False)
            with without_warnings(".*LeafSpec", category=FutureWarning):  # torch's, of what it copies itself
                return copy.deepcopy(module).double() if double else module
        tensors = [] if double else [value for _, value in walk_objects(self.model) if isinstance(value, Tensor)]
        module = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors}).eval()
        return module.double() if double else module

    def run(
        self,
        model: fx.GraphModule,
        args: Any,
        kwargs: Mapping[str, Any],
        state: State | None,
        events: Events | None = None,
    ) -> Run:
        if state is None:
            double = all(p.dtype == torch.float64 for p in model.parameters() if p.is_floating_point())
            state = {name: zero.double() if double else zero.clone() for name, zero in self.zeros.items()}
        if isinstance(self.model, ExportedProgram):
            given = pytree.tree_leaves((tuple(args), {**kwargs, ARGUMENT: state}))
        else:
            bound = inspect.signature(model.forward).bind(*args, **{ARGUMENT: state})
            bound.apply_defaults()
            given = bound.args
        runner = _Counting(model, events, {chain.first.node.name for chain in self.chains})
        output, after = runner.run(*given)
        return Run(output, after, runner.steps)

    @property
    def is_one_step(self) -> bool:
        return all(chain.first.recurrence.is_cell and chain.first is chain.last for chain in self.chains)


class _Counting(Interpreted):
    """Runs a graph, and counts the steps of some of its layers.

    Calls of torch's functions are checked before, which do not check their arguments all themselves.
    """

    def __init__(self, module: fx.GraphModule, events: Events | None, names: Container[str]) -> None:
        super().__init__(module, events)
        self.names = names
        self.steps: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "call_module" and n.name in self.names:
            layer: Any = self.fetch_attr(str(n.target))
            recurrence = layer.recurrence if isinstance(layer, Unrolled) else read_module(layer)
            self.steps[n.name] = recurrence.frame(operands(args, kwargs)[0].shape).steps
        elif form_of(n):
            kind, form = form_of_call(n.target, args, kwargs)
            given = bind(form, args, kwargs)
            if form != "packed":
                recurrence = read_given(kind, form, given, [weight.shape for weight in given["params"][:2]])
                check_arguments(recurrence, n.name, given["input"], given["hx"])
                if n.name in self.names:
                    self.steps[n.name] = recurrence.frame(given["input"].shape).steps
        return super().run_node(n)
