"""The order of the steps of an unrolled layer: which run one after the other, and which at once."""

from __future__ import annotations

from typing import NamedTuple

from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence


class Step(NamedTuple):
    """A step of one layer and direction."""

    layer: int
    direction: int
    time: int
    turn: int
    """Steps of one turn do not wait for each other"""
    batched: bool
    """True if all steps of the turn are one batched product; a wavefront has other turns at both ends"""
    block: int | None
    """The turn of the loop that runs it; None for a step that is written out"""


def stacked(recurrence: Recurrence, plan: Plan) -> str:
    """Return what runs at once, `directions` or `layers`; empty if every step has a turn of its own.

    Example:
        >>> stacked(Recurrence("GRU", 3, 5, num_layers=2), Plan(layers="wavefront"))
        'layers'
    """
    if plan.block is not None or recurrence.is_cell:
        return ""
    if recurrence.bidirectional:
        return "directions" if plan.directions == "stacked" else ""
    return "layers" if plan.layers == "wavefront" and recurrence.num_layers > 1 else ""


def steps_of(recurrence: Recurrence, plan: Plan, steps: int) -> list[Step]:
    """Return all steps of a layer, pass by pass.

    Example:
        >>> [step.turn for step in steps_of(Recurrence("GRU", 3, 5, num_layers=2), Plan(layers="wavefront"), 3)]
        [0, 1, 2, 1, 2, 3]
    """
    at_once = stacked(recurrence, plan)
    # a stack of layers begins when each has a state, not the zeros that are left out, and ends with the first layer
    batched = {"": range(0), "directions": range(recurrence.passes * steps)}.get(
        at_once, range(recurrence.num_layers, steps)
    )
    size = None if recurrence.is_cell else plan.block
    found = []
    for number in range(recurrence.passes):
        layer, direction = divmod(number, len(recurrence.directions))
        backwards = recurrence.directions[direction] == "reverse"
        before = {"": number * steps, "directions": layer * steps, "layers": layer}[at_once]
        for position in range(steps):
            time = steps - 1 - position if backwards else position
            # a rest of steps follows the loop
            block = position // size if size is not None and position < steps // size * size else None
            turn = before + position
            found.append(Step(layer, direction, time, turn, turn in batched, block))
    return found
