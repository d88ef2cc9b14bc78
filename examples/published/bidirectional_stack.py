"""Stacked bidirectional RNN layers, and the order in which they must be run.

The published question: a bidirectional RNN by hand was right with one layer and wrong with two. It went
through the layers inside its loop over time; but the second layer needs the reversed pass of the first, which
ends only when the whole sequence has been read. Weights and input are free, and drawn here.
"""

import torch
from torch import Tensor, nn

from unroll import unroll


def layers_inside_the_loop(layer: nn.RNN, x: Tensor) -> Tensor:
    """The published mistake: each step goes through all layers, with what their passes know so far."""
    weights = dict(layer.named_parameters())
    series = {"": x, "_reverse": x.flip(0)} if layer.bidirectional else {"": x}
    names = [[f"l{k}{suffix}" for suffix in series] for k in range(layer.num_layers)]
    h = {name: x.new_zeros(x.shape[1], layer.hidden_size) for layer_names in names for name in layer_names}
    outputs = []
    for t in range(len(x)):
        below = [x_in_order[t] for x_in_order in series.values()]
        for layer_names in names:
            for name, rows in zip(layer_names, below, strict=True):
                pre = rows @ weights[f"weight_ih_{name}"].T + h[name] @ weights[f"weight_hh_{name}"].T
                h[name] = torch.tanh(pre)
            below = [torch.cat([h[name] for name in layer_names], 1)] * len(series)
        outputs.append([h[name] for name in names[-1]])
    forward, *reverse = (torch.stack(steps) for steps in zip(*outputs, strict=True))
    return torch.cat([forward, *(steps.flip(0) for steps in reverse)], 2)


print(f"{'':25}  {'first output':^18}  {'difference from fused':^24}")
print("layers  directions  steps     fused  unrolled  unrolled  layers in loop")
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
for num_layers in (1, 2):
    for bidirectional in (False, True):
        layer = nn.RNN(10, 12, num_layers, bias=False, bidirectional=bidirectional)
        for steps in (1, 2, 7):
            x = torch.randn(steps, 2, 10)
            with torch.no_grad():
                fused, unrolled, mistaken = layer(x)[0], unroll(layer)(x)[0], layers_inside_the_loop(layer, x)
            ours, theirs = ((other - fused).abs().max().item() for other in (unrolled, mistaken))
            values = f"{fused[0, 0, 0].item():8.5f}  {unrolled[0, 0, 0].item():8.5f}  {ours:8.1e}  {theirs:14.1e}"
            print(f"{num_layers:>6}  {1 + bidirectional:>10}  {steps:>5}  {values}")
            assert ours < 1e-12
            assert (theirs > 1e-3) == (num_layers == 2 and bidirectional and steps > 1)
