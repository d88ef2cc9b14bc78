"""Results of a layer that a graph writes into: torch's have memory of their own, and so must ours."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from unroll import compare, trace, unroll
from unroll import compile as unroll_compile


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


def checkpointed(y, h):
    return checkpoint(lambda last: last.mul_(2), y[-1], use_reentrant=False), h


def by_each(y, h):
    torch._foreach_mul_([y[-1]], 2)
    return y, h, h[0]


def remainder(y, h):
    last = y[-1]
    last %= 0.5
    return last, h


def dropped(y, h):
    return functional.leaky_relu(functional.dropout(y[-1], 0.5, False), 0.1, True), h


def cast(y, h):
    return y[-1].to(torch.float64).mul_(2), h


def moved(y, h):
    return y[-1].movedim(0, 1).mul_(2), h


def into_statistics(y, h):
    last = y[-1].select(-1, 0)
    return functional.batch_norm(torch.ones(3, last.numel()).to(y), last, y[-1].select(-1, 1), training=True), y, h


def into_statistics_of_instances(y, h):
    last, variance = y[-1].select(-1, 0), y[-1].select(-1, 1)
    return functional.instance_norm(torch.arange(6.0).expand(1, last.numel(), 6).to(y), last, variance), y, h


def into_a_table(y, h):
    return functional.embedding(torch.zeros(1, dtype=torch.int64), y[-1], max_norm=0.1), h, y


def into_a_table_of_bags(y, h):
    return functional.embedding_bag(torch.zeros(1, 1, dtype=torch.int64), y[-1], max_norm=0.1), h, y


def by_init(y, h):
    return nn.init.constant_(y[-1], 2.0), h, y


UNSAID = [into_statistics, into_statistics_of_instances, into_a_table, into_a_table_of_bags, by_init]
"""Writers of which no schema tells"""


def frontends(model, *args):
    """The model unrolled, by the name of the frontend."""
    with torch.no_grad():
        yield "program", unroll(torch.export.export(model, args)).module()
        for backend in ("eager", "aot_eager"):
            torch._dynamo.reset()
            yield backend, unroll_compile(model, backend=backend)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("reader", [checkpointed, by_each, remainder, dropped, cast, moved, *UNSAID])
def test_writes_of_all_kinds(reader, steps):
    x = torch.randn(steps, 2, 6, dtype=torch.float64)
    model = Written(reader).eval()
    graphs = [("graph", unroll(trace(model), x))] if reader in UNSAID else []
    for _, ours in [*graphs, *frontends(model, x)]:
        with torch.no_grad():
            compare(model, ours, (x,)).check()


RETURNED = {
    "last, state": lambda y, h: (y[-1], h),
    "all, state": lambda y, h: (y, h),
    "state, last": lambda y, h: (h, y[-1, :, :5]),
    "first, item": lambda y, h: (y[0], h[1]),
    "item of items": lambda y, h: (y[-1].t(), h[-2]),
    "through a function": lambda y, h: (functional.dropout(y[-1], 0.1, False), h[0], h),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", RETURNED)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_results_that_are_returned_share_memory_only_where_torchs_do(name, steps, bidirectional):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.RNN(6, 5, 1 if bidirectional else 2, bidirectional=bidirectional)

        def forward(self, x):
            y, h = self.rnn(x)
            return RETURNED[name](y, h)

    x, model = torch.randn(steps, 2, 6), Model().eval()
    graph = unroll(trace(model), x)
    with torch.no_grad():
        for place, ours in (("graph", graph), *frontends(model, x)):
            theirs, found = model(x), ours(x)
            for k in range(len(found)):
                for j in range(len(found)):
                    same = theirs[k].untyped_storage()._cdata == theirs[j].untyped_storage()._cdata
                    apart = found[k].untyped_storage()._cdata != found[j].untyped_storage()._cdata
                    assert same or apart, (place, k, j)


def test_zeros_that_are_written_to_are_no_zeros():
    def by_view(h, context):
        h[0].view(-1)[:4].copy_(context.view(-1)[:4])
        return h

    def by_function(h, context):
        torch.add(h, context, out=h)
        return h

    def by_statistics(h, context):
        functional.instance_norm(context.transpose(0, 1).repeat(1, 2, 1), h[0, 0, :2], h[0, 1, :2])
        return h

    class Model(nn.Module):
        def __init__(self, change) -> None:
            super().__init__()
            self.rnn, self.change = nn.GRU(3, 4), change

        def forward(self, x, context):
            return self.rnn(x, self.change(torch.zeros(1, 2, 4, dtype=x.dtype), context))[0]

    args = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    for change in (by_view, by_function, by_statistics):
        model = Model(change).eval()
        for _, ours in frontends(model, *args):
            with torch.no_grad():
                compare(model, ours, args).check()


def test_nothing_is_copied_where_nothing_is_written():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head, self.act = nn.LSTM(6, 5, 2), nn.Linear(5, 2), nn.ReLU(inplace=True)

        def forward(self, x):
            y, (h, _) = self.rnn(x)
            return self.act(self.head(y[-1])), h[0]

    model, x = Model().eval(), torch.randn(3, 2, 6)
    graph = unroll(trace(model), x)
    assert not [node for node in graph.graph.nodes if "clone" in str(node.target)]
    compare(model, graph, (x,)).check()
