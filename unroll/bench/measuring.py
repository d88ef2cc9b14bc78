"""Contenders side by side: one process for each, asked in turn for short runs."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unroll.bench.contenders import CONTENDERS, first_line, obstacle
from unroll.bench.options import DTYPES
from unroll.bench.processes import Failed, Late, Process
from unroll.bench.results import Row
from unroll.bench.subjects import Subject, Task, tensors
from unroll.core.errors import Problem, UnrollError
from unroll.core.plan import Plan

SETTLING = 3
"""The least number of calls in the first turn: CUDA graphs are recorded in them."""

BUILD = 50
"""Steps of progress for a build, so that the time left can be told: about as many turns take as long."""


@dataclass(frozen=True)
class Entry:
    """A contender in one plan. `plan` is the plan's name, empty for a contender that does not unroll."""

    contender: str
    plan: str = ""
    layout: Plan = field(default_factory=Plan)

    def __str__(self) -> str:
        return f"{self.contender} {self.plan}".strip()


@dataclass(frozen=True)
class Method:
    """The settings of a measurement.

    Attributes:
        rounds: the number of turns of each contender.
        seconds: the length of a turn.
        limit: seconds for a build, and for a turn; what takes longer is stopped and reported.
        jobs: builds at a time.
    """

    rounds: int = 10
    seconds: float = 0.1
    limit: float = 120.0
    jobs: int = 1


@dataclass(frozen=True)
class Expected:
    """The model's own results, None if two calls differ, and the coarsest of its floating types."""

    results: list[Tensor] | None
    dtype: str | None


class Runner:
    """One entry on one subject: its process, and what became of it so far."""

    def __init__(self, subject: Subject, entry: Entry, method: Method, folder: Path) -> None:
        self.subject, self.entry, self.method, self.folder = subject, entry, method, folder
        self.process: Process | None = None
        self.failure, self.late = "", False
        self.built: dict[str, Any] = {}
        self.times: list[float] = []

    def build(self, saved: Path) -> None:
        """Start the process and let it build the contender for the numbers in the file `saved`."""
        self.folder.mkdir()
        self.process = Process(self.folder, self.subject.threads, alone=self.method.jobs == 1)
        self._try(self.process.wait)
        self.built = self._ask(
            "build",
            subject=asdict(self.subject),
            contender=self.entry.contender,
            plan=asdict(self.entry.layout),
            saved=str(saved),
            folder=str(self.folder),
        )

    def turn(self, least: int) -> None:
        """Let the contender run for one turn, for at least `least` calls."""
        reply = self._ask("run", seconds=self.method.seconds, least=least)
        self.times += reply.get("times", [])

    def finish(self, expected: Expected) -> Row:
        """Return the figures, with the error against what is expected, and end the process."""
        path = self.folder / "results.pt"
        reply = self._ask("results", path=str(path))
        row = Row(self.subject, self.entry.contender, self.entry.plan)
        if not self.failure:
            error = error_of(expected.results, torch.load(path))
            if error == math.inf:
                self.failure = "gives results of other shapes or kinds, or not finite where the model's are"
            row = replace(row, **self.built | reply | _summary(self.times), error=error, dtype=expected.dtype)
        self.close()
        return Row(self.subject, row.contender, row.plan, self.failure) if self.failure else row

    def close(self) -> None:
        if self.process:
            self.process.close()

    def _ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Return the reply of the process; empty once it has failed."""
        process = self.process
        return self._try(lambda: process.ask(self.method.limit, do, **request)) or {} if process else {}

    def _try(self, call: Callable[[], Any]) -> Any:
        if self.failure:
            return None
        try:
            return call()
        except Failed as error:
            self.failure, self.late = str(error).replace(f"{self.folder}{os.sep}", ""), isinstance(error, Late)
            self.close()


def measure(
    work: Mapping[Subject, Sequence[Entry]],
    method: Method,
    *,
    skip: Callable[[Subject, Entry], str | None] = lambda subject, entry: None,
    progress: Callable[[str, int], None] = lambda what, steps: None,
) -> tuple[list[Row], list[tuple[Subject, Entry]]]:
    """Measure all entries on their subjects: first all are built, then those of each subject have their turns.

    Args:
        work: the entries to measure on each subject.
        method: the settings.
        skip: gives the reason why an entry need not be tried, or None.
        progress: called with what is being done, and the steps done since the last call: `BUILD` for each build, and
            one for each turn.

    Returns:
        A row for each entry, and those that ran past the limit.
    """
    with ExitStack() as stack:
        # The folder is entered first, so that it is removed last, when the processes that use it have ended.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unroll-bench-")))
        saved = {subject: folder / f"{number}.pt" for number, subject in enumerate(work)}
        expected = {subject: _expected(subject, path) for subject, path in saved.items()}
        pairs = [(subject, entry) for subject, entries in work.items() for entry in entries]
        runners = [Runner(*pair, method, folder / f"runner{number}") for number, pair in enumerate(pairs)]

        def build(runner: Runner) -> None:
            progress(f"{runner.entry}: build", 0)
            subject, entry = runner.subject, runner.entry
            runner.failure = obstacle(CONTENDERS[entry.contender], subject) or skip(subject, entry) or ""
            if not runner.failure:
                stack.callback(runner.close)
                runner.build(saved[subject])
            progress(f"{runner.entry}: built", BUILD)

        if method.jobs == 1:
            for runner in runners:
                build(runner)
        else:
            with ThreadPoolExecutor(method.jobs) as pool:
                list(pool.map(build, runners))
        rows = []
        # The processes of one subject take turns: what else the machine does then meets all of them alike.
        for subject in work:
            mine = [runner for runner in runners if runner.subject == subject]
            for number in range(method.rounds):
                for runner in mine:
                    runner.turn(1 if number else SETTLING)
                    progress(f"{runner.entry}: round {number + 1} of {method.rounds}", 1)
            rows += [runner.finish(expected[subject]) for runner in mine]
        return rows, [(runner.subject, runner.entry) for runner in runners if runner.late]


def _summary(times: list[float]) -> dict[str, Any]:
    spread = statistics.quantiles(times, n=10, method="inclusive")[0] if len(times) > 1 else times[0]
    return {"median": statistics.median(times), "p10": spread, "calls": len(times)}


def _expected(subject: Subject, path: Path) -> Expected:
    """Save the model's numbers to a file and return what is expected of all forms: its CPU results in float64.

    Of a model of the user's own that cannot run in float64 they are those in its own types.
    """
    task = Task.of(subject)
    task.save(str(path))
    if subject.is_layer:
        return Expected(_results(task.double()), subject.dtype)
    runs, failure = [], None
    for form in (task.double(), task):
        try:
            runs.append((_results(form), _results(form)))  # twice: a model with random numbers differs from itself
        except UnrollError:
            raise
        except Exception as error:
            failure = error
    if not runs:
        fix = "let it return a model and a tuple of arguments with which it runs on a CPU"
        raise UnrollError(Problem(subject.model, f"cannot run ({first_line(failure)})", fix)) from failure
    # The first run is in float64 if that is possible, the last in the model's own types if that is.
    first, second = runs[0]
    seen = [*task.model.parameters(), *tensors((task.args, task.kwargs)), *runs[-1][0]]
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in seen}
    coarsest = next((name for name in reversed(DTYPES) if name in names), None)
    return Expected(None if error_of(first, second) else first, coarsest)


def _results(task: Task) -> list[Tensor]:
    with torch.set_grad_enabled(task.subject.backward):
        return [result.detach().clone() for result in task.runner(task.model)()]


def error_of(expected: Sequence[Tensor] | None, found: Sequence[Tensor]) -> float | None:
    """Return the largest difference relative to the largest value of each result; of integers and booleans the share
    that differs. None if nothing is compared, infinite if the results do not correspond."""
    if expected is None:
        return None
    shapes, others = ([(t.shape, t.is_floating_point(), t.is_complex()) for t in some] for some in (expected, found))
    if shapes != others:
        return math.inf
    pairs = [pair for pair in zip(expected, found, strict=True) if pair[0].numel()]
    return max((_difference(*pair) for pair in pairs), default=None)


def _difference(exact: Tensor, found: Tensor) -> float:
    """Compare two tensors of one shape, with elements. What is not finite in `exact` must be the same in `found`."""
    if exact.is_complex():
        exact, found = torch.view_as_real(exact), torch.view_as_real(found)
    if not exact.is_floating_point():
        return float((exact != found).double().mean())
    # max |found - exact| / max |exact|, over the places where exact is finite
    exact, found = exact.double(), found.double()
    finite = exact.isfinite()
    same = exact.isclose(found, rtol=0, atol=0, equal_nan=True)
    if not (same | finite).all() or not (found.isfinite() | ~finite).all():
        return math.inf
    if not finite.any():
        return 0.0
    return float((found - exact)[finite].abs().max() / exact[finite].abs().max().clamp(min=1e-300))
