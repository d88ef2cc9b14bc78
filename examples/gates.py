"""Draws the gates of the memory cell over time, as `record` keeps them: when it writes, resets and reads.

python examples/gates.py --file gates.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch
from published.memory_cell import INPUT, PUBLISHED, VALUES
from torch import nn

from unroll import record, unroll

TITLES = {"input": "input: written", "forget": "forget: kept", "output": "output: read", "c": "c: the memory", "h": "h"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("gates.png"), help="the picture (%(default)s)")
    file = parser.parse_args().file

    layer = nn.LSTM(3, 1)
    layer.load_state_dict({f"{name}_l0": torch.tensor(value) for name, value in VALUES.items()})
    cell = unroll(nn.ModuleDict({"cell": layer}))
    with record(cell) as gates, torch.no_grad():
        cell["cell"](torch.tensor(INPUT)[:, None])

    print("step" + "".join(f"{name:>9}" for name in TITLES))
    for t in range(len(INPUT)):
        print(f"{t:>4}" + "".join(f"{gates[f'cell.l0.{name}'][t].item():9.4f}" for name in TITLES))

    figure, panels = plt.subplots(len(TITLES), 1, sharex=True, figsize=(6, 7), layout="constrained")
    for panel, (name, title) in zip(panels, TITLES.items(), strict=True):
        panel.bar(range(len(INPUT)), gates[f"cell.l0.{name}"][:, 0, 0], width=0.6)
        panel.plot(range(len(INPUT)), PUBLISHED[name], "k_", markersize=24) if name in PUBLISHED else None
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_ylim(-0.05, 1.05 if name in ("input", "forget", "output") else 0.4)
    panels[-1].set_xticks(range(len(INPUT)), [f"x{t} = {tuple(x)}" for t, x in enumerate(INPUT)], fontsize=8)
    figure.savefig(file, dpi=100)
    print(f"drawn in {file}; a dash is the published figure")


if __name__ == "__main__":
    main()
