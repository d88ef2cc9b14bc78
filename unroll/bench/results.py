"""What a benchmark found: rows of figures, with the machine that they come from, in files and out of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unroll.bench.contenders import FUSED
from unroll.bench.subjects import Subject
from unroll.core.recurrence import Problem, UnrollError


@dataclass(frozen=True)
class Row:
    """One contender on one subject. Either `failure` says why there are no figures, or they are there.

    Attributes:
        subject: what was measured.
        contender: its name in the table of contenders.
        plan: the plan's name; empty for forms that do not unroll.
        failure: why it could not run.
        first_call: seconds to build it and to call it once.
        median: seconds of a call.
        p10: seconds that one call in ten stays below.
        calls: how many were timed.
        memory: the largest memory of its process in bytes, Python and torch included; on a GPU what torch allocated.
        nodes: operations of the compiled graphs, or nodes of the file.
        size: bytes of the files that it needs to run.
        error: the largest difference from the float64 result of the model itself, relative to the largest value of
            each result, and of integers and booleans the share that differs; None if two calls of the model differ,
            or nothing was compared.
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
        rows: what was found.
        machine: where.
        command: by which command, if it was one.
    """

    rows: tuple[Row, ...]
    machine: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""

    @property
    def advice(self) -> list[str]:
        """A sentence for each subject: which form to use."""
        from unroll.bench.report import advice

        return [advice(rows) for rows in by_subject(self.rows).values()]

    def __str__(self) -> str:
        from unroll.bench.report import as_text

        return as_text(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        rows = [asdict(row) | {"throughput": row.throughput} for row in self.rows]
        return {"command": self.command, "machine": dict(self.machine), "rows": rows, "advice": self.advice}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a JSON file.

        Raises:
            UnrollError: if it cannot be written.
        """
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
    """The rows of each subject, in the order in which they were measured."""
    groups: dict[Subject, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.subject, []).append(row)
    return groups


def fused(rows: Sequence[Row]) -> Row | None:
    """Among rows of one subject, that of the model as PyTorch runs it."""
    return next((row for row in rows if row.contender == FUSED and row.median), None)


def ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as long as the fused layer a contender takes."""
    base = fused(rows)
    return row.median / base.median if base and base.median and row.median else None
