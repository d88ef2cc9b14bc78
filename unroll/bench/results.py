"""Findings of a benchmark: rows of figures, with the machine that they come from; tables, advice and files of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from unroll.bench.contenders import CONTENDERS, FUSED
from unroll.bench.subjects import Subject
from unroll.comparison import ACROSS_RUNTIMES
from unroll.core.errors import Problem, UnrollError
from unroll.reports import align

WRONG = {str(dtype).removeprefix("torch."): limit for dtype, limit in ACROSS_RUNTIMES.items()}
"""From this error on, relative to the largest value, a result counts as wrong and its contender is not advised."""

NEAR = 1.05
"""Medians no further apart than this count as equal."""

COLUMNS = ("form", "first call", "median", "p10", "x fused", "seq/s", "memory", "nodes", "size", "error")


def is_wrong(row: Row) -> bool:
    """Tell whether the results of a contender are too far from the float64 result to be of use."""
    limit = WRONG[row.dtype or row.subject.dtype or "float32"]
    return row.error is not None and not row.error <= limit  # NaN is wrong too


def advice(rows: Sequence[Row]) -> str:
    """Advise which form to use, from the rows of one subject.

    It is the fastest that gives right results; among those within `NEAR` of it the fused layer, then what keeps the
    layer, then what is built soonest. Where that keeps the recurrent layer, the best form without it is named too.
    """
    ran = [row for row in rows if row.median]
    usable = [row for row in ran if not is_wrong(row)]
    if not usable:
        why = "no form that ran gives right results" if ran else "nothing ran"
        return f"{_for(rows)}: {why}, so there is nothing to advise."
    best, base = _best(usable), fused(usable)
    named = [best]  # the forms that the text names
    if best is base:
        text = f"use the fused layer as it is, {_seconds(best.median)} a call"
        if others := [row for row in usable if row is not best]:
            named.append(_best(others))
            text += f"; the nearest, {named[-1].name}, takes {_times(named[-1], best)} as long"
    else:
        text = f"use {best.name}, {_seconds(best.median)} a call"
        if base is not None:
            text += f", {_times(base, best)} as fast as the fused layer"
        text += f", after {_seconds(best.first_call)} to build it"
    # The best form without the recurrent layer is named too, unless the text has such a form.
    explicit = [row for row in usable if not CONTENDERS[row.contender].keeps]
    if explicit and all(CONTENDERS[row.contender].keeps for row in named):
        second = _best(explicit)
        text += f"; where recurrent operators cannot go, {second.name} takes {_times(second, best)} as long"
    return f"{_for(rows)}: {text}."


def _for(rows: Sequence[Row]) -> str:
    return f"For {rows[0].subject} on this machine" if rows else "For nothing"


def _best(rows: Sequence[Row]) -> Row:
    fastest = min(row.median or 0.0 for row in rows)
    # Among those near the fastest: the fused layer, then what keeps the layer, then what is built soonest.
    near = [row for row in rows if (row.median or 0.0) <= NEAR * fastest]
    base = fused(rows)
    return min(near, key=lambda row: (row is not base, not CONTENDERS[row.contender].keeps, row.first_call, row.median))


def _times(row: Row, other: Row) -> str:
    return f"{(row.median or 0.0) / (other.median or 1.0):.2f} times"


def _seconds(value: float | None) -> str:
    """Write seconds such as `0.27 ms` or `1.3 s`."""
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.2g} µs"


def _bytes(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:,.0f} MB" if value >= 1e7 else f"{value / 1e3:,.0f} kB"


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """Return a line of the table, under `COLUMNS`, for a contender that ran."""
    times = ratio(row, rows)
    return [
        row.name,
        *map(_seconds, (row.first_call, row.median, row.p10)),
        "" if times is None else f"{times:.2f}",
        "" if row.throughput is None else f"{row.throughput:,.0f}",
        _bytes(row.memory),
        "" if row.nodes is None else f"{row.nodes:,}",
        _bytes(row.size),
        "" if row.error is None else f"{row.error:.1e}" + " wrong" * is_wrong(row),
    ]


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Sort rows: the fastest first, those that failed last."""
    return sorted(rows, key=lambda row: (bool(row.failure), row.median or 0.0))


def as_text(found: Measurements) -> str:
    """Write measurements as tables of plain text."""
    parts = []
    for subject, rows in by_subject(found.rows).items():
        lines = [list(COLUMNS), *(cells(row, rows) for row in in_order(rows) if not row.failure)]
        table = align(lines)
        failed = [f"{row.name}: {row.failure}" for row in rows if row.failure]
        parts.append("\n".join([str(subject), *table, *failed, advice(rows)]))
    return "\n\n".join(parts)


@dataclass(frozen=True)
class Row:
    """One contender on one subject. Either `failure` says why there are no figures, or they are there.

    Attributes:
        subject: the layer or model that was measured.
        contender: its name in the table of contenders.
        plan: the plan's name; empty for forms that do not unroll.
        failure: the reason why it could not run.
        first_call: seconds to build it and to call it once.
        median: seconds of a call.
        p10: seconds that one call in ten stays below.
        calls: the number of those timed.
        memory: the largest memory of its process in bytes, Python and torch included; on a GPU what torch allocated.
        nodes: operations of the compiled graphs, or nodes of the file.
        size: bytes of the files that it needs to run.
        error: the largest difference from the float64 result of the model itself, relative to the largest value of
            each result, and of integers and booleans the share that differs; None if two calls of the model differ,
            or nothing was compared.
        launches: kernels that a call launches, as the profiler sees them on a GPU; None elsewhere.
        busy: seconds that these take.
        kernels: those that Inductor wrote and that differ.
        dtype: the coarsest floating type among the model's parameters, arguments and results, which says how large
            the error may be; None if there is none.
    """

    subject: Subject
    contender: str
    plan: str = ""
    failure: str = ""
    first_call: float | None = None
    median: float | None = None
    p10: float | None = None
    calls: int = 0
    memory: int | None = None
    nodes: int | None = None
    size: int | None = None
    error: float | None = None
    launches: int | None = None
    busy: float | None = None
    kernels: int | None = None
    dtype: str | None = None

    @property
    def name(self) -> str:
        """The contender, with its plan if that is not the default."""
        return self.contender if self.plan in ("", "default") else f"{self.contender} {self.plan}"

    @property
    def throughput(self) -> float | None:
        """Sequences a second; for a model of the user's own calls a second."""
        return (self.subject.batch or 1) / self.median if self.median else None


@dataclass(frozen=True)
class Measurements:
    """All rows of one run; printing it shows a table for each subject, and what follows from it.

    Attributes:
        rows: the figures that were found.
        machine: the machine they were found on.
        command: the command that found them, if it was one.
    """

    rows: tuple[Row, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    @staticmethod
    def joined(several: Iterable[Measurements]) -> Measurements:
        """Put the rows of several runs together, with the machine and the command of the first."""
        first, *rest = several
        return replace(first, rows=tuple(row for found in (first, *rest) for row in found.rows))

    @property
    def advice(self) -> list[str]:
        """A sentence for each subject that says which form to use."""
        return [advice(rows) for rows in by_subject(self.rows).values()]

    def __str__(self) -> str:
        return as_text(self)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        rows = [asdict(row) | {"throughput": row.throughput} for row in self.rows]
        return {"command": self.command, "machine": dict(self.machine), "rows": rows, "advice": self.advice}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file.

        Raises:
            UnrollError: if it cannot be written.
        """
        # Written apart and moved into place: a reader never finds half a file.
        draft = Path(f"{os.fspath(path)}.part")
        try:
            draft.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
            draft.replace(path)
        except OSError as error:
            finding = f"cannot be written ({error.strerror or error})"
            raise UnrollError(Problem(os.fspath(path), finding, "choose a place where you may write")) from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Measurements:
        """Read what `save` wrote.

        Raises:
            UnrollError: if there is no such file, or it holds something else.
        """
        try:
            found = json.loads(Path(path).read_text())
            rows = [
                Row(Subject(**row["subject"]), **{k: v for k, v in row.items() if k not in ("subject", "throughput")})
                for row in found["rows"]
            ]
            return Measurements(tuple(rows), found["machine"], found["command"])
        except OSError as error:
            finding = f"cannot be read ({error.strerror or error})"
            raise UnrollError(Problem(os.fspath(path), finding, "give a file of unroll bench --save")) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            finding = f"is not a file of measurements ({type(error).__name__}: {error})"
            raise UnrollError(Problem(os.fspath(path), finding, "give a file of unroll bench --save")) from error


def by_subject(rows: Iterable[Row]) -> dict[Subject, list[Row]]:
    """Group rows by subject, in the order in which they were measured."""
    groups: dict[Subject, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.subject, []).append(row)
    return groups


def fused(rows: Sequence[Row]) -> Row | None:
    """Return, among rows of one subject, that of the model as PyTorch runs it; None if it did not run."""
    return next((row for row in rows if row.contender == FUSED and row.median), None)


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """Return how many times as long as the fused layer a contender takes; None if either did not run."""
    base = fused(rows)
    return row.median / base.median if base and base.median and row.median else None
