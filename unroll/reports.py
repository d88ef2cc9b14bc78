"""Reports of a comparison: a row for each value, printed as a table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from unroll.core.errors import Problem, UnrollError


class Row(NamedTuple):
    """One tensor (or other value) that was compared. Differences are the largest over its elements."""

    place: str
    """Such as `output[1][0]` or `gradient of encoder.weight_hh_l0`"""
    finding: str
    """Empty if all is well"""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    difference: float = 0.0
    """between original and rewritten"""
    limit: float = 0.0
    """for `difference`, or for `error` where there is a float64 result"""
    original_error: float | None = None
    """of the original, against the float64 result"""
    error: float | None = None
    """of the rewritten, against the float64 result"""


@dataclass(frozen=True)
class Report:
    """The result of `compare`; printing it shows a table.

    Attributes:
        rows: one for each value that was compared.
        stateful: whether something differs, and the original gives another result when it is called again.
        kept: the attributes of the original, by path, in which it keeps tensors between calls, if it is stateful.
    """

    rows: tuple[Row, ...]
    stateful: bool = False
    kept: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not any(row.finding for row in self.rows)

    @property
    def worst(self) -> Row:
        """The row that failed, or came closest to its limit."""
        return max(self.rows, key=_badness)

    def check(self) -> Report:
        """Return the report if everything agrees.

        Raises:
            UnrollError: naming the worst place first, then every other one; of several inputs the worst place of each,
                and how many more differ there.
        """
        bad = [row for row in self.rows if row.finding]
        if bad:
            bad.sort(key=lambda row: row is not self.worst)
            fix = "the rewritten model is not the original"
            if self.stateful:
                held = f" in {', '.join(self.kept)}" if self.kept else ""
                fix = f"the original keeps state between calls{held}: make it an argument and a result"
            raise UnrollError(*(Problem(row.place, finding, fix) for row, finding in _by_input(bad)))
        return self

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [("", "shape", "dtype", "difference", "error", "original's", "")]
        for row in self.rows:
            errors = ("" if e is None else f"{e:.1e}" for e in (row.error, row.original_error))
            shape = "x".join(map(str, row.shape)) if row.dtype else ""
            lines.append((row.place, shape, row.dtype, f"{row.difference:.1e}", *errors, row.finding or "ok"))
        return "\n".join(align(lines))


def _by_input(rows: Sequence[Row]) -> Iterator[tuple[Row, str]]:
    """Yield each row with what to say of it; of those of one input among several, the worst."""
    inputs: dict[str, list[Row]] = {}
    for row in rows:
        of_input = re.match(r"input \d+: ", row.place)
        inputs.setdefault(of_input[0] if of_input else row.place, []).append(row)
    for of_one in inputs.values():
        row = max(of_one, key=_badness)
        more = f"; {len(of_one) - 1} more on this input" if len(of_one) > 1 else ""
        yield row, row.finding + more


def _badness(row: Row) -> tuple[bool, float]:
    measured = row.difference if row.error is None else row.error
    return bool(row.finding), measured / row.limit if row.limit else 0.0


def align(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lay out cells in columns.

    Example:
        >>> align([("a", "b"), ("long", "c")])
        ['a     b', 'long  c']
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
