"""The words and faults of PyTorch and Python that tests expect, by version."""

import sys

from unroll.core.torch_version import TORCH

MISSING_KEYWORD = f"missing a required {'keyword-only ' if sys.version_info >= (3, 12) else ''}argument"
"""What `inspect` says of one that a call leaves out"""

SHAPES_LSTM_STATES = TORCH >= "2.13"
"""`torch.export` knows the shapes of an LSTM's last states on a CPU: before, it takes them for `[1, 1, B, H]`"""

PROVES_NAMED_BATCH = TORCH >= "2.13"
"""`torch.export` keeps a named batch open around `torch.scan`: before, it cannot prove that 7 * B is below 28 * B"""

EXPORTS_ASSIGNED_WEIGHTS = TORCH >= "2.14"
"""Dynamo and `torch.export` take a model that assigns a tensor where a layer had a parameter"""
