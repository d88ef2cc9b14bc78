"""Rules by which the plan of a preset depends on the layer, its sizes, the device and the kind of model.

`Plan.resolve` applies them, for every kind of model; each has its measurement beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # a command line that only tells of itself does not wait for torch
    from unroll.core.recurrence import Recurrence

ANY = (0, inf)
"""Limits of any size"""


Kind = Literal["module", "graph", "compiled", "torchscript", "onnx"]
"""The kinds of model that are written: an FX graph or a program is a `graph`, or `compiled` on the way to Inductor"""


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
    trained: bool = False
    """True if gradients may be asked for"""


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
    trained: bool | None = None
    """None for training and inference"""
    hidden: tuple[float, float] = ANY
    """The smallest and the largest hidden size"""
    layer: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the `Recurrence` and their values, such as `{"bidirectional": True}`"""

    def holds(self, at: Situation) -> bool:
        """Tell whether all conditions hold; never for a cell, which has no steps."""
        sizes = ((self.steps, at.steps), (self.batch, at.batch), (self.hidden, at.layer.hidden_size))
        within = (limits == ANY or (n is not None and limits[0] <= n <= limits[1]) for limits, n in sizes)
        named = self.device in ("", at.device) and self.kind in ("", at.kind)
        named = named and self.packed in (None, at.packed) and self.trained in (None, at.trained)
        like = all(getattr(at.layer, name) == value for name, value in self.layer.items())
        return named and like and not at.layer.is_cell and all(within)


# Microseconds a step in CUDA graphs, inference, on an H200, see docs/gpu.md. What was not measured has no rule:
# training, packed rows, and batches between one and 16.
ON_GPU = {"device": "cuda", "trained": False, "packed": False}

# Figures of benchmarks/results/tensorrt.json, see docs/tensorrt.md: TensorRT for RTX builds an engine of explicit steps
# in a time that grows faster than their number, and each step makes it larger; of blocks of four in a loop neither
# depends on the number of steps. They are of files, and converters of other kinds of model have no loop.
IN_BLOCKS = Rule({"time": 4}, steps=(64, inf), kind="onnx")

RULES: dict[str, tuple[Rule, ...]] = {
    "tensorrt": (IN_BLOCKS,),
    "tensorrt_rtx": (IN_BLOCKS,),
    "inductor": (
        # The first call takes as long for any number of steps, and each after it no longer, see docs/lengths.md; of
        # 96 steps written out it takes as long. PyTorch before 2.15 gets gradients through the loop wrong.
        Rule({"time": 16}, steps=(96, inf), device="cpu", trained=False, kind="compiled"),
        # One kernel a step in place of two: LSTM 512 in bfloat16 3.0, with a product 5.3 (rows copied apart in both);
        # 1024 in float32 7.8 and 9.6, 128 in float32 3.4 and 3.8; GRU 128 in float32 2.7 and 3.8. Larger sizes were
        # not measured: a sum over more than 1024 goes in a loop.
        Rule({"gates": "split", "products": "sums"}, batch=(1, 1), hidden=(0, 1024), **ON_GPU),
        # LSTM 512, B=16, bfloat16: 6.1, one direction after the other 11.3
        Rule({"directions": "stacked"}, batch=(16, inf), layer={"bidirectional": True}, **ON_GPU),
        # Three layers of LSTM 512, B=16, bfloat16: 16.9, one after the other 18.1; in float32, B=1, 19.5 and 14.3
        Rule({"layers": "wavefront"}, batch=(16, inf), layer={"bidirectional": False, "num_layers": 3}, **ON_GPU),
    ),
}
"""Rules of presets, by their names; the first one that holds counts, and where none does the preset's plan"""
