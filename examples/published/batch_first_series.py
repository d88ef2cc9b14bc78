"""One series of thirty values through an LSTM with batch_first=True and with batch_first=False.

The published question: a hand-written LSTM agreed with nn.LSTM only for batch_first=False. Its loop over
time was missing, so it ran thirty series of one value where one series of thirty values was meant. Only the
input is published, with recurrent weights of one and no bias; the input weights are free, and drawn here.
"""

import torch
from torch import nn

from unroll import unroll

SERIES = [0.14285755, 0, 0.04761982, 0.04761982, 0.04761982, 0.04761982, 0.04761982, 0.09523869, 0.09523869, 0.09523869]
SERIES += [0.09523869, 0.09523869, 0.04761982, 0.04761982, 0.04761982, 0.04761982, 0.09523869, 0, 0, 0]
SERIES += [
    0,
    0.09523869,
    0.09523869,
    0.09523869,
    0.09523869,
    0.09523869,
    0.09523869,
    0.09523869,
    0.14285755,
    0.14285755,
]


def lstm(batch_first: bool, weight_ih: torch.Tensor) -> nn.LSTM:
    layer = nn.LSTM(1, 1, batch_first=batch_first, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(weight_ih)
        layer.weight_hh_l0.fill_(1)
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.zero_()
    return layer


torch.manual_seed(0)
weight_ih = torch.randn(4, 1, dtype=torch.float64)
series = torch.tensor(SERIES, dtype=torch.float64)
batch_first, time_first = series.reshape(1, 30, 1), series.reshape(30, 1, 1)

results = {}
with torch.no_grad():
    for first, x in ((True, batch_first), (False, time_first)):
        layer = lstm(first, weight_ih)
        results["fused", first] = layer(x)[0].flatten()
        results["unrolled", first] = unroll(layer)(x)[0].flatten()
    # The published mistake: thirty series of one value each, every one starting from zero.
    mistaken = lstm(False, weight_ih)(batch_first)[0].flatten()

print(f"{'':>4}  {'':>8}  {'batch_first=True':^18}  {'batch_first=False':^18}  {'without':>8}")
print(f"{'step':>4}  {'input':>8}  {'fused':>8}  {'unrolled':>8}  {'fused':>8}  {'unrolled':>8}  {'the loop':>8}")
for t, row in enumerate(zip(series, *results.values(), mistaken, strict=True)):
    print(f"{t:>4}  " + "  ".join(f"{value:8.5f}" for value in row))

expected, *others = results.values()
difference = max((other - expected).abs().max().item() for other in others)
print(f"largest difference between the four: {difference:.1e}")
assert difference < 1e-12
assert (mistaken - expected).abs().max() > 0.01
