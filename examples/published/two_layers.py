"""Two LSTM layers without biases over five steps, with published weights, inputs and outputs.

The published outputs have four decimals, and so have most of the weights. They are also those of two
nn.LSTM(3, 3) one after the other, fused or unrolled.
"""

import json
from pathlib import Path

import torch
from torch import nn

from unroll import unroll

published = json.loads(Path(__file__).with_suffix(".json").read_text())
weights = {name: torch.tensor(rows) for name, rows in published["weights"].items()}
x = torch.tensor(published["inputs"]).reshape(5, 1, 3)
outputs = torch.tensor(published["outputs"])

both = nn.LSTM(3, 3, num_layers=2, bias=False)
both.load_state_dict(weights)
pair = [nn.LSTM(3, 3, bias=False) for _ in range(2)]
for k, layer in enumerate(pair):
    layer.load_state_dict({f"{name}_l0": weights[f"{name}_l{k}"] for name in ("weight_ih", "weight_hh")})
first, second = pair

with torch.no_grad():
    results = {
        "fused": both(x)[0],
        "unrolled": unroll(both)(x)[0],
        "fused, one by one": second(first(x)[0])[0],
        "unrolled, one by one": unroll(second)(unroll(first)(x)[0])[0],
    }

print("step  " + "  ".join(f"{name:^23}" for name in ("published", *results)))
for t in range(5):
    rows = [outputs[t], *(result[t, 0] for result in results.values())]
    print(f"{t:>4}  " + "  ".join(" ".join(f"{value:7.4f}" for value in row.tolist()) for row in rows))
for name, result in results.items():
    difference = (result[:, 0] - outputs).abs().max().item()
    print(f"{name}: at most {difference:.1e} from the published figures")
    assert difference <= 0.5e-4 + 1e-6, "does not round to the published four decimals"
