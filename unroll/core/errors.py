"""Why something cannot be unrolled: places, findings, and what to do."""

from __future__ import annotations

from typing import NamedTuple


class Problem(NamedTuple):
    """One reason why something cannot be unrolled or run."""

    place: str
    """Module path, node or argument"""
    finding: str
    mend: str

    def __str__(self) -> str:
        return f"{self.place}: {self.finding}; {self.mend}"


class UnrollError(RuntimeError):
    """Something that cannot be honoured, with every place where it was met.

    Attributes:
        problems: the reasons, each with `place`, `finding` and `mend`.

    Example:
        >>> str(UnrollError(Problem("encoder.rnn", "3 gates found", "give 4")))
        'encoder.rnn: 3 gates found; give 4'
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems  # all that Dynamo can follow; it tells the arguments of what is raised while it traces

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        return lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems", *lines])
