"""A sequence at once or step by step with the state carried over; two layers in one or one after the other.

The published question asks whether each pair is the same. It is, twice, and so it is for the unrolled layers.
Weights and input are free, and drawn here.
"""

import torch
from torch import nn

from unroll import unroll


def step_by_step(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a `batch_first` layer that is given one step of `x` at a time."""
    state, outputs = None, []
    for t in range(x.shape[1]):
        output, state = layer(x[:, t : t + 1], state)
        outputs.append(output)
    return torch.cat(outputs, 1)


def show(title: str, results: dict[str, torch.Tensor]) -> None:
    """The first sequence's first feature, step by step, and how far the results are apart."""
    print(title)
    print("step  " + "  ".join(f"{name:>22}" for name in results))
    for t in range(3):
        print(f"{t:>4}  " + "  ".join(f"{result[0, t, 0].item():22.6f}" for result in results.values()))
    expected, *others = results.values()
    difference = max((other - expected).abs().max().item() for other in others)
    print(f"largest difference over all steps, sequences and features: {difference:.1e}\n")
    assert difference < 1e-12


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.randn(2, 3, 4)

with torch.no_grad():
    layer = nn.LSTM(4, 5, batch_first=True)
    unrolled = unroll(layer)
    results = {"fused, at once": layer(x)[0], "fused, by steps": step_by_step(layer, x)}
    results |= {"unrolled, at once": unrolled(x)[0], "unrolled, by steps": step_by_step(unrolled, x)}
    show("nn.LSTM(4, 5), a sequence of three steps", results)

    both = nn.LSTM(4, 5, num_layers=2, batch_first=True)
    first, second = nn.LSTM(4, 5, batch_first=True), nn.LSTM(5, 5, batch_first=True)
    for k, part in enumerate((first, second)):
        part.load_state_dict({name: both.state_dict()[name.replace("_l0", f"_l{k}")] for name in part.state_dict()})
    results = {"fused, two layers": both(x)[0], "fused, one by one": second(first(x)[0])[0]}
    results |= {
        "unrolled, two layers": unroll(both)(x)[0],
        "unrolled, one by one": unroll(second)(unroll(first)(x)[0])[0],
    }
    show("nn.LSTM(4, 5, num_layers=2), against two layers one after the other", results)
