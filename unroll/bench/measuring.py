"""Contenders side by side: one process for each, asked in turn for short runs."""

from __future__ import annotations

import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unroll.bench.contenders import CONTENDERS, obstacle
from unroll.bench.results import Row
from unroll.bench.subjects import Subject, Task
from unroll.plan import Plan

SETTLING = 3
"""Calls of the first run at least: CUDA graphs are recorded in them."""


@dataclass(frozen=True)
class Entry:
    """A contender in one plan. `plan` is the plan's name, empty for a contender that does not unroll."""

    contender: str
    plan: str = ""
    layout: Plan = field(default_factory=Plan)


@dataclass(frozen=True)
class Method:
    """How to measure.

    Attributes:
        rounds: how often each contender has its turn.
        seconds: the length of a turn.
        limit: seconds for a build, and for a turn; what takes longer is stopped and reported.
        jobs: builds at a time.
    """

    rounds: int = 10
    seconds: float = 0.1
    limit: float = 120.0
    jobs: int = 1


class Failed(Exception):
    """A contender that cannot go on, and why."""


class Late(Failed):
    """It took longer than the limit."""


class Process:
    """A worker in a process of its own, with every process that it starts."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.closed, self.errors = False, folder / "errors.txt"
        variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        paths = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "unroll.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | variables | paths,
                start_new_session=True,
            )

    def ask(self, limit: float, do: str, **request: Any) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            Failed: with the reason; `Late` if there is none within `limit` seconds.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin and stdout
        try:
            stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")
            stdin.flush()
        except BrokenPipeError:
            raise Failed(self._ended()) from None
        if not select.select([stdout], [], [], limit)[0]:
            self.close()
            raise Late(f"took more than {limit:g} s to {do}")
        line = stdout.readline()
        if not line:
            raise Failed(self._ended())
        reply = json.loads(line)
        if "failed" in reply:
            raise Failed(reply["failed"])
        return reply

    def close(self) -> None:
        """End the process and all that it started."""
        if self.closed:
            return
        self.closed = True
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with suppress(BrokenPipeError):
                    stream.close()

    def _ended(self) -> str:
        code = self.process.wait()
        said = self.errors.read_text().strip().splitlines()
        return f"ended with exit code {code}" + (f": {said[-1]}" if said else "")


def measure(
    subject: Subject,
    entries: Sequence[Entry],
    method: Method,
    *,
    skip: Callable[[Entry], str | None] = lambda entry: None,
    progress: Callable[[str], None] = lambda what: None,
) -> tuple[list[Row], set[Entry]]:
    """All entries on one subject.

    Args:
        subject: what to measure.
        entries: what to measure it in.
        method: how.
        skip: why an entry need not be tried, if there is a reason.
        progress: called at every step, `method.rounds + 1` times for each entry, with what comes next.

    Returns:
        A row for each entry, and those that ran past the limit.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unroll-bench-")))
        saved = folder / "task.pt"
        expected = _expected(subject, saved)
        started: dict[Entry, Process] = {}
        failures: dict[Entry, str] = {}
        late: set[Entry] = set()
        replies: dict[Entry, dict[str, Any]] = {}
        times: dict[Entry, list[float]] = {}

        def attempt(entry: Entry, do: Callable[[], Any]) -> Any:
            if entry in failures:
                return None
            try:
                return do()
            except Failed as error:
                failures[entry] = str(error)
                if isinstance(error, Late):
                    late.add(entry)
                if entry in started:
                    started[entry].close()
                return None

        def build(number: int) -> None:
            entry = entries[number]
            progress(f"{entry.contender} {entry.plan}: build")
            if reason := obstacle(CONTENDERS[entry.contender], subject) or skip(entry):
                failures[entry] = reason
                return
            place = folder / str(number)
            place.mkdir()
            started[entry] = process = Process(place, subject.threads)
            stack.callback(process.close)
            request = {
                "subject": asdict(subject),
                "contender": entry.contender,
                "plan": asdict(entry.layout),
                "saved": str(saved),
                "folder": str(place),
            }
            replies[entry] = attempt(entry, lambda: process.ask(method.limit, "build", **request)) or {}

        if method.jobs == 1:
            for number in range(len(entries)):
                build(number)
        else:
            with ThreadPoolExecutor(method.jobs) as pool:
                list(pool.map(build, range(len(entries))))
        for round in range(method.rounds):
            for entry in entries:
                progress(f"{entry.contender} {entry.plan}: round {round + 1} of {method.rounds}")
                request = {"seconds": method.seconds, "least": 1 if round else SETTLING}
                reply = attempt(entry, lambda: started[entry].ask(method.limit, "run", **request))
                times.setdefault(entry, []).extend(reply["times"] if reply else [])
        rows = []
        for number, entry in enumerate(entries):
            path = folder / str(number) / "results.pt"
            reply = attempt(entry, lambda: started[entry].ask(method.limit, "results", path=str(path)))
            row = Row(subject, entry.contender, entry.plan, failures.get(entry, ""))
            if reply:
                error = _error(expected, torch.load(path))
                if error == math.inf:
                    row = replace(row, failure="gives results of other shapes, or such as are no numbers")
                else:
                    row = replace(row, **replies[entry] | reply | _summary(times[entry]), error=error)
            rows.append(row)
        return rows, late


def _summary(times: list[float]) -> dict[str, Any]:
    spread = statistics.quantiles(times, n=10, method="inclusive")[0] if len(times) > 1 else times[0]
    return {"median": statistics.median(times), "p10": spread, "calls": len(times)}


def _expected(subject: Subject, path: Path) -> list[Tensor] | None:
    """The float64 results of the model, whose numbers go to a file; None if two runs of it differ."""
    task = Task.of(subject)
    task.save(str(path))
    with torch.set_grad_enabled(subject.backward):
        exact = task.double()
        run = exact.runner(exact.model)
        first, second = [[t.detach().clone() for t in run()] for _ in range(2)]
    return first if all(map(torch.equal, first, second)) else None


def _error(expected: list[Tensor] | None, found: list[Tensor]) -> float | None:
    """The largest difference relative to the largest value of each result; infinite if they do not correspond."""
    if expected is None:
        return None
    if [t.shape for t in expected] != [t.shape for t in found]:
        return math.inf
    errors = [
        (found.double() - exact).abs().nan_to_num(math.inf).max() / exact.abs().max().clamp(min=1e-300)
        for exact, found in zip(expected, found, strict=True)
        if exact.numel() and exact.is_floating_point()
    ]
    return max((float(error) for error in errors), default=0.0)
