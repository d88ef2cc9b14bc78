"""The version of PyTorch that runs, by which what differs between versions is told."""

import torch
from torch.torch_version import TorchVersion

TORCH = TorchVersion(torch.__version__)
"""Compares with strings, as in `TORCH < "2.13"`; not in what Dynamo reads, which cannot follow that"""

TELLS_ARGUMENTS = TORCH >= "2.13"
"""Dynamo tells the arguments of an exception that is raised while it traces"""

TELLS_TRACING_BY_THREAD = TORCH >= "2.14"
"""`torch.fx` says that it traces in the thread alone that does"""

LOOP_WANTS_TRAINED_STATE = TORCH < "2.13"
"""`torch.scan` passes gradients from step to step only if the state that it begins with asks for them itself"""

LOOP_TRAINS_COMPILED = TORCH >= "2.15"
"""`torch.compile` gets gradients through `torch.scan` right"""

PACKED_LSTM_IS_CAST = TORCH >= "2.13"
"""On a CPU under autocast an LSTM runs in the lower precision also on packed sequences, if they are of one length"""
