"""Gradients: each in memory of its own, and two backwards are exactly twice one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from unroll import Plan, trace, unroll
from unroll import compile as unroll_compile

LAYERS = {
    "RNN": lambda: nn.RNN(3, 4),
    "GRU": lambda: nn.GRU(3, 4, bidirectional=True),
    "LSTM": lambda: nn.LSTM(3, 4, 2, proj_size=2),
    "RNNCell": lambda: nn.RNNCell(3, 4),
    "GRUCell": lambda: nn.GRUCell(3, 4),
    "LSTMCell": lambda: nn.LSTMCell(3, 4),
}
PLANS = ("gates=merged", "gates=split", "products=sums", "products=linear", "directions=stacked", "layers=wavefront")


def leaves(layer):
    cell = isinstance(layer, nn.RNNCellBase)
    x = torch.randn(*(() if cell else (3,)), 2, 3, requires_grad=True)
    passes = () if cell else (layer.num_layers * (1 + layer.bidirectional),)
    sizes = (getattr(layer, "proj_size", 0) or 4, 4)[: 2 if "LSTM" in type(layer).__name__ else 1]
    state = [torch.randn(*passes, 2, size, requires_grad=True) for size in sizes]
    return x, state


def check(run, layer, x, state, atol=0.0):
    inputs = [x, *state, *layer.parameters()]
    hx = tuple(state) if len(state) == 2 else state[0]

    def backwards(times):
        for leaf in inputs:
            leaf.grad = None
        for _ in range(times):
            result = run(x, hx)
            results = torch.utils._pytree.tree_leaves(result)
            sum((r.sin() * k).sum() for k, r in enumerate(results, 1)).backward()
        return [leaf.grad for leaf in inputs]

    one = backwards(1)
    for a, b in combinations(one, 2):
        assert a.untyped_storage()._cdata != b.untyped_storage()._cdata
    one = [grad.clone() for grad in one]
    for a, b in zip(one, backwards(2), strict=True):
        torch.testing.assert_close(b, 2 * a, atol=atol, rtol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_of_modules(kind, plan):
    layer = LAYERS[kind]()
    x, state = leaves(layer)
    check(unroll(layer, plan=Plan.of(plan)), layer, x, state)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("frontend", ["graph", "aot_eager", "eager"])
def test_gradients_of_other_forms(kind, frontend):
    torch._dynamo.reset()
    layer = LAYERS[kind]()
    x, state = leaves(layer)
    hx = tuple(state) if len(state) == 2 else state[0]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x, hx):
            return self.layer(x, hx)

    graph = frontend == "graph"
    run = unroll(trace(Model()), (x, hx)) if graph else unroll_compile(layer, backend=frontend)
    check(run, layer, x, state)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell", "LSTMCell"])
def test_gradients_of_scripts(kind):
    layer = LAYERS[kind]()
    run = unroll(torch.jit.script(layer))
    check(run, layer, *leaves(layer), atol=1e-6)  # TorchScript fuses otherwise after the first runs


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTMCell"])
def test_gradients_with_inductor(kind):
    torch._dynamo.reset()
    layer = LAYERS[kind]()
    check(unroll_compile(layer), layer, *leaves(layer))
