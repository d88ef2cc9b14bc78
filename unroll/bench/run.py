"""The public function: measures every form of a layer or a model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Unpack

from unroll.bench.contenders import CONTENDERS
from unroll.bench.machine import command, machine
from unroll.bench.measuring import BUILD, Entry, Method, measure
from unroll.bench.options import Form, LayerOptions
from unroll.bench.progress import Progress, shown
from unroll.bench.results import Measurements, Row
from unroll.bench.subjects import Subject, subjects
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.plan import Plan


def benchmark(
    model: str = "LSTM",
    *,
    contenders: Sequence[Form] | None = None,
    plans: Sequence[str | Plan] | None = None,
    device: str = "cpu",
    threads: int = 1,
    backward: bool = False,
    rounds: int = 10,
    seconds: float = 0.1,
    limit: float = 120.0,
    jobs: int = 1,
    save: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    **layer: Unpack[LayerOptions],
) -> Measurements:
    """Measure a layer, or a model of your own, in every form side by side, and say which to use.

    Each form runs in a process of its own, so that none disturbs the others and each has a cold start and a memory of
    its own; the processes have their turns one after the other, round by round, so that whatever else the machine
    does meets all alike. A form that cannot run has a row that says why.

    Args:
        model: `"LSTM"`, `"GRU"` or `"RNN"`, or `"package.module:name"` of a function without arguments that returns
            a model and a tuple of its arguments.
        contenders: names of forms, all by default.
        plans: how unrolled forms are laid out: plans, their names, or fields and values such as `"gates=paired"`;
            by default those that each form is known for.
        device: `"cpu"` or `"cuda"`.
        threads: of each process, on a CPU.
        backward: measure training, forward and backward, in place of inference.
        rounds: how often each form has its turn.
        seconds: how long a turn is.
        limit: seconds for a build, and for a turn; what takes longer is stopped, and reported so.
        jobs: builds at a time, also for several shapes at once; with more than one the times of building mean little.
        save: a JSON file, written anew whenever a shape is done.
        progress: called at every step with the number of steps done, of all, and what is being done. By default a
            bar with the time that is left, on a terminal where `rich` is installed.
        layer: `input_size` (64), `hidden_size` (128), `num_layers`, `bidirectional`, `bias`, `proj_size`,
            `nonlinearity`, and of its input `steps` (32), `batch` (1) and `dtype` (`"float32"`). `steps`, `batch` and
            `hidden_size` may be lists: every combination is measured.

    Returns:
        What was found; `print(found)` shows tables and advice, `found.save(path)` writes JSON.

    Raises:
        UnrollError: for unknown contenders, plans and options, for a layer that cannot be made, for a function that
            does not return a model and arguments with which it runs on the CPU, and for `backward` where there is
            nothing to differentiate.

    Example:
        >>> found = benchmark("GRU", hidden_size=8, steps=4, contenders=["eager"], rounds=1, seconds=0.01)
        >>> [(row.contender, row.failure, row.median > 0) for row in found.rows]
        [('eager', '', True)]
    """
    method = Method(rounds, seconds, limit, jobs)
    chosen = subjects(model, device=device, threads=threads, backward=backward, **layer)
    entries = _entries(contenders, plans)
    _check(method, save)
    rows: list[Row] = []
    late: dict[tuple[Subject, Entry], int] = {}  # steps with which an entry was late, by its subject without steps

    def longer(subject: Subject, entry: Entry) -> str | None:
        """Return a reason to skip an entry: the same with no more steps ran past the limit."""
        shorter = late.get((replace(subject, steps=None), entry))
        if shorter and subject.steps and shorter <= subject.steps:
            return f"took more than {limit:g} s at T={shorter}"
        return None

    found = Measurements((), machine(), command())
    together = max(1, jobs // len(entries))  # subjects, so that all jobs have something to build
    with shown(progress) as told:
        step = _Steps(told, len(chosen) * len(entries) * (BUILD + rounds))
        for start in range(0, len(chosen), together):
            work = dict.fromkeys(chosen[start : start + together], entries)
            made, slow = measure(work, method, skip=longer, progress=step)
            rows += made
            late |= {(replace(subject, steps=None), entry): subject.steps or 0 for subject, entry in slow}
            found = replace(found, rows=tuple(rows))
            if save is not None:
                found.save(save)
    return found


class _Steps:
    """A counter of steps for whoever shows them; several builds may report at once."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self.lock = Lock()

    def __call__(self, what: str, steps: int) -> None:
        with self.lock:
            self.done += steps
            self.progress(self.done, self.total, what)


def _entries(contenders: Sequence[str] | None, plans: Sequence[str | Plan] | None) -> list[Entry]:
    """Return what to measure, in the order of the table of contenders."""
    asked = list(CONTENDERS) if contenders is None else list(contenders)
    fix = f"choose among {', '.join(CONTENDERS)}"
    problems = Problems(Problem(f"contender {name!r}", "is unknown", fix) for name in asked if name not in CONTENDERS)
    if not asked:
        problems.add("contenders", "names none", fix)
    problems.check()
    if plans is not None and not any(CONTENDERS[name].unrolls for name in asked):
        finding = f"was given, but {', '.join(asked)} unroll nothing"
        raise UnrollError(Problem("plans", finding, "leave it out, or choose a contender that unrolls"))
    given = None if plans is None else list(_layouts(plans))  # for all that unroll, in place of their own plans
    return [
        entry
        for name, contender in CONTENDERS.items()
        if name in asked
        for entry in (
            [Entry(name, label, plan) for label, plan in (given or _layouts(contender.plans))]
            if contender.unrolls
            else [Entry(name)]
        )
    ]


def _layouts(plans: Sequence[str | Plan]) -> Iterator[tuple[str, Plan]]:
    """Yield plans with their names, each once."""
    seen = set()
    if not plans:
        raise UnrollError(Problem("plans", "names none", "leave it out, or give some"))
    for plan in plans:
        made = Plan.of(plan)
        if made not in seen:
            seen.add(made)
            yield str(plan), made


def _check(method: Method, save: str | os.PathLike[str] | None) -> None:
    whole = {"rounds": method.rounds, "jobs": method.jobs}
    problems = Problems(
        Problem(f"{name}={value!r}", "is no number of them", "give a whole number from 1 upwards")
        for name, value in whole.items()
        if type(value) is not int or value < 1
    )
    for name, value in {"seconds": method.seconds, "limit": method.limit}.items():
        if not isinstance(value, (int, float)) or not 0 < value < math.inf:
            problems.add(f"{name}={value!r}", "is no time", "give seconds, more than zero")
    if save is not None and not isinstance(save, (str, os.PathLike)):
        problems.add(f"save={save!r}", f"is a {type(save).__name__}", "give the path of a JSON file")
    elif save is not None and Path(save).is_dir():
        problems.add(f"save={os.fspath(save)!r}", "is a directory", "give the path of a JSON file")
    elif save is not None and not Path(save).absolute().parent.is_dir():
        problems.add(f"save={os.fspath(save)!r}", "is in a directory that does not exist", "make it first")
    problems.check()
