"""Watches what a model computes, operation by operation, and finds those that see another thing in a piece."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.graphs.calls import calling_module
from unroll.modules.layers import Unrolled
from unroll.streams.pieces import joined, off, sight
from unroll.streams.states import ARGUMENT


class Event(NamedTuple):
    """The result of an operation."""

    place: str
    """The path of the module that runs it"""
    operation: str
    value: Tensor
    inputs: tuple[int, ...]
    """The events before it whose results it is given"""


class Events(list[Event]):
    """Collects the results of a run."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[int, tuple[Tensor, int]] = {}  # with the tensors, which keeps their `id`

    def add(self, place: str, operation: str, result: Any, given: Any) -> None:
        """Keep a copy of each tensor in a result."""
        before = [self._last[id(t)][1] for t in pytree.tree_leaves(given) if id(t) in self._last]
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self._last[id(value)] = value, len(self)
                self.append(Event(place, operation, value.detach().clone(), tuple(before)))

    def knows(self, result: Any) -> bool:
        """Tell whether each tensor of a result is there already."""
        return all(id(value) in self._last for value in pytree.tree_leaves(result) if isinstance(value, Tensor))


class _Functions(TorchFunctionMode):
    """Tells of each function of torch that is called, outside of unrolled layers."""

    def __init__(self, events: Events, path: list[str]) -> None:
        super().__init__()
        self.events, self.path, self.inside = events, path, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.inside:
            # what returns nothing has written into its first argument
            changed = args[0] if result is None and args else result
            self.events.add(self.path[-1], _called(func), changed, (args, kwargs))
        return result


def _called(target: Any) -> str:
    """Return the name of a function or method, such as `conv1d` for `aten.conv1d.default`."""
    name = target if isinstance(target, str) else getattr(target, "_opname", None) or getattr(target, "__name__", "")
    return str(name).strip("_")


@contextmanager
def watched(model: nn.Module, root: str, events: Events) -> Iterator[None]:
    """Collect what the modules of a model compute while this lasts, with `root` for the path of the model itself."""
    path, handles = [root], []
    functions = _Functions(events, path)

    def enter(name: str, module: nn.Module, *_: Any) -> None:
        path.append(name or root)
        functions.inside += isinstance(module, Unrolled)

    def leave(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        path.pop()
        functions.inside -= isinstance(module, Unrolled)
        if not functions.inside and not events.knows(result):
            with torch._C.DisableTorchFunction():  # copies are no operations of the model
                events.add(name or root, "", result, (args, kwargs))

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True))
        handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True, always_call=False))
    try:
        with functions:
            yield
    finally:
        for handle in handles:
            handle.remove()


class Interpreted(fx.Interpreter):
    """Runs a graph, and collects what its nodes compute, if there is something to collect it in."""

    def __init__(self, module: fx.GraphModule, events: Events | None) -> None:
        super().__init__(module)
        self.events = events

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        reads_state = n.target is operator.getitem and n.all_input_nodes[0].target == ARGUMENT
        if self.events is not None and n.op in ("call_function", "call_method", "call_module") and not reads_state:
            of_module = n.op == "call_module"
            place = str(n.target) if of_module else calling_module(n)[0] or n.name
            given = self.fetch_args_kwargs_from_env(n)
            self.events.add(place, "" if of_module else _called(n.target), result, given)
        return result


def causes(whole: Events, first: Events, second: Events) -> dict[str, str]:
    """Return, by its place, how far each operation looks that gives other results in two pieces, for like inputs.

    If there is none, those that give other numbers of steps.
    """
    pairs = _pairs(whole, first, second)
    wrong: set[int] = set()
    uneven: set[int] = set()
    looking: dict[str, str] = {}
    losing: dict[str, str] = {}
    for number, event in enumerate(whole):
        name = f" ({event.operation})" if event.operation else ""
        after_wrong, after_uneven = (not before.isdisjoint(event.inputs) for before in (wrong, uneven))
        pair = joined(event.value, *pairs[number]) if number in pairs else None
        if pair is None:
            lost = _lost(event.value, *pairs[number]) if number in pairs else ""
            if lost and not (after_wrong or after_uneven):
                losing.setdefault(event.place, lost + name)
            wrong |= {number} if after_wrong else set()
            uneven |= {number} if lost or after_uneven else set()
        elif (differing := off(event.value, pair.value)).any():
            wrong.add(number)
            if not (after_wrong or (after_uneven and pair.dim is None)):
                looking.setdefault(event.place, sight(differing, pair) + name)
    return looking or losing


def _lost(whole: Tensor, first: Tensor, second: Tensor) -> str:
    """Say that two pieces have another size along one dimension than the whole, if that is all."""
    sizes = [(n, a + b) for n, a, b in zip(whole.shape, first.shape, second.shape) if not n == a == b]
    same_rank = whole.dim() == first.dim() == second.dim()
    return f"gives {sizes[0][0]} steps for the whole, {sizes[0][1]} in pieces" if same_rank and len(sizes) == 1 else ""


def _pairs(whole: Events, first: Events, second: Events) -> dict[int, tuple[Tensor, Tensor]]:
    """Return, for each event of the whole, what the pieces give in its place."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    pieces = [_numbered(first), _numbered(second)]
    for key, numbers in _numbered(whole).items():
        a, b = ([events[k].value for k in of[key]] for events, of in zip((first, second), pieces))
        if len(numbers) == len(a) == len(b):
            found |= dict(zip(numbers, zip(a, b)))
        elif len(numbers) == len(a) + len(b):  # once a step
            found |= {k: (value, value) for k, value in zip(numbers, (*a, *b))}
    return found


def _numbered(events: Events) -> dict[tuple[str, str], list[int]]:
    """Return the numbers of the events of each operation in each place."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for k, event in enumerate(events):
        found[event.place, event.operation].append(k)
    return found
