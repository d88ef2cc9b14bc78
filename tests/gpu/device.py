"""Where the tests in this folder run: on a GPU, or, to try the tests themselves, on `UNROLL_TEST_DEVICE=cpu`."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from tests.cases import CHOSEN, Case, replace
from tests.torchscript.test_scripts import model_of as scriptable

DEVICE = torch.device(os.environ.get("UNROLL_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
REASON = "needs a CUDA device (UNROLL_TEST_DEVICE=cpu tries the test without)"
REASON = REASON if ON_GPU and not torch.cuda.is_available() else ""
"""Why nothing here can run; empty if it can"""

F64 = torch.float64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

BATCH = 64
"""So many values that the largest error of one is no accident"""

LAYERS = [case for case in CHOSEN if not case.is_cell]


def there(value: Any) -> Any:
    """Arguments on the device; lengths, which torch wants on the CPU, stay."""

    def moved(leaf: Any) -> Any:
        is_number = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(DEVICE) if is_number or isinstance(leaf, PackedSequence) else leaf

    return pytree.tree_map(moved, value, is_leaf=lambda leaf: isinstance(leaf, PackedSequence))


def wide(case: Case, steps: int) -> Case:
    """The case with a batch of `BATCH`, and so many steps where it has several."""
    return replace(case, batch=BATCH, steps=1 if case.steps == 1 else steps)


def model_of(case: Case, dtype: torch.dtype) -> nn.Module:
    """The case's layer on the device, in a module that every frontend takes."""
    return scriptable(case, dtype).to(DEVICE)


def tensors_of(case: Case, dtype: torch.dtype, *, seed: int = 1) -> tuple[Tensor, ...]:
    """Its arguments."""
    return there(case.tensors(dtype, seed=seed))
