"""The states of a streaming model: what they are called, what they begin with, and what cannot have any."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.recurrence import Recurrence

State = dict[str, Tensor]
"""The states by name, such as `encoder.lstm.h`"""

ARGUMENT = "state"
"""The name of the dictionary of states among the arguments of a streaming model"""

NEXT = ".next"
"""The end of a state's name where the state before it has the same name without"""


def call_name(layer: str, call: int, state: str) -> str:
    """Return the name of a state, for a call of a layer that has several.

    Example:
        >>> call_name("encoder.lstm", 0, "h"), call_name("encoder.lstm", 1, "c"), call_name("", 0, "h")
        ('encoder.lstm.h', 'encoder.lstm.1.c', 'h')
    """
    return ".".join(part for part in (layer, str(call) if call else "", state) if part)


def without_rows(recurrence: Recurrence, rank: int) -> bool:
    """Tell whether a state of so many dimensions is that of an unbatched call."""
    return rank == (1 if recurrence.is_cell else 2)


def zero_states(example: Mapping[str, Tensor], batch: int | None, unbatched: Container[str] = ()) -> State:
    """Make zeros like those of the example, for another number of rows.

    Args:
        example: a tensor for each state. Its rows are its last dimension but one.
        batch: rows of the states that have the fewest; the others have as many times more as in the example. As in
            the example if it is None.
        unbatched: names of states that have no rows.
    """
    if batch is None:
        return {name: state.new_zeros(state.shape) for name, state in example.items()}
    if type(batch) is not int or batch < 0:
        raise UnrollError(Problem(f"batch={batch!r}", "is no number of rows", "give a whole number from 0 upwards"))
    rows = {name: 0 if name in unbatched or s.dim() < 2 else s.shape[-2] for name, s in example.items()}
    least = min(rows.values())
    problems = Problems()
    found: State = {}
    for name, state in example.items():
        if least == 0 or rows[name] % least:
            finding = f"has shape {list(state.shape)} in the example, which does not tell what a batch of {batch} makes"
            problems.add(name, finding, "leave out batch=, or give an example with a batch")
        else:
            found[name] = state.new_zeros(*state.shape[:-2], rows[name] // least * batch, state.shape[-1])
    problems.check()
    return found


def fixed_rows(batch: int | None, name: str, shape: Sequence[Any]) -> Problem:
    """Return the problem of a state with so many rows where sizes are fixed."""
    fix = "export with dynamic_shapes for another batch"
    return Problem(f"batch={batch}", f"{name} has the fixed shape {list(shape)}", fix)


def check_state_names(place: str, state: Any, example: Mapping[str, Any]) -> None:
    """Refuse a state with other names than these."""
    if not isinstance(state, dict):
        fix = "give a dictionary of tensors, such as initial_state(batch), or None for zeros"
        raise UnrollError(Problem(place, f"is {type(state).__name__}", fix))
    missing = [name for name in example if name not in state]
    unknown = [name for name in state if name not in example]
    # A plain list, which Dynamo can follow.
    problems = [Problem(place, f"has no {name}", "give what the last call returned") for name in missing]
    known = ", ".join(example)
    problems += [Problem(place, f"has {name}, which is no state", f"the states are: {known}") for name in unknown]
    if problems:
        raise UnrollError(*problems)


def reads_the_future(name: str) -> Problem:
    """Return the problem of a layer in two directions, which cannot be streamed."""
    finding = "is bidirectional: its reverse direction begins at the end of the sequence, which a piece does not have"
    fix = "use a layer in one direction, or leave it out by where= if it runs over something else than time"
    return Problem(name, finding, fix)


MIXED_STATES = (
    "is called without a state, and also with one of the model's own that no call of it returned as it is",
    "pass a state at every call or at none, or leave the layer out by where=",
)
"""The problem of a layer whose state is the model's in some calls alone, and what to do."""


def no_state(name: str) -> Problem:
    """Return the problem of a model that has nothing to be streamed."""
    finding = "calls no recurrent layer without a state, so that there is none to be given"
    return Problem(name, finding, "look at where=; a graph must be streamed before its layers are unrolled")


def packed_problem(name: str) -> Problem:
    """Return the problem of packed rows, which cannot be streamed."""
    finding = "runs on a PackedSequence, whose rows end at lengths of their own: a piece does not tell which go on"
    return Problem(name, finding, "give the model padded pieces, and take a row's state where it ends")
