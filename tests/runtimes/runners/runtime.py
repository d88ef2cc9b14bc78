"""The description of a runtime, and how its results are judged; nothing here, nor beside it, needs PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

Inputs = dict[str, np.ndarray]
"""Arrays by the name of the input"""

Run = Callable[[Inputs], list[np.ndarray]]
"""A loaded file: from inputs to results, in the order of the file"""


class Missing(NamedTuple):
    """A model that a runtime does not run in the form of its preset."""

    why: str
    instead: str


def same(path: Path, given: list[Inputs]) -> Path:
    return path


def count(path: Path) -> Counter[str]:
    """Return the operators of an ONNX file, those of loops' bodies and functions too."""
    import onnx

    def add(nodes: object) -> None:
        for node in nodes:
            found[node.op_type] += 1
            for attribute in node.attribute:
                for graph in (attribute.g, *attribute.graphs):
                    add(graph.node)

    found: Counter[str] = Counter()
    model = onnx.load(path, load_external_data=False)
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        add(nodes)
    return found


@dataclass(frozen=True)
class Runtime:
    """A runtime, or a tool that makes of one file another, which ONNX Runtime then runs."""

    name: str
    """As in tables"""
    package: str
    """What must be importable"""
    distribution: str
    """By whose name its version is known"""
    load: Callable[[Path], Run] | None
    """None for what cannot run here: that it converts is all that is seen"""
    convert: Callable[[Path, list[Inputs]], Path] = same
    """Makes a file of the runtime's own, of a file and the inputs that it will be given"""
    count: Callable[[Path], Mapping[str, int]] | None = count
    """Operators in the file that it loads"""
    products: Callable[[Mapping[str, int]], dict[str, int]] | None = None
    """Of what takes products, into eight bits or to a delegate: how many there are, and how many are `taken`"""
    suffix: str = ".onnx"
    """Of the files that it is given; `.pt2` for exported programs"""
    preset: str = "default"
    plans: tuple[str, ...] = ()
    """Other plans that are tried"""
    missing: dict[str, Missing] = field(default_factory=dict)
    """By the name of the model; each must fail still"""
    others: dict[str, str] = field(default_factory=dict)
    """By the file, native or of another plan: why it is not right for models that the preset's is right for"""
    apart: bool = False
    """Wants an environment of its own, in which `make matrix` alone runs it"""
    installed: Callable[[str], str] = version
    """Returns the version of a distribution"""
    tolerance: float = 1e-5
    """The largest difference that is right, of the largest value of each result"""

    def version(self) -> str:
        return self.installed(self.distribution)


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """Return the largest difference, of the largest value of each result; infinity for other shapes."""
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for f, e in zip(found, expected, strict=True):
        if np.size(f) != np.size(e):
            return float("inf")
        scale = np.abs(e).max(initial=0) or 1.0
        worst = max(worst, float(np.abs(np.reshape(f, e.shape) - e).max(initial=0) / scale))
    return worst if np.isfinite(worst) else float("inf")
