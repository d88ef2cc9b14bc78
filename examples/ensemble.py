"""Runs an ensemble of recurrent models as one, by `torch.func`: weights stacked, and `vmap` over them.

Torch's fused layers have no batching rule. Prints how the CPU time compares to a loop over the models.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from unroll import unroll
from unroll.bench.machine import command, machine


class Forecaster(nn.Module):
    """Reads a series and gives its next value, `[B, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.gru(series)[1][-1])


def seconds(forms: dict[str, Callable[[], Tensor]], rounds: int = 21) -> dict[str, float]:
    """Median CPU time of each form, which other processes delay little; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.process_time()
            form()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=16, help="how many (%(default)s)")
    parser.add_argument("--save", type=Path, help="a file for the figures, in JSON")
    options = parser.parse_args()
    count = options.models

    torch.manual_seed(0)
    fused = [Forecaster().eval() for _ in range(count)]
    unrolled = [unroll(model) for model in fused]
    parameters, buffers = stack_module_state(unrolled)
    form = copy.deepcopy(unrolled[0]).to("meta")
    series = torch.randn(8, 24, 4)

    def one(weights: dict[str, Tensor], held: dict[str, Tensor], series: Tensor) -> Tensor:
        return functional_call(form, (weights, held), (series,))

    together = vmap(one, in_dims=(0, 0, None))
    with torch.no_grad():
        expected = torch.stack([model(series) for model in fused])
        found = together(parameters, buffers, series)
        difference = (found - expected).abs().max().item()
        print(f"{count} models: {list(found.shape)}, largest difference {difference:.1e}")
        times = seconds(
            {
                "vmap": lambda: together(parameters, buffers, series),
                "loop, unrolled": lambda: torch.stack([model(series) for model in unrolled]),
                "loop, fused": lambda: torch.stack([model(series) for model in fused]),
            }
        )
    for name, taken in times.items():
        print(f"{name:<14} {1000 * taken:8.2f} ms  {taken / times['loop, fused']:.2f} of the fused loop")
    if options.save:
        saved = {"command": command(), "machine": machine(), "threads": torch.get_num_threads(), "models": count}
        saved |= {"difference": difference, "cpu_seconds": times}
        options.save.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
