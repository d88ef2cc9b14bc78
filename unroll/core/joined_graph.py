"""A pass with joined gradients as one call of a graph that Dynamo makes; imported only then, as it loads Dynamo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unroll.core.joined import Joined


@torch.compiler.allow_in_graph
def apply(form: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Run a pass, as `Joined.apply` does: AOTAutograd looks into it, Dynamo does not."""
    return Joined.apply(form, *tensors)
