"""The figures that the tests stand on: `python -m tests.grid` prints them.

The worst error over all cases of the grid in each dtype, the nodes that a step makes, and how long unrolling takes.
"""

from __future__ import annotations

import operator
import time
import warnings
from typing import NamedTuple

import torch
from torch import nn

from tests.cases import GRID, PLANS, Case, flat
from unroll import Plan, trace, unroll

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Error(NamedTuple):
    """Largest over all cases, relative to the largest value of each tensor."""

    cases: int
    from_torch: float
    ours: float
    """from the float64 result"""
    theirs: float
    """of torch, from the float64 result"""


def worst_error(dtype: torch.dtype, cases: list[Case] = GRID) -> Error:
    """Of the unrolled module, over all cases."""
    worst = [0.0, 0.0, 0.0]
    with torch.no_grad():
        for case in cases:
            layer, exact = case.layer(dtype), case.layer(dtype).double()
            args = case.args(dtype)
            doubles = torch.utils._pytree.tree_map_only(torch.Tensor, in_double, args)
            results = [list(flat(f(*a))) for f, a in ((unroll(layer), args), (layer, args), (exact, doubles))]
            for ours, theirs, true in zip(*results, strict=True):
                scale = true.abs().max().item() if true.numel() else 0.0
                if scale:
                    pairs = ((ours, theirs), (ours, true), (theirs, true))
                    errors = [(a.double() - b.double()).abs().max().item() / scale for a, b in pairs]
                    worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return Error(len(cases), *worst)


def in_double(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers in float64; lengths and indices as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


def nodes_per_step(case: Case, plan: Plan) -> int:
    """Computing nodes (all but getitem) that one more step adds to an FX graph."""

    def count(steps: int) -> int:
        graph = unroll(trace(nn.Sequential(case.layer())), steps=steps, plan=plan).graph
        return sum(node.target is not operator.getitem for node in graph.nodes)

    return (count(12) - count(4)) // 8


class Took(NamedTuple):
    """To unroll a three-layer LSTM in both directions in an FX graph."""

    seconds: float
    processor_seconds: float
    """less where others keep the machine busy"""
    nodes: int
    """in the graph that came out"""


def unrolling(steps: int) -> Took:
    """Time it for one length."""
    graph = trace(nn.Sequential(nn.LSTM(64, 128, num_layers=3, bidirectional=True)))
    start, processor = time.perf_counter(), time.process_time()
    nodes = len(unroll(graph, steps=steps).graph.nodes)
    return Took(time.perf_counter() - start, time.process_time() - processor, nodes)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "LSTM with projections")
    print(f"{'dtype':10} {'cases':>6} {'from torch':>11} {'from float64':>13} {'of torch':>9}")
    for dtype in DTYPES:
        error = worst_error(dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"{name:10} {error.cases:6} {error.from_torch:11.1e} {error.ours:13.1e} {error.theirs:9.1e}")
    print("\nnodes a step")
    for kind in ("LSTM", "GRU", "RNN"):
        print(f"{kind:6}", *(f"{plan} {nodes_per_step(Case(kind), plan)}" for plan in PLANS), sep="  ")
    print(f"LSTM with a projection {nodes_per_step(Case('LSTM', proj_size=2), Plan())}")
    print("\nto unroll three layers in two directions")
    for steps in (10, 100, 1000):
        took = unrolling(steps)
        print(f"T={steps:<5} {took.seconds:6.2f} s, {took.processor_seconds:6.2f} s of processor, {took.nodes} nodes")


if __name__ == "__main__":
    main()
