"""Rules by which the plan of a preset depends on the layer, the steps and the batch, each with its measurement.

Only ONNX models ask them so far: what was measured are engines of files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

from unroll.core.recurrence import Recurrence

ANY = (0, inf)
"""Limits of any size"""


@dataclass(frozen=True)
class Situation:
    """A layer that is about to be written, as far as rules ask."""

    layer: Recurrence
    steps: int | None = None
    """None if they are open"""
    batch: int | None = None
    """The same"""
    packed: bool = False
    """True if rows may have fewer steps"""


@dataclass(frozen=True)
class Rule:
    """Choices that a preset makes where its conditions hold; a size that is open meets no condition."""

    choices: Mapping[str, Any]
    """Fields of `Plan` and their values"""
    steps: tuple[float, float] = ANY
    """The fewest and the most steps"""
    batch: tuple[float, float] = ANY
    """The smallest and the largest batch"""
    packed: bool | None = None
    """None for packed rows and others"""

    def holds(self, at: Situation) -> bool:
        """Tell whether all conditions hold; never for a cell, which has no steps."""
        sizes = ((self.steps, at.steps), (self.batch, at.batch))
        within = (limits == ANY or (n is not None and limits[0] <= n <= limits[1]) for limits, n in sizes)
        return self.packed in (None, at.packed) and not at.layer.is_cell and all(within)


# Figures of benchmarks/results/tensorrt.json, see docs/tensorrt.md: TensorRT for RTX builds an engine of explicit steps
# in a time that grows faster than their number, and each step makes it larger; of blocks of four in a loop neither
# depends on the number of steps.
RULES: dict[str, tuple[Rule, ...]] = {
    # The data-center library, of which no engine was built: its table has no loop over packed rows.
    "tensorrt": (Rule({"time": 4}, steps=(64, inf), packed=False),),
    "tensorrt_rtx": (Rule({"time": 4}, steps=(64, inf)),),
}
"""Rules of presets, by their names; the first one that holds counts, and where none does the preset's plan"""
