"""An LSTM with one memory, its weights chosen by hand: x2=1 writes x1, x2=-1 resets and x3=1 reads.

Published with c and h to one decimal, worked out with pencil and paper. An nn.LSTMCell stepped by hand, an
nn.LSTM and both of them unrolled give the same.
"""

import torch
from torch import nn

from unroll import unroll

VALUES = {
    "weight_ih": [[0, 100, 0], [0, 100, 0], [1, 0, 0], [0, 0, 100]],  # rows: input, forget, cell and output gate
    "weight_hh": [[0], [0], [0], [0]],
    "bias_ih": [-10, 10, 0, -10],
    "bias_hh": [0, 0, 0, 0],
}
INPUT = [[0.2, 1, 0], [0.1, 1, 0], [-0.1, 0, 0], [-0.2, 0, 1], [0.25, -1, 0]]
PUBLISHED = {"h": [0, 0, 0, 0.3, 0], "c": [0.2, 0.3, 0.3, 0.3, 0]}


def step_cell(cell: nn.Module, x: torch.Tensor) -> list[tuple[float, float]]:
    """`h` and `c` after each step."""
    states, state = [], None
    for row in x:
        state = cell(row, state)
        states.append((state[0].item(), state[1].item()))
    return states


def run_layer(layer: nn.Module, x: torch.Tensor) -> list[tuple[float, float]]:
    """`h` and `c` after each step, as the last state of one, two, three ... steps."""
    states = [layer(x[: t + 1])[1] for t in range(len(x))]
    return [(h.item(), c.item()) for h, c in states]


def main() -> None:
    x = torch.tensor(INPUT)[:, None]
    cell, layer = nn.LSTMCell(3, 1), nn.LSTM(3, 1)
    cell.load_state_dict({name: torch.tensor(value) for name, value in VALUES.items()})
    layer.load_state_dict({f"{name}_l0": torch.tensor(value) for name, value in VALUES.items()})
    runs = step_cell(cell, x), step_cell(unroll(cell), x), run_layer(layer, x), run_layer(unroll(layer), x)

    print(f"{'':>13}  {'LSTMCell':^18}  {'LSTM':^18}")
    print("step  published" + "     fused  unrolled" * 2)
    for k, name in enumerate(PUBLISHED):
        for t, published in enumerate(PUBLISHED[name]):
            values = [run[t][k] for run in runs]
            print(f"{name}{t:>3}  {published:>9.1f}  " + "  ".join(f"{value:8.5f}" for value in values))
            assert all(round(value, 1) == published for value in values)
            assert max(values) - min(values) < 1e-6


if __name__ == "__main__":
    main()
