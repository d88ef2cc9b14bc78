"""Rows of a sequence, `[T * B, features]`, in pieces and together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from unroll.core.weights import Tensorlike

Divide = Callable[[Tensorlike, int], Sequence[Tensorlike]]
"""A function `divide(rows, count)` that returns as many equal pieces"""


def split_rows(rows: Tensorlike, count: int, sizes: Sequence[int] | None = None) -> Sequence[Tensorlike]:
    """Split rows into as many equal pieces, or into pieces of these sizes."""
    if sizes is not None:
        return torch.split(rows, list(sizes))
    if count > 1 and isinstance(rows, torch.Tensor):  # sizes given, torch.export keeps a symbolic batch; chunk fixes it
        return torch.split(rows, [rows.shape[0] // count] * count)
    return torch.chunk(rows, count) if count > 1 else (rows,)


STEPS_PER_COPY = 8
"""The steps whose rows `copy_apart` copies together: so many kernels, and so many times fewer copies"""


def copy_apart(rows: Tensorlike, count: int) -> Sequence[Tensorlike]:
    """Split rows into as many equal pieces, those of some steps together in memory of their own.

    Inductor's code has a piece's place as a constant: a kernel of its own is compiled for each step that reads one.
    Copies of some steps, which Inductor leaves alone, begin anew at place 0.
    """
    if has_torch_function_unary(rows):
        return handle_torch_function(copy_apart, (rows,), rows, count)
    if count <= STEPS_PER_COPY:
        return split_rows(rows, count)
    whole = torch.reshape(rows, (count, -1, *rows.shape[1:]))  # [T, B, n], so that B may stay open
    copies: Any = torch.split_copy(whole, STEPS_PER_COPY)
    return [piece for copy in copies for piece in torch.unbind(copy)]


def pad_pieces(rows: Any, sizes: Sequence[int]) -> tuple[Any, Any]:
    """Pad packed rows, `[sum(sizes), n]`, with zeros to `[T, B, n]`; and tell which have a step, `[T, B, 1]`."""
    steps, batch = len(sizes), sizes[0]
    have = torch.arange(batch, device=rows.device) < torch.tensor(sizes, device=rows.device)[:, None]
    index = torch.cat([torch.arange(n, device=rows.device) + t * batch for t, n in enumerate(sizes)])
    padded = rows.new_zeros(steps * batch, rows.shape[-1]).index_copy(0, index, rows)
    return torch.reshape(padded, (steps, batch, -1)), torch.unsqueeze(have, -1)


def join_rows(pieces: Sequence[Tensorlike]) -> Tensorlike:
    """Put rows one after the other."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
