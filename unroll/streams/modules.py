"""Named states for modules: the model's own code runs, and its layers are given and asked their states."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Rules, Where, chooses
from unroll.core.patching import seeded
from unroll.core.plan import Plan
from unroll.modules.find import find, walk_objects
from unroll.modules.layers import Unrolled
from unroll.modules.replace import replace
from unroll.streams.carry import Carry, attach_carry
from unroll.streams.states import (
    MIXED_STATES,
    State,
    call_name,
    check_state_names,
    no_state,
    packed_problem,
    reads_the_future,
    without_rows,
    zero_states,
)


class Streaming(nn.Module):
    """A model whose recurrent states go in and come out, by name.

    Made by `unroll.streaming`. It runs the code of the model itself, with unrolled layers, for pieces of any length.

    Attributes:
        model: the model with unrolled layers. Called by itself it begins with zeros, as ever.
        example: the shape of each state in the run it was made with, by name.

    Shapes:
        args, kwargs: as the model takes them.
        state: by name, `h` and `c` of `[layers, B, H]` for a layer, of `[B, H]` for a cell; None for zeros.
        returns: what the model returns, and the state after it, named and shaped as the state before.

    Raises:
        UnrollError: for a state with other names or shapes, and if a layer is called more or fewer times without
            a state of the model's own than it was with the example.

    Example:
        >>> from unroll import streaming
        >>> x = torch.randn(7, 2, 3)
        >>> model = nn.Sequential(nn.GRU(3, 5))
        >>> streamed = streaming(model, x)
        >>> (first, _), state = streamed(x[:4])
        >>> (second, _), state = streamed(x[4:], state=state)
        >>> torch.allclose(torch.cat([first, second]), model(x)[0], atol=1e-6), list(state)
        (True, ['0.h'])
    """

    def __init__(self, model: nn.Module, layers: list[Unrolled], example: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.model = model
        self.layers = tuple(layers)
        self.example = dict(example)
        self.training = model.training
        self._turn = _Turn()

    def extra_repr(self) -> str:
        return ", ".join(self.example)

    def initial_state(self, batch: int | None = None) -> State:
        """Return zeros, in the type and on the device of the layers' weights.

        Args:
            batch: rows of the states; where layers run on several rows for each item of a batch, of the states with
                the fewest. As in the example if it is None.
        """
        layers = {name: layer for layer in self.layers for names in state_names(_carry(layer), layer) for name in names}
        example = {name: layers[name].like.new_empty(shape) for name, shape in self.example.items()}
        unbatched = [name for name, s in example.items() if without_rows(layers[name].recurrence, s.dim())]
        return zero_states(example, batch, unbatched)

    def forward(self, *args: Any, state: State | None = None, **kwargs: Any) -> tuple[Any, State]:
        # its layers hold the states of one run at a time: other threads wait
        with nullcontext() if torch.compiler.is_dynamo_compiling() else self._turn.lock:
            return self._forward(args, state, kwargs)

    def _forward(self, args: tuple[Any, ...], state: State | None, kwargs: dict[str, Any]) -> tuple[Any, State]:
        carries = [_carry(layer) for layer in self.layers]
        if any(carry.running for carry in carries):
            fix = "make another by unroll.streaming for a call from inside of it"
            raise UnrollError(Problem("streaming", "is called while a call of it is under way", fix))
        if state is not None:
            check_state_names("state", state, self.example)
        try:
            for layer, carry in zip(self.layers, carries):
                carry.clear()
                carry.running = True
                if state is not None:
                    carry.given = [tuple(state[name] for name in names) for names in state_names(carry, layer)]
            output = self.model(*args, **kwargs)
            return output, self._finals(carries)
        finally:
            for carry in carries:
                carry.running = False
                carry.clear()

    def _finals(self, carries: list[Carry]) -> State:
        """Return the state that the run has come to."""
        found: State = {}
        for layer, carry in zip(self.layers, carries):
            if len(carry.chains) != carry.count:
                times = f"{len(carry.chains)} times in this run, {carry.count} times with the example"
                raise UnrollError(carry.problem(f"is called without a state {times}"))
            if carry.chains and carry.foreign:
                raise UnrollError(Problem(carry.place, *MIXED_STATES))
            for names, states in zip(state_names(carry, layer), carry.chains):
                found.update(zip(names, states))
        return {name: found[name] for name in self.example}


class _Turn:
    """A lock, of which a copy or a pickle has another."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Turn, ()


def _carry(layer: Any) -> Carry:
    return layer.carry


def state_names(carry: Carry, layer: Unrolled) -> list[tuple[str, ...]]:
    """Return the names of a layer's states, for each of its chains."""
    return [tuple(call_name(carry.name, k, s) for s in layer.recurrence.cell.states) for k in range(carry.count or 0)]


def stream_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    rules: Rules | None,
    plan: Plan | None,
) -> Callable[[], Streaming]:
    """Return what makes streaming models of copies, after two runs of another copy on the example."""
    names = chosen_names(model, where, rules)

    def fresh() -> tuple[nn.Module, list[tuple[Unrolled, Carry]]]:
        """Make a copy, and attach a carry to those of its layers that may keep their state."""
        copied = replace(model, plan, where, rules)
        found: dict[int, tuple[Unrolled, list[str]]] = {}
        for name, value in (*copied.named_modules(remove_duplicate=False), *walk_objects(copied)):
            if isinstance(value, Unrolled):
                found.setdefault(id(value), (value, []))[1].append(name)
        chosen = [(layer, called[0]) for layer, called in found.values() if _under(called, names)]
        return copied, [(layer, attach_carry(layer, name)) for layer, name in chosen]

    trial, layers = fresh()
    problems = Problems(reads_the_future(carry.place) for layer, carry in layers if layer.recurrence.bidirectional)
    problems.check()
    with unchanged(trial), torch.no_grad():
        first = _tried(trial, layers, args, kwargs)
        second = _tried(trial, layers, args, kwargs)  # by now a state kept in an attribute is there
    kept: list[bool] = []
    example: dict[str, tuple[int, ...]] = {}
    for (layer, carry), before, after in zip(layers, first, second, strict=True):
        problems += _objections(carry, before, after)
        carry.count = len(after.chains)
        kept.append(_keeps_it_itself(before, after))
        for called, states in zip(state_names(carry, layer), after.chains):
            for name, state in zip(called, states):
                if name in example:
                    problems.add(name, "is the name of two states", "rename the layer")
                example[name] = tuple(state.shape)
    if not example and not problems:
        problems.append(no_state(type(model).__name__))
    problems.check()

    def make() -> Streaming:
        # The trial may hold states of its runs in attributes; its counts go to copies that never ran.
        copied, fresh_layers = fresh()
        for (_, carry), (_, tried) in zip(fresh_layers, layers, strict=True):
            carry.count = tried.count
        # Where the model keeps the state in an attribute, the first call of all begins without one.
        watched = [layer for (layer, _), in_attribute in zip(fresh_layers, kept, strict=True) if not in_attribute]
        return Streaming(copied, watched, example)

    return make


def chosen_names(model: nn.Module, where: Where, rules: Rules | None) -> list[str]:
    """Return the names of the layers that `where` picks, of those that are unrolled already too."""
    names = [name for found in find(model, where, rules) for name in found.names]
    for name, value in (*model.named_modules(remove_duplicate=False), *walk_objects(model)):
        if isinstance(value, Unrolled) and chooses(where, [name], value):
            names.append(name)
    return names


def _under(called: list[str], names: list[str]) -> bool:
    """Tell whether a layer is one of these, or part of what stands in for one."""
    return any(outer in ("", name) or name.startswith(f"{outer}.") for name in called for outer in names)


def _tried(
    model: nn.Module, layers: list[tuple[Unrolled, Carry]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Carry]:
    """Run a model once, and return what the calls of each layer were."""
    for _, carry in layers:
        carry.clear()
        carry.running = True
    model(*args, **kwargs)
    seen = []
    for _, carry in layers:
        # Shallow: `clear` makes new lists, and leaves these to the copy.
        seen.append(copy.copy(carry))
    return seen


def _objections(carry: Carry, first: Carry, second: Carry) -> Iterator[Problem]:
    """Yield the problems of a layer that cannot be streamed, by what two runs on the same input were like."""
    if second.packed:
        yield packed_problem(carry.place)
    if second.chains and second.foreign:
        yield Problem(carry.place, *MIXED_STATES)
    elif len(first.chains) != len(second.chains) and not _keeps_it_itself(first, second):
        finding = f"is called without a state {len(first.chains)} times in one run and {len(second.chains)} in the next"
        yield Problem(carry.place, finding, "let the model call it the same number of times in every run")


def _keeps_it_itself(first: Carry, second: Carry) -> bool:
    """Tell whether the model kept the state of the first run, in an attribute, and passed it in the second."""
    return bool(first.chains) and not second.chains and second.foreign > 0


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore, when this ends, buffers and other tensors that a run changes, and the random numbers."""
    tensors = [t for _, t in walk_objects(model) if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
    saved = [(t, t.detach().clone()) for t in tensors if t.is_leaf and not t.is_meta]
    with seeded():
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in saved:
                    if not torch.equal(tensor, before):
                        tensor.copy_(before)
