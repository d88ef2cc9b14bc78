"""Takes gates and states from the steps of a layer while it runs, by the names that the recipe gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from unroll.core.errors import Problem, UnrollError
from unroll.core.patching import Local
from unroll.core.rows import Divide
from unroll.core.values import Target


class Step(NamedTuple):
    """A gate or state of one step, and its place in the batch."""

    value: Tensor
    """`[n, H]`: all rows, or of packed ones those that have the step"""
    batch: int
    mask: Tensor | None
    """The rows that have the step, boolean `[B, 1]`; None for all"""
    order: Tensor | None
    """The order of the batch before it was packed; None if it is the same"""

    def whole(self, value: Tensor) -> Tensor:
        """Return the value, or its gradient, as `[B, H]` in the batch's order, with zeros where there is no step."""
        if self.mask is not None:
            value = torch.where(self.mask, value, 0)
        if value.shape[0] < self.batch:
            value = functional.pad(value, (0, 0, 0, self.batch - value.shape[0]))
        return value if self.order is None else value.index_select(0, self.order)


class Sink(Protocol):
    """The one that gates and states are taken for."""

    def name_of(self, layer: Any) -> str | None:
        """Return the name of a layer; None if it is not asked for."""
        ...

    def wants(self, name: str) -> bool: ...
    def add(self, name: str, steps: Sequence[Step]) -> None: ...


SINKS: Local[tuple[Sink, ...]] = Local("sinks")
"""Those of a thread that records"""


def recorder(layer: Any, divide: Divide, *, written: bool) -> Recorder | None:
    """Return the target that records a run of a layer; None if nobody asks, or a graph is made of it."""
    if written or SINKS.value is None:
        return None
    sinks = {sink: name for sink in SINKS.value if (name := sink.name_of(layer)) is not None}
    return Recorder(sinks, layer.place, divide) if sinks else None


class Recorder(Target):
    """Computes, and keeps what is named in the steps until the run ends: what a block computes anew later is not."""

    def __init__(self, sinks: dict[Sink, str], place: str, divide: Divide) -> None:
        super().__init__(divide)
        self.sinks, self.place, self.scope = sinks, place, ""
        self.found: dict[str, list[Tensor]] | None = {}

    def enter(self, scope: str) -> None:
        self.scope = scope

    def __call__(self, value: Tensor, name: str) -> Tensor:
        pass_name, dot, _ = self.scope.rpartition(".t")  # `l1.reverse.t7`; before the steps there is no number
        if dot and self.found is not None:
            if torch._C._functorch.is_functorch_wrapped_tensor(value):  # pyright: ignore[reportAttributeAccessIssue]
                finding = "is recorded inside of a transform of torch.func, whose values mean nothing outside of it"
                raise UnrollError(Problem(self.place, finding, "record a plain call, or return the gates you need"))
            self.found.setdefault(f"{pass_name}.{name}", []).append(value)
        return value

    def close(self, batch: int, masks: Sequence[Tensor] | None, order: Tensor | None) -> None:
        """Hand over what was found, in the order of time."""
        found, self.found = self.found or {}, None
        for sink, layer in self.sinks.items():
            for name, values in found.items():
                if sink.wants(full := f"{layer}.{name}"):
                    # backwards, the last step is done first
                    ordered = values[::-1] if ".reverse." in f".{name}" else values
                    each = masks or [None] * len(values)
                    sink.add(full, [Step(v, batch, mask, order) for v, mask in zip(ordered, each, strict=True)])
