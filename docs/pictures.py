"""Draws the pictures of steps in `docs/`: python docs/pictures.py [FOLDER]."""

import sys
from pathlib import Path

from torch import nn

from unroll import draw, unroll


def main(folder: Path) -> None:
    draw(nn.LSTM(8, 16), folder / "steps.svg")
    stack, both = nn.LSTM(8, 16, num_layers=2), nn.LSTM(8, 16, bidirectional=True)
    plans = {"sequential": (stack, None), "wavefront": (stack, "layers=wavefront")}
    plans |= {"separate": (both, "gates=paired"), "stacked": (both, "gates=paired,directions=stacked")}
    plans |= {"blocks": (nn.LSTM(8, 16), "gates=split,time=2")}
    model = nn.ModuleDict({name: unroll(layer, plan=plan) for name, (layer, plan) in plans.items()})
    draw(model, folder / "plans.svg", steps=4)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
