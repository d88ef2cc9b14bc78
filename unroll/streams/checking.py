"""Checks that a streaming model gives in pieces what it gives for the whole, on the example."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll.core.errors import Problem, UnrollError, UnrollWarning
from unroll.core.patching import seeded
from unroll.streams.modules import unchanged
from unroll.streams.pieces import axes_of, cut, joined, lengthened, off
from unroll.streams.subjects import Run, Subject
from unroll.streams.watching import Events, causes

FIX = "let it see one step at a time, or give pieces with the overlap that it needs and check=False"


def check_pieces(subject: Subject, example: tuple[tuple[Any, ...], Mapping[str, Any]] | None) -> None:
    """Run the example as a whole and in two pieces, and compare.

    Warns if there is none or it cannot be cut, and if the model draws random numbers.

    Args:
        subject: the streaming model.
        example: arguments, by position and by keyword.

    Raises:
        UnrollError: naming what gives other results in pieces.
    """
    if example is None:
        _warn("there are no example inputs")
        return
    leaves, spec = pytree.tree_flatten((tuple(example[0]), dict(example[1])))
    trial = _Trial(subject, spec)
    try:
        pieces, runs = trial.cut(leaves)
    except _Uncut as reason:
        if not subject.is_one_step:
            _warn(str(reason))
        return
    if not list(_differences(*runs)):
        return
    (again,) = trial.run([pieces.whole], seed=1)
    if list(_differences(again, again, runs[0])):
        _warn("the model draws random numbers in evaluation mode too")
        return
    trial.explain(pieces, runs)


def _warn(why: str) -> None:
    """Warn that pieces were not compared with the whole."""
    fix = "compare a sequence in pieces with the whole yourself, and pass check=False"
    warnings.warn(f"streaming(model): nothing was checked: {why}; {fix}", UnrollWarning, stacklevel=5)


class _Uncut(Exception):
    """Nothing can be told by pieces, for this reason."""


class _Pieces(NamedTuple):
    """The arguments for the whole, and for each of its two pieces."""

    whole: list[Any]
    first: list[Any]
    second: list[Any]


class _Trial:
    """Runs of a model on the example and on pieces of it."""

    def __init__(self, subject: Subject, spec: Any) -> None:
        self.subject, self.spec = subject, spec

    def run(
        self,
        pieces: Sequence[list[Any]],
        *,
        seed: int = 0,
        double: bool = False,
        events: Sequence[Events | None] = (None, None),
    ) -> list[Run]:
        """Run a fresh model on one piece after the other, from zeros on."""
        model = self.subject.fresh(double=double)
        state, runs = None, []

        def apart(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().double() if double and value.is_floating_point() else value.detach().clone()

        with torch.no_grad(), unchanged(model), seeded(seed):
            for piece, kept in zip(pieces, events):
                args, kwargs = pytree.tree_unflatten([apart(leaf) for leaf in piece], self.spec)
                run = self.subject.run(model, args, kwargs, state, kept)
                state = run.state
                # the model may write into what it returned, in its next run
                runs.append(run._replace(output=pytree.tree_map(apart, run.output)))
        return runs

    def cut(self, leaves: list[Any]) -> tuple[_Pieces, list[Run]]:
        """Cut the example along time, and run the whole and both pieces.

        Raises:
            _Uncut: if it cannot be cut, or a piece of it not be run.
            UnrollError: if what is time for one layer is rows for another.
        """
        try:
            (example,) = self.run([leaves])
        except Exception as error:
            raise _Uncut(f"the example cannot be run in evaluation mode ({_first_line(error)})") from error
        steps = min(example.steps.values(), default=0)
        why = "it runs no layer on the example, in evaluation mode"
        # too short a piece may be why it cannot be run
        for times in () if not steps else (1, 4) if steps > 2 else (-(-5 // steps), -(-20 // steps)):
            try:
                pieces = self._along_time(leaves, example, steps, times)
            except _Uncut as reason:
                why = str(reason)
                continue
            try:
                return pieces, [*self.run([pieces.whole]), *self.run([pieces.first, pieces.second])]
            except Exception as error:
                why = f"a piece of the example cannot be run ({_first_line(error)})"
        raise _Uncut(why)

    def _along_time(self, leaves: list[Any], example: Run, steps: int, times: int) -> _Pieces:
        """Find the dimensions of the arguments by which layers run other numbers of steps, on as many rows as before.

        Those of which more layers do so come before others.
        """
        why, found, rows = "", {}, {}
        for axes in axes_of(leaves, steps):
            try:
                whole = lengthened(leaves, axes, times)
                pieces = _Pieces(whole, *cut(whole, axes, steps * times))
                (first,) = self.run([pieces.first])
            except Exception as error:
                why = why or f"the example cannot be cut ({_first_line(error)})"
                continue
            changed = [name for name, count in example.steps.items() if first.steps.get(name) != count]
            moved = {name: s for name, s in example.state.items() if first.state[name].shape != s.shape}
            if changed and moved:
                rows = {name: (list(s.shape), list(first.state[name].shape)) for name, s in moved.items()}
            elif len(changed) == len(example.steps):
                return pieces
            elif changed:
                found.setdefault(len(changed), pieces)
        if found:
            return found[max(found)]
        fix = "leave its layer out by where=, as it runs over something else than time"
        if rows:
            raise UnrollError(
                *(
                    Problem(name, f"has shape {before} for the example and {after} for a piece of it", fix)
                    for name, (before, after) in rows.items()
                )
            )
        raise _Uncut(why or "no dimension of the example is that of time")

    def explain(self, pieces: _Pieces, runs: Sequence[Run]) -> None:
        """Raise an error that tells what gives other results in pieces, unless they are roundings: seen in float64.

        Raises:
            UnrollError: naming the operations, or what they return.
        """
        events = Events(), Events(), Events()
        try:
            runs = self._watch(pieces, events, double=True)
            if not list(_differences(*runs)):
                return
        except Exception:  # it may hold dtypes as constants
            events = Events(), Events(), Events()
            runs = self._watch(pieces, events, double=False)
        found = causes(*events) or dict(_differences(*runs))
        raise UnrollError(*(Problem(place, finding, FIX) for place, finding in found.items()))

    def _watch(self, pieces: _Pieces, events: Sequence[Events], *, double: bool) -> list[Run]:
        whole = self.run([pieces.whole], double=double, events=events[:1])
        return [*whole, *self.run([pieces.first, pieces.second], double=double, events=events[1:])]


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _differences(whole: Run, first: Run, second: Run) -> Iterator[tuple[str, str]]:
    """Yield places and findings of all that is another in pieces."""
    yield from _different("output", whole.output, first.output, second.output)
    for name, state in whole.state.items():
        yield from _different(f"the last {name}", state, second.state[name], second.state[name])


def _different(place: str, whole: Any, first: Any, second: Any) -> Iterator[tuple[str, str]]:
    if isinstance(whole, Tensor):
        pair = joined(whole, first, second)
        if pair is None:
            shapes = f"{list(first.shape)} and {list(second.shape)} in pieces, {list(whole.shape)} for the whole"
            yield place, f"has shape {shapes}"
        elif off(whole, pair.value).any():
            yield place, "is another in pieces than for the whole, and no operation tells why"
    elif isinstance(whole, (list, tuple)) and len(whole) == len(first) == len(second):
        for k, parts in enumerate(zip(whole, first, second)):
            yield from _different(f"{place}[{k}]", *parts)
    elif isinstance(whole, (list, tuple)) and len(whole) == len(first) + len(second):  # a result of each step
        for k, (ours, theirs) in enumerate(zip(whole, [*first, *second])):
            yield from _different(f"{place}[{k}]", ours, theirs, theirs)
    elif isinstance(whole, Mapping) and whole.keys() == first.keys() == second.keys():
        for key in whole:
            yield from _different(f"{place}[{key!r}]", whole[key], first[key], second[key])
    elif hasattr(whole, "__dict__"):
        yield from _different(place, vars(whole), vars(first), vars(second))
    elif whole != second and not (isinstance(whole, (int, float)) and whole == first + second):
        yield place, f"is {first} and {second} in pieces, {whole} for the whole"
