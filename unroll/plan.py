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

    @staticmethod
    def of(plan: Plan | None) -> Plan:
        """The plan that an argument `plan=` stands for.

        Raises:
            UnrollError: if it is no plan.
        """
        if plan is None:
            return Plan()
        if not isinstance(plan, Plan):
            mend = "give a Plan, such as Plan(gates='paired')"
            raise UnrollError(Problem(f"plan={plan!r}", f"is a {type(plan).__name__}", mend))
        return plan

    def __post_init__(self) -> None:
        if self.gates not in get_args(Gates):
            choices = ", ".join(map(repr, get_args(Gates)))
            raise UnrollError(Problem("Plan(gates=...)", f"got {self.gates!r}", f"choose one of {choices}"))
