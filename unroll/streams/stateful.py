"""Recurrent states as named inputs and outputs of a whole model, so that a sequence can be fed piece by piece."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from unroll.core.options import Rules, Where, chooses, read_where
from unroll.core.patching import seeded
from unroll.core.plan import Plan
from unroll.core.recurrence import Problem, UnrollError
from unroll.modules import replace as trees
from unroll.modules.layers import Unrolled
from unroll.streams import graphs as streamed_graphs
from unroll.streams.carry import Carry, carried, packed_problem
from unroll.streams.states import (
    ARGUMENT,
    MIXED,
    State,
    call_name,
    no_state,
    reads_the_future,
    started,
    without_rows,
    zeros,
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

    def extra_repr(self) -> str:
        return ", ".join(self.example)

    def initial_state(self, batch: int | None = None) -> State:
        """Zeros, in the type and on the device of the layers' weights.

        Args:
            batch: rows of the states; where layers run on several rows for each item of a batch, of the states with
                the fewest. As in the example if it is None.
        """
        layers = {name: layer for layer in self.layers for names in state_names(_carry(layer), layer) for name in names}
        example = {name: layers[name].like.new_empty(shape) for name, shape in self.example.items()}
        unbatched = [name for name, s in example.items() if without_rows(layers[name].recurrence, s.dim())]
        return zeros(example, batch, unbatched)

    def forward(self, *args: Any, state: State | None = None, **kwargs: Any) -> tuple[Any, State]:
        carries = [_carry(layer) for layer in self.layers]
        if any(carry.running for carry in carries):
            mend = "make another by unroll.streaming for another thread, or for a call from inside of it"
            raise UnrollError(Problem("streaming", "is called while a call of it is under way", mend))
        if state is not None:
            started("state", state, self.example)
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
        """The state that the run has come to."""
        found: State = {}
        for layer, carry in zip(self.layers, carries):
            if len(carry.chains) != carry.count:
                times = f"{len(carry.chains)} times in this run, {carry.count} times with the example"
                raise UnrollError(carry.problem(f"is called without a state {times}"))
            if carry.chains and carry.foreign:
                raise UnrollError(Problem(carry.place, *MIXED))
            for names, states in zip(state_names(carry, layer), carry.chains):
                found.update(zip(names, states))
        return {name: found[name] for name in self.example}


def _carry(layer: Any) -> Carry:
    return layer.carry


def state_names(carry: Carry, layer: Unrolled) -> list[tuple[str, ...]]:
    """What the states of a layer are called, for each of its chains."""
    return [tuple(call_name(carry.name, k, s) for s in layer.recurrence.cell.states) for k in range(carry.count or 0)]


def streaming(
    model: Any,
    args: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    where: Where = None,
    rules: Rules | None = None,
    plan: Plan | str | None = None,
) -> Any:
    """Make the states of a model's recurrent layers inputs and outputs of the whole model, by name.

    `output, state = streamed(piece, state=state)` for one piece of a sequence after the other gives what the model
    gives for the whole sequence. The states are those of layers to which the model passes none: `lstm.h` and `lstm.c`
    for a layer `lstm`, `encoder.rnn.h` inside of another module, and `lstm.1.h` for the second of several calls. A
    state that the model itself passes is left alone, also one that it keeps in an attribute.

    Args:
        model: an `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        args: example inputs, a tuple or a single tensor, of any length that the model takes; a module is run on
            them twice, to see which layers are called how often. Needless for an ExportedProgram.
        kwargs: example keyword arguments of a module.
        where: which layers, as for `unroll.unroll`. Leave out those that run over something else than time, such
            as the frequencies of one step. Layers of a module that are left out stay as they are.
        rules: for a module's layers of classes of your own, as for `unroll.unroll`.
        plan: how the steps of a module's layers are laid out. Graphs and programs get their states alone; their
            steps are written out by `unroll.unroll`, afterwards.

    Returns:
        A `Streaming` module for a module. A graph or program of the same kind for those, which takes a
        dictionary `state` after all other arguments and returns a pair of output and state.

    Raises:
        UnrollError: with every layer that cannot be streamed, why, and what to do: in two directions, on packed rows,
            and called both with states of the model's own and without.

    Example:
        >>> streamed = streaming(nn.Sequential(nn.LSTM(3, 5)), torch.zeros(7, 1, 3))
        >>> {name: tuple(h.shape) for name, h in streamed.initial_state(batch=2).items()}
        {'0.h': (1, 2, 5), '0.c': (1, 2, 5)}
    """
    where = read_where(where)
    args = () if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,)
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        given = {"kwargs": kwargs, "rules": rules, "plan": plan}
        if isinstance(model, ExportedProgram):
            given["args"] = args or None
        mend = "leave it out; unroll(streaming(...), ...) writes out the steps"
        wrong = [
            Problem(f"streaming({k}=...)", "was given for a graph", mend) for k, v in given.items() if v is not None
        ]
        if wrong:
            raise UnrollError(*wrong)
        if isinstance(model, ExportedProgram):
            return streamed_graphs.stream_program(model, where)
        return streamed_graphs.stream_graph(model, args, where)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        mend = "give an nn.Module, a GraphModule or an ExportedProgram; export_onnx takes the result"
        raise UnrollError(Problem("streaming(model)", f"got {type(model).__name__}", mend))
    if ARGUMENT in (kwargs or {}):
        mend = "rename it in the model: streaming models take their states by this name"
        raise UnrollError(Problem(f"kwargs[{ARGUMENT!r}]", "is an argument of the model already", mend))
    if any(isinstance(part, Streaming) for part in model.modules()):
        raise UnrollError(
            Problem("streaming(model)", "has states for inputs already", "give the model that it was made of")
        )
    return _stream_module(model, args, dict(kwargs or {}), where, rules, None if plan is None else Plan.of(plan))


def _stream_module(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    rules: Rules | None,
    plan: Plan | None,
) -> Streaming:
    names = chosen_names(model, where, rules)

    def fresh() -> tuple[nn.Module, list[tuple[Unrolled, Carry]]]:
        """A copy, and those of its layers that may keep their state."""
        copied = trees.replace(model, plan, where, rules)
        found: dict[int, tuple[Unrolled, list[str]]] = {}
        for name, value in (*copied.named_modules(remove_duplicate=False), *trees.reach(copied)):
            if isinstance(value, Unrolled):
                found.setdefault(id(value), (value, []))[1].append(name)
        chosen = [(layer, called[0]) for layer, called in found.values() if _under(called, names)]
        return copied, [(layer, carried(layer, name)) for layer, name in chosen]

    trial, layers = fresh()
    problems = [reads_the_future(carry.place) for layer, carry in layers if layer.recurrence.bidirectional]
    if problems:
        raise UnrollError(*problems)
    with _unchanged(trial), torch.no_grad():
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
                    problems.append(Problem(name, "is the name of two states", "rename the layer"))
                example[name] = tuple(state.shape)
    if not example and not problems:
        problems.append(no_state(type(model).__name__))
    if problems:
        raise UnrollError(*problems)
    copied, fresh_layers = fresh()
    for (_, carry), (_, tried) in zip(fresh_layers, layers, strict=True):
        carry.count = tried.count
    # Where the model keeps the state in an attribute, the first call of all begins without one.
    watched = [layer for (layer, _), in_attribute in zip(fresh_layers, kept, strict=True) if not in_attribute]
    return Streaming(copied, watched, example)


def chosen_names(model: nn.Module, where: Where, rules: Rules | None) -> list[str]:
    """The names of the layers that `where` picks, of those that are unrolled already too."""
    names = [name for found in trees.find(model, where, rules) for name in found.names]
    for name, value in (*model.named_modules(remove_duplicate=False), *trees.reach(model)):
        if isinstance(value, Unrolled) and chooses(where, [name], value):
            names.append(name)
    return names


def _under(called: list[str], names: list[str]) -> bool:
    """Whether a layer is one of these, or part of what stands in for one."""
    return any(name in names or name.startswith(tuple(f"{n}." for n in names if n) or ("\0",)) for name in called)


def _tried(
    model: nn.Module, layers: list[tuple[Unrolled, Carry]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Carry]:
    """What each layer's calls were in one run."""
    for _, carry in layers:
        carry.clear()
        carry.running = True
    model(*args, **kwargs)
    seen = []
    for _, carry in layers:
        seen.append(Carry(carry.name, carry.place))
        seen[-1].__dict__.update(vars(carry))
    return seen


def _objections(carry: Carry, first: Carry, second: Carry) -> Iterator[Problem]:
    """Why a layer cannot be streamed, by what two runs on the same input were like."""
    if second.packed:
        yield packed_problem(carry.place)
    if second.chains and second.foreign:
        yield Problem(carry.place, *MIXED)
    elif len(first.chains) != len(second.chains) and not _keeps_it_itself(first, second):
        finding = f"is called without a state {len(first.chains)} times in one run and {len(second.chains)} in the next"
        yield Problem(carry.place, finding, "let the model call it the same number of times in every run")


def _keeps_it_itself(first: Carry, second: Carry) -> bool:
    """Whether the model kept the state of the first run, in an attribute, and passed it in the second."""
    return bool(first.chains) and not second.chains and second.foreign > 0


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers and other tensors that a run changes, and the random numbers, are afterwards as they were."""
    tensors = [t for _, t in trees.reach(model) if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)]
    saved = [(t, t.detach().clone()) for t in tensors if t.is_leaf and not t.is_meta]
    with seeded():
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in saved:
                    if not torch.equal(tensor, before):
                        tensor.copy_(before)


class Stream:
    """Feeds pieces to a streaming model and carries the state from each to the next, in torch or in ONNX Runtime.

    Runs without gradients; for training, call the model itself with `state=`.

    Args:
        model: what `unroll.streaming` returned, what `unroll.unroll` made of that, or the path of a file (or an
            `onnxruntime.InferenceSession` of one) that `unroll.export_onnx` wrote for it.
        batch: rows of the states, as for `initial_state`.

    Attributes:
        state: by name, a tensor each, in memory of its own. Rows of it may be set, say to zeros where another
            sequence begins. None for a file of an open batch until the first piece has told the number of rows, if
            `batch` does not.

    Raises:
        UnrollError: for what is no streaming model.

    Example:
        >>> from unroll import streaming
        >>> x = torch.randn(7, 2, 3)
        >>> stream = Stream(streaming(nn.GRU(3, 5), x), batch=2)
        >>> for piece in x.split(3):
        ...     output, last = stream(piece)
        >>> torch.equal(stream.state["h"], last)
        True
    """

    def __init__(self, model: Any, batch: int | None = None) -> None:
        self._run, self._initial = _runner(model)
        self.reset(batch)

    def initial_state(self, batch: int | None = None) -> Any:
        """Zeros for this many rows, or for as many as in the example; None for as many as a file finds."""
        return self._initial(batch)

    def reset(self, batch: int | None = None) -> None:
        """Begin anew, with zeros for this many rows, or for as many as it began with before."""
        if batch is not None or not hasattr(self, "_batch"):
            self._batch = batch
        self.state: Any = self._initial(self._batch)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output for one piece; the state goes on to the next."""
        output, self.state = self._run(*args, state=self.state, **kwargs)
        return output


def _runner(model: Any) -> tuple[Any, Any]:
    """What takes a piece and a state, and what gives the first one."""
    if isinstance(model, (str, os.PathLike)) or type(model).__name__ == "InferenceSession":
        from unroll.onnx import require

        require("onnxruntime")
        from unroll.export.states import runner

        return runner(model)
    if isinstance(model, Streaming):
        return torch.no_grad()(model), model.initial_state
    if streamed_graphs.example_state(model) is None:
        finding = f"is a {type(model).__name__} without named states"
        raise UnrollError(
            Problem("Stream(model)", finding, "give what unroll.streaming returned, or a file made of it")
        )
    run = model.module() if isinstance(model, ExportedProgram) else model
    return torch.no_grad()(run), partial(streamed_graphs.initial_state, model)
