"""Calls in CUDA graphs: captured as they are, or held to those that `torch.compile` uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from unroll.core.errors import Problem, UnrollError


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """Capture a call in a CUDA graph; return the function that replays it."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def checked(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return the same, each call by itself, and refused if it uses no CUDA graphs."""
    from torch._dynamo.utils import counters

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the results of the last call may be overwritten
        result = run()
        if counters["inductor"]["cudagraph_skips"]:
            raise UnrollError(Problem("torch.compile", "used no CUDA graphs", "see its log for the reason"))
        return result

    return call
