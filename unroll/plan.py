"""How the mathematics of a layer is laid out in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from unroll.recurrence import Problem, UnrollError

Gates = Literal["merged", "paired", "split"]


@dataclass(frozen=True)
class Plan:
    """The choices that change the shape of the graph and none of its results.

    Args:
        gates: how many products a step makes with the hidden state: `merged` is one for all gates,
            `paired` one for the gates under a sigmoid and one for the candidate under a tanh,
            `split` one for each gate.

    Example:
        >>> Plan(gates="paired")
        Plan(gates='paired')
    """

    gates: Gates = "merged"

    def __post_init__(self) -> None:
        if self.gates not in get_args(Gates):
            choices = ", ".join(map(repr, get_args(Gates)))
            raise UnrollError(Problem("Plan(gates=...)", f"got {self.gates!r}", f"choose one of {choices}"))
