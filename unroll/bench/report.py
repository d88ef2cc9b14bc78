"""What figures mean: tables and advice, from rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unroll.bench.contenders import CONTENDERS
from unroll.bench.results import Measurements, Row, by_subject, fused, ratio

WRONG = {"float64": 1e-9, "float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
"""From this error on, relative to the largest value, a result counts as wrong and its contender is not advised."""

NEAR = 1.05
"""Medians no further apart than this count as equal."""

COLUMNS = ("form", "first call", "median", "p10", "x fused", "seq/s", "memory", "nodes", "size", "error")


def is_wrong(row: Row) -> bool:
    """Whether the results of a contender are too far from the float64 result to be of use."""
    limit = WRONG[row.dtype or row.subject.dtype or "float32"]
    return row.error is not None and not row.error <= limit


def advice(rows: Sequence[Row]) -> str:
    """Which form to use, from the rows of one subject.

    The fastest that gives right results; among those within `NEAR` of it the fused layer, then what keeps the layer,
    then what is built soonest. Where that keeps the recurrent layer, the best form without it is named too.
    """
    ran = [row for row in rows if row.median]
    usable = [row for row in ran if not is_wrong(row)]
    if not usable:
        why = "no form that ran gives right results" if ran else "nothing ran"
        return f"{_for(rows)}: {why}, so there is nothing to advise."
    best, base = _best(usable), fused(usable)
    named = [best]
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
    explicit = [row for row in usable if not CONTENDERS[row.contender].keeps]
    if explicit and all(CONTENDERS[row.contender].keeps for row in named):
        second = _best(explicit)
        text += f"; where recurrent operators cannot go, {second.name} takes {_times(second, best)} as long"
    return f"{_for(rows)}: {text}."


def _for(rows: Sequence[Row]) -> str:
    return f"For {rows[0].subject} on this machine" if rows else "For nothing"


def _best(rows: Sequence[Row]) -> Row:
    fastest = min(row.median or 0.0 for row in rows)
    near = [row for row in rows if (row.median or 0.0) <= NEAR * fastest]
    base = fused(rows)
    return min(near, key=lambda row: (row is not base, not CONTENDERS[row.contender].keeps, row.first_call, row.median))


def _times(row: Row, other: Row) -> str:
    return f"{(row.median or 0.0) / (other.median or 1.0):.2f} times"


def _seconds(value: float | None) -> str:
    """Such as `0.27 ms` or `1.3 s`."""
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
    """A line of the table, under `COLUMNS`, for a contender that ran."""
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
    """The fastest first, those that failed last."""
    return sorted(rows, key=lambda row: (bool(row.failure), row.median or 0.0))


def as_text(found: Measurements) -> str:
    """Tables of plain text."""
    parts = []
    for subject, rows in by_subject(found.rows).items():
        lines = [list(COLUMNS), *(cells(row, rows) for row in in_order(rows) if not row.failure)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        failed = [f"{row.name}: {row.failure}" for row in rows if row.failure]
        parts.append("\n".join([str(subject), *table, *failed, advice(rows)]))
    return "\n\n".join(parts)


def as_tables(found: Measurements) -> list[Any]:
    """What rich prints: for each subject a table, lines in which failed contenders say why, and the advice."""
    from rich.markup import escape
    from rich.table import Table

    printed: list[Any] = []
    for subject, rows in by_subject(found.rows).items():
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=escape(str(subject)), title_justify="left")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
        for row in in_order(rows):
            if not row.failure:
                table.add_row(*map(escape, cells(row, rows)))
        failed = [f"{escape(row.name)}: [dim]{escape(row.failure)}[/dim]" for row in rows if row.failure]
        printed += [table, *failed, f"[bold]{escape(advice(rows))}[/bold]", ""]
    return printed
