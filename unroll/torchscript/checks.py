"""Functions compiled by TorchScript that refuse what torch's operators refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unroll.core.patching import without_warnings


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore torch's notice that TorchScript is deprecated while this lasts: whoever has a ScriptModule knows.

    It is a `DeprecationWarning` before PyTorch 2.14, and a `FutureWarning` from then on.
    """
    with without_warnings("`torch.jit"):
        yield


@functools.cache
def compiled(function: Callable) -> Any:
    """Compile a function below with TorchScript."""
    with quiet():
        return torch.jit.script(function)


def check_layer(input: Tensor, features: int, batch_first: bool, place: str) -> tuple[int, int]:
    """Return the number of time steps and the batch size."""
    if input.dim() != 3 or input.size(2) != features:
        raise RuntimeError(f"{place}: the input has shape {input.shape}; it must be 3-D with {features} features")
    length, batch = input.size(0), input.size(1)
    if batch_first:
        length, batch = batch, length
    if length == 0:
        raise RuntimeError(f"{place}: the input has no time steps; give a sequence of at least one")
    return length, batch


def check_length(length: int, steps: int, place: str) -> None:
    if length != steps:
        raise RuntimeError(f"{place}: the input has {length} time steps, unrolled were {steps}; unroll again")


def check_packed(input: Tensor, batch_sizes: Tensor, features: int, place: str) -> tuple[int, int, list[int]]:
    """Return the number of time steps, of sequences, and of rows in each step."""
    if input.dim() != 2 or input.size(1) != features:
        raise RuntimeError(f"{place}: packed data has shape {input.shape}; it must be 2-D with {features} features")
    rows: list[int] = batch_sizes.tolist()
    return len(rows), rows[0], rows


def check_cell(input: Tensor, features: int, place: str) -> tuple[int, int]:
    """Return one step, and the batch size."""
    if input.dim() != 2 or input.size(1) != features:
        raise RuntimeError(f"{place}: the input has shape {input.shape}; it must be 2-D with {features} features")
    return 1, input.size(0)


def check_state(state: Tensor, shape: list[int], place: str) -> None:
    if state.shape != shape:
        raise RuntimeError(f"{place}: a state has shape {state.shape}; it must be {shape}")
