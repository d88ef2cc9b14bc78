"""Long sequences in compiled models: one block of steps is compiled, in a loop."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import unroll as library
from tests.checks import assert_same
from unroll import Plan

STEPS = 103
OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "dropout": 0.5, "batch_first": True},
]


class Counting:
    """A backend that keeps what it is given, and runs it eagerly."""

    def __call__(self, graph, inputs):
        self.graph = graph
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def calls(self):
        called = [n for n in self.graph.graph.nodes if n.target is torch.ops.higher_order.scan]
        return len(called), len({n.args[0] for n in called})


def layer(kind, **options):
    torch.manual_seed(0)
    return getattr(nn, kind)(3, 5, **options).double().eval()


@pytest.fixture
def backend():
    torch.compiler.reset()
    return Counting()


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_results(kind, options, backend):
    model = layer(kind, **options)
    x = torch.randn(2, STEPS, 3) if model.batch_first else torch.randn(STEPS, 2, 3)
    assert_same(library.compile(model, plan="inductor", backend=backend)(x.double()), model(x.double()))
    passes = model.num_layers * (1 + model.bidirectional)
    # six blocks of 16, and seven steps before them, for each pass
    assert backend.calls() == (passes, passes)


@torch.no_grad()
def test_states_and_projection(backend):
    model, x = layer("LSTM", proj_size=4, bidirectional=True), torch.randn(STEPS, 2, 3).double()
    state = torch.randn(2, 2, 4).double(), torch.randn(2, 2, 5).double()
    assert_same(library.compile(model, plan="inductor", backend=backend)(x, state), model(x, state))
    assert backend.calls() == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("steps", [96, 97, 98, 111, 112])
def test_steps_that_fill_no_block(steps, backend):
    model, x = layer("GRU"), torch.randn(steps, 2, 3).double()
    assert_same(library.compile(model, plan="inductor", backend=backend)(x), model(x))


@torch.no_grad()
def test_without_a_batch(backend):
    model, x = layer("LSTM"), torch.randn(STEPS, 3).double()
    assert_same(library.compile(model, plan="inductor", backend=backend)(x), model(x))
    assert backend.calls() == (1, 1)


@torch.no_grad()
def test_an_open_batch_in_inductor():
    torch.compiler.reset()
    model = layer("RNN")
    compiled = library.compile(model)
    for batch in (2, 3):
        x = torch.randn(STEPS, batch, 3).double()
        assert_same(compiled(x), model(x))


@torch.no_grad()
def test_autocast(backend):
    model, x = nn.LSTM(3, 5).eval(), torch.randn(STEPS, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        explicit = library.compile(model, plan=Plan(), backend="eager")(x)
        assert_same(library.compile(model, plan="inductor", backend=backend)(x), explicit)
    assert backend.calls()[0]


@torch.no_grad()
def test_a_layer_that_is_called_twice(backend):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer("RNN")
            self.other = layer("RNN", nonlinearity="relu")

        def forward(self, x):
            return self.rnn(x)[0].sum(), self.other(x)[0], self.rnn(x.flip(0))[0]

    model, x = Twice(), torch.randn(STEPS, 2, 3).double()
    assert_same(library.compile(model, plan="inductor", backend=backend)(x), model(x))


@pytest.mark.parametrize("plan", ["inductor", Plan()], ids=str)
def test_not_for_gradients_nor_for_other_plans(plan, backend):
    model, x = layer("GRU"), torch.randn(STEPS, 2, 3).double()
    compiled = library.compile(model, plan=plan, backend=backend)
    if plan == "inductor":
        assert_same(compiled(x), model(x))
        assert backend.calls() == (0, 0)
    with torch.no_grad():
        assert_same(compiled(x), model(x))
    assert bool(backend.calls()[0]) is (plan == "inductor")


@torch.no_grad()
def test_not_inside_of_a_checkpoint(backend):
    """Whose graph is one of its own already."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = layer("RNN")

        def forward(self, x):
            return checkpoint(self.rnn, x, use_reentrant=False)

    model, x = Checkpointed(), torch.randn(STEPS, 2, 3).double()
    assert_same(library.compile(model, plan="inductor", backend=backend)(x), model(x))
    assert backend.calls() == (0, 0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_inductor(kind):
    """Also from its cache, in which two graphs are not one that differ in their blocks alone."""
    x = torch.randn(STEPS, 2, 3).double()
    for options in ({}, {"nonlinearity": "relu"}, {}) if kind == "RNN" else ({},):
        torch.compiler.reset()
        model = layer(kind, **options)
        assert_same(library.compile(model)(x), model(x))
