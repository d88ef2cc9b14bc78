"""The most steps of a layer that are written out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import index
from typing import Any

from unroll.core.errors import Problem, UnrollError

STEPS = 20_000
"""The most steps of a layer that are written out, unless a `limit=` says otherwise: a slip of a size, or a file made to
do harm, would take all memory"""

_limit = ContextVar("limit", default=STEPS)


@contextmanager
def limited(limit: Any) -> Iterator[None]:
    """Let layers have up to `limit` steps written out while this lasts; `STEPS` if it is None.

    Raises:
        UnrollError: if it is no number of steps.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UnrollError(Problem(f"limit={limit!r}", "is no number of steps", "give a whole number from 1 upwards"))
    token = _limit.set(STEPS if limit is None else limit)
    try:
        yield
    finally:
        _limit.reset(token)


def limit() -> int:
    """Return the most steps of a layer that may be written out now."""
    return _limit.get()


def check_written(place: str, steps: int | None, block: int | None = None, *, most: int | None = None) -> None:
    """Refuse a layer of which too many steps would be written out. Every frontend asks before it writes.

    Args:
        place: the layer.
        steps: its steps; None for any number, in a loop.
        block: the steps of a block, where a loop goes over blocks.
        most: that may be written out; as many as `limit` says if it is None.

    Raises:
        UnrollError: if they are more.
    """
    written = block if steps is None else steps if block is None else min(block, steps)
    most = limit() if most is None else most
    if written is not None and written > most:
        written = index(written)  # Dynamo may hold it open
        finding = f"would have {written:,} steps written out, more than the limit of {most:,}"
        fix = f"run them in a loop where there is one, plan='time=16', or pass limit={written}"
        raise UnrollError(Problem(place, finding, fix))
