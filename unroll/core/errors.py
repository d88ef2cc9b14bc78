"""The reasons why something cannot be unrolled: places, findings, and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One reason why something cannot be unrolled or run."""

    place: str
    """The module path, node or argument"""
    finding: str
    fix: str

    def __str__(self) -> str:
        return f"{self.place}: {self.finding}; {self.fix}"


class UnrollError(RuntimeError):
    """Something that cannot be honoured, with every place where it was met.

    Attributes:
        problems: the reasons, each with `place`, `finding` and `fix`.

    Example:
        >>> str(UnrollError(Problem("encoder.rnn", "3 gates found", "give 4")))
        'encoder.rnn: 3 gates found; give 4'
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems  # all that Dynamo can follow; it tells the arguments of what is raised while it traces
        import torch  # not before something is refused

        from unroll.core.torch_version import TELLS_ARGUMENTS

        if not TELLS_ARGUMENTS and torch.compiler.is_dynamo_compiling():  # else why it stops here
            torch._dynamo.graph_break(msg="; ".join([f"{p.place}: {p.finding}; {p.fix}" for p in problems]))

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        return lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems", *lines])


class UnrollWarning(UserWarning):
    """Something that was not done or not checked, and what to call for it.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = unroll(nn.Linear(3, 4))
        >>> [warning.category.__name__ for warning in caught]
        ['UnrollWarning']
    """


for _kind in (Problem, UnrollError, UnrollWarning):
    _kind.__module__ = "unroll"  # in tracebacks, the name by which it is caught


class Problems(list[Problem]):
    """Collects problems, so that all are told at once.

    Not in what Dynamo reads, which cannot follow it: a plain list there.

    Example:
        >>> problems = Problems()
        >>> problems.add("steps", "is 0", "give 1")
        >>> with problems:
        ...     raise UnrollError(Problem("encoder.rnn", "3 gates found", "give 4"))
        >>> problems.check()
        Traceback (most recent call last):
        unroll.UnrollError: 2 problems
        steps: is 0; give 1
        encoder.rnn: 3 gates found; give 4
    """

    def add(self, place: str, finding: str, fix: str) -> None:
        self.append(Problem(place, finding, fix))

    def __enter__(self) -> Problems:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        """Keep what an `UnrollError` says, and go on."""
        if isinstance(error, UnrollError):
            self.extend(error.problems)
        return isinstance(error, UnrollError)

    def check(self) -> None:
        """Raise an `UnrollError` with all of them, each once, if there are any."""
        if self:
            raise UnrollError(*dict.fromkeys(self))


def innermost(error: BaseException, outer: BaseException | None = None) -> BaseException:
    """Return the error that an error was raised for, first of all: what others made of it says less.

    Args:
        error: any.
        outer: another that was being handled before, and has nothing to do with it.

    Example:
        >>> try:
        ...     try:
        ...         [].pop()
        ...     except IndexError as error:
        ...         raise ValueError("pass 3 failed") from error
        ... except ValueError as error:
        ...     print(innermost(error))
        pop from empty list
    """
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error if before is None or before is outer else innermost(before, outer)


@contextmanager
def refusing(place: str, finding: str, fix: str) -> Iterator[None]:
    """Turn what others raise of something broken, while this lasts, into an `UnrollError` that tells the first cause.

    Example:
        >>> with refusing("model", "cannot be read", "write it again"):
        ...     {}["graph"]
        Traceback (most recent call last):
        unroll.UnrollError: model: cannot be read (KeyError: 'graph'); write it again
    """
    outer = sys.exception()
    try:
        yield
    except UnrollError:
        raise
    except Exception as error:
        cause = innermost(error, outer)
        first = next(iter(str(cause).splitlines()), "")
        raise UnrollError(Problem(place, f"{finding} ({type(cause).__name__}: {first})", fix)) from error
