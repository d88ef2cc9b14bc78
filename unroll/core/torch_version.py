"""The version of PyTorch that runs, by which what differs between versions is told."""

import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)
"""Compares with strings, as in `TORCH < "2.13"`"""

TELLS_ARGUMENTS = TORCH >= "2.13"
"""Dynamo tells the arguments of an exception that is raised while it traces"""
