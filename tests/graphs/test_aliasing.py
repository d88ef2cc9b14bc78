"""Results of a layer that a graph writes into: torch's have memory of their own, and so must ours."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from unroll import compare, trace, unroll
from unroll.graphs.effects import is_written


def into_a_step(y, h):
    y[-1].mul_(2)
    return y, h


def into_the_state(y, h):
    h += 1
    return y, h, y[-1], h[0]


def into_an_item(y, h):
    h[0].copy_(y[0, :, :5])
    return y, h, y[0]


def by_a_function(y, h):
    return functional.relu(y.transpose(0, 1), inplace=True), y, h


def by_a_method(y, h):
    return y.view(-1).clamp_(0.1, 0.2), y[-1], h


def by_out(y, h):
    return torch.neg(h, out=h), y, h


READERS = [into_a_step, into_the_state, into_an_item, by_a_function, by_a_method, by_out]


class Written(nn.Module):
    def __init__(self, reader) -> None:
        super().__init__()
        self.rnn = nn.GRU(6, 5, bidirectional=True, dtype=torch.float64)
        self.reader = reader

    def forward(self, x):
        y, h = self.rnn(x)
        return self.reader(y, h)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reader", READERS)
def test_writes_reach_what_they_reach_in_torch(reader, steps):
    x = torch.randn(steps, 2, 6, dtype=torch.float64)
    model = Written(reader)
    ours = unroll(trace(model), x)
    with torch.no_grad():
        compare(model, ours, (x,)).check()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reader", [into_a_step, into_the_state, by_a_method])
def test_writes_in_exported_programs(reader, steps):
    x = torch.randn(steps, 2, 6, dtype=torch.float64)
    model = Written(reader)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        compare(model, unroll(program).module(), (x,)).check()


def test_an_inplace_module_counts():
    class Model(Written):
        def __init__(self) -> None:
            super().__init__(None)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y, h = self.rnn(x)
            return self.relu(h), y[-1], h

    model, x = Model(), torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        compare(model, unroll(trace(model), x), (x,)).check()


def test_what_only_reads_does_not_count():
    graph = fx.symbolic_trace(lambda x: (x + 1)[0].reshape(-1).relu() + x.__abs__()).graph
    assert not any(map(is_written, graph.nodes))
