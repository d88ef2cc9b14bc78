"""Rules by which the plan of a preset depends on the layer, its sizes, the device and the kind of model.

`Plan.resolve` applies them, for every kind of model; each has its measurement beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from unroll.core.recurrence import Recurrence

ANY = (0, inf)
"""Limits of any size"""


Kind = Literal["module", "graph", "torchscript", "onnx"]
"""The kinds of model that are written: an FX graph or a program is a `graph`"""


@dataclass(frozen=True)
class Situation:
    """A layer that is about to run or to be written, as far as rules ask."""

    layer: Recurrence
    steps: int | None = None
    """None if they are open"""
    batch: int | None = None
    """The same"""
    packed: bool = False
    """True if rows may have fewer steps"""
    device: str = ""
    """The type of the device that the weights are on, such as `cuda`; empty where nothing tells, as in a file"""
    kind: Kind = "module"
    frozen: bool = False
    """True if the weights are laid out already"""


@dataclass(frozen=True)
class Rule:
    """Choices that a preset makes where its conditions hold; a size that is open meets no condition."""

    choices: Mapping[str, Any]
    """Fields of `Plan` and their values; `time` for kinds of model that have loops, `products="linear"` for none"""
    steps: tuple[float, float] = ANY
    """The fewest and the most steps"""
    batch: tuple[float, float] = ANY
    """The smallest and the largest batch"""
    packed: bool | None = None
    """None for packed rows and others"""
    device: str = ""
    """The type of device; empty for any"""
    kind: Kind | Literal[""] = ""
    """The kind of model; empty for any"""
    layer: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the `Recurrence` and their values, such as `{"bidirectional": True}`"""

    def holds(self, at: Situation) -> bool:
        """Tell whether all conditions hold; never for a cell, which has no steps."""
        sizes = ((self.steps, at.steps), (self.batch, at.batch))
        within = (limits == ANY or (n is not None and limits[0] <= n <= limits[1]) for limits, n in sizes)
        named = self.device in ("", at.device) and self.kind in ("", at.kind) and self.packed in (None, at.packed)
        like = all(getattr(at.layer, name) == value for name, value in self.layer.items())
        return named and like and not at.layer.is_cell and all(within)


# Figures of benchmarks/results/tensorrt.json, see docs/tensorrt.md: TensorRT for RTX builds an engine of explicit steps
# in a time that grows faster than their number, and each step makes it larger; of blocks of four in a loop neither
# depends on the number of steps. They are of files, and converters of other kinds of model have no loop.
RULES: dict[str, tuple[Rule, ...]] = {
    # The data-center library, of which no engine was built: its table has no loop over packed rows.
    "tensorrt": (Rule({"time": 4}, steps=(64, inf), packed=False, kind="onnx"),),
    "tensorrt_rtx": (Rule({"time": 4}, steps=(64, inf), kind="onnx"),),
}
"""Rules of presets, by their names; the first one that holds counts, and where none does the preset's plan"""
