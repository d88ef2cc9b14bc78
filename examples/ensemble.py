"""Runs an ensemble of recurrent models as one, by `torch.func`: weights stacked, and `vmap` over them.

Torch's fused layers have no batching rule. Prints how the time compares to a loop over the models.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from unroll import unroll


class Forecaster(nn.Module):
    """Reads a series and gives its next value, `[B, 1]`."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 32, batch_first=True)
        self.head = nn.Linear(32, 1)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.gru(series)[1][-1])


def seconds(forms: dict[str, Callable[[], Tensor]], rounds: int = 21) -> dict[str, float]:
    """Median time of each form; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=16, help="how many (%(default)s)")
    count = parser.parse_args().models

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
        print(f"{count} models: {list(found.shape)}, largest difference {(found - expected).abs().max().item():.1e}")
        times = seconds(
            {
                "vmap": lambda: together(parameters, buffers, series),
                "loop, unrolled": lambda: torch.stack([model(series) for model in unrolled]),
                "loop, fused": lambda: torch.stack([model(series) for model in fused]),
            }
        )
    for name, taken in times.items():
        print(f"{name:<14} {1000 * taken:8.2f} ms  {taken / times['loop, fused']:.2f} of the fused loop")


if __name__ == "__main__":
    main()
