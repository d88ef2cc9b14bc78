"""The versions of this package and of PyTorch."""

import torch
from torch.torch_version import TorchVersion

VERSION = "0.1.0"

TORCH = TorchVersion(torch.__version__)
"""Compares with strings, as in `TORCH < "2.13"`"""
