"""The recurrent operators of TorchScript, and where they stand in a module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from unroll.core.recurrence import KINDS

SCRIPT_KINDS = tuple(f"aten::{kind}{cell}" for cell in ("", "_cell") for kind in KINDS)
"""Those of whole layers, and of single steps"""

OTHER_KINDS = re.compile(r"(aten|quantized)::\w*(lstm|gru|rnn)(?!\w*(prepack|flatten|backward))\w*")
"""Quantized operators and those of one backend, which are recurrent and refused"""


def walk(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all nodes in their order, those in blocks and in the graphs of forks included, with their graph."""

    def within(block: Any) -> Iterator[tuple[Any, Any]]:
        for node in block.nodes():
            yield node, graph
            for inner in node.blocks():
                yield from within(inner)
            if node.hasAttribute("Subgraph"):
                yield from walk(node.g("Subgraph"))

    return within(graph)


def methods(root: Any) -> Iterator[tuple[Any, str, Any]]:
    """Yield each piece of compiled code under a module once: a submodule that has it, its name and its graph."""
    seen = set()
    for module in root.modules():
        kind = str(module._c._type())
        if kind not in seen:
            seen.add(kind)
            yield from ((module, name, module._c._get_method(name).graph) for name in module._c._method_names())


def is_recurrent(node: Any) -> bool:
    return node.kind() in SCRIPT_KINDS or OTHER_KINDS.fullmatch(node.kind()) is not None


def count_recurrent(graph: Any) -> int:
    return sum(is_recurrent(node) for node, _ in walk(graph))


def method_graphs(module: torch.jit.ScriptModule) -> Iterator[Any]:
    """Yield the graph of each method, with what it calls written out. A scripted layer has no single `forward`."""
    for name in module._c._method_names():
        graph = module._c._get_method(name).graph.copy()
        torch._C._jit_pass_inline(graph)
        yield graph
