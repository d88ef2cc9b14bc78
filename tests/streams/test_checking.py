"""What looks along time besides the layers gives other results in pieces: it is refused by name, on the example."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.checks import assert_equal, problems
from unroll import Stream, UnrollError, UnrollWarning, streaming, trace


class Model(nn.Module):
    """A GRU, `[B, T, 4]` to `[B, T, 4]`, and what `run` does around it."""

    def __init__(self, run, **modules):
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, x)


def over_time(part, x):
    return part(x.transpose(1, 2)).transpose(1, 2)


def delayed(x):
    return functional.pad(x, (0, 0, 2, 0))


def shifted(x):
    y = x.clone()
    y[:, 1:] += x[:, :-1]
    return y


FIRST = {"batch_first": True}

LOOKING = {
    "convolution before": (
        lambda: Model(lambda m, x: m.rnn(over_time(m.conv, x))[0], conv=nn.Conv1d(4, 4, 3, padding=1)),
        "conv: looks 1 step ahead and 1 step back (conv1d); ",
    ),
    "convolution after": (
        lambda: Model(lambda m, x: over_time(m.conv, m.rnn(x)[0]), conv=nn.Conv1d(4, 4, 5, padding=2)),
        "conv: looks 2 steps ahead and 2 steps back (conv1d); ",
    ),
    "causal convolution": (
        lambda: Model(lambda m, x: m.rnn(over_time(m.conv, delayed(x)))[0], conv=nn.Conv1d(4, 4, 3)),
        "conv: looks 2 steps back (conv1d); ",
    ),
    "convolution without padding": (
        lambda: Model(lambda m, x: m.rnn(over_time(m.conv, x))[0], conv=nn.Conv1d(4, 4, 3)),
        "conv: gives 6 steps for the whole, 4 in pieces (conv1d); ",
    ),
    "attention": (
        lambda: Model(lambda m, x: m.rnn(m.attend(x, x, x)[0])[0], attend=nn.MultiheadAttention(4, 2, **FIRST)),
        "attend: looks at least 5 steps ahead and at least 3 steps back (multi_head_attention_forward); ",
    ),
    "transformer": (
        lambda: Model(lambda m, x: m.rnn(m.enc(x))[0], enc=nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)),
        "enc.self_attn: looks at least 5 steps ahead",
    ),
    "norm": (
        lambda: Model(lambda m, x: m.rnn(over_time(m.norm, x))[0], norm=nn.InstanceNorm1d(4)),
        "norm: looks at least 5 steps ahead and at least 3 steps back (instance_norm); ",
    ),
    "flip": (lambda: Model(lambda m, x: m.rnn(x.flip(1))[0]), "Model: looks at least 5 steps ahead"),
    "cumsum": (lambda: Model(lambda m, x: m.rnn(x.cumsum(1))[0]), "Model: looks at least 3 steps back (cumsum); "),
    "mean": (
        lambda: Model(lambda m, x: m.rnn(x - x.mean(1, keepdim=True))[0]),
        "Model: gives another result for a piece than for the whole (mean); ",
    ),
    "mean of the outputs": (lambda: Model(lambda m, x: m.rnn(x)[0].mean(1)), "Model: gives another result for a piece"),
    "positions": (
        lambda: Model(lambda m, x: m.rnn(x + torch.arange(x.shape[1])[:, None])[0]),
        "Model: looks at least 3 steps back (arange); ",
    ),
    "written in place": (lambda: Model(lambda m, x: m.rnn(shifted(x))[0]), "Model: looks 1 step back (setitem); "),
    "first step": (lambda: Model(lambda m, x: m.rnn(x)[0][:, 0]), "Model: gives another result for a piece"),
    "another layer's zeros": (
        lambda: Model(lambda m, x: m.rnn(m.own(x, x.new_zeros(1, len(x), 4))[0])[0], own=nn.GRU(4, 4, **FIRST)),
        "own: looks at least 3 steps back",
    ),
}


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_looks_along_time_is_refused_by_name(name, dtype):
    make, expected = LOOKING[name]
    model, x = make().to(dtype), torch.randn(2, 8, 4, dtype=dtype)
    (refused,) = problems(streaming, model, x)
    assert refused.startswith(expected) and refused.endswith("and check=False")
    assert list(streaming(model, x, check=False).initial_state()) == ["rnn.h"]


def test_an_example_of_equal_numbers_is_replaced():
    """Zeros would show nothing, whatever their type."""
    model = Model(
        lambda m, x: m.rnn(over_time(m.conv, x.to(torch.float32)))[0], conv=nn.Conv1d(4, 4, 3, padding=1, bias=False)
    )
    for dtype in (torch.bool, torch.int64, torch.float32):
        (refused,) = problems(streaming, model, torch.zeros(2, 8, 4, dtype=dtype))
        assert refused.startswith("conv: looks 1 step ahead and 1 step back")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", [name for name in LOOKING if name != "convolution without padding"])
def test_short_examples_are_repeated(name, steps):
    """Steps that are equal would show neither flip nor mean, and zeros nothing."""
    model = LOOKING[name][0]()
    if name == "norm":  # torch refuses one step
        steps = 2
    for x in (torch.randn(2, steps, 4), torch.zeros(1, steps, 4)):
        assert problems(streaming, model, x)


@pytest.mark.parametrize("name", ["convolution before", "causal convolution", "norm", "flip", "mean", "cumsum"])
def test_graphs_and_programs(name):
    model, x = LOOKING[name][0]().eval(), torch.randn(2, 8, 4)
    looks = LOOKING[name][1].partition(": ")[2].partition(" (")[0]
    graph, program = trace(model), torch.export.export(model, (x,))
    for refused in (problems(streaming, graph, x), problems(streaming, program)):
        assert looks in refused[0] or refused[0].startswith("pad: gives 10 steps for the whole, 12 in pieces")
    assert list(Stream(streaming(graph, x, check=False)).state) == ["rnn.h"]


def test_programs_of_one_fixed_length():
    """Attention has its sizes written in: such a program cannot be run in pieces."""
    model, x = LOOKING["attention"][0]().eval(), torch.randn(2, 8, 4)
    program = torch.export.export(model, (x,))
    with pytest.warns(UnrollWarning, match=r"nothing was checked.*pass check=False") as caught:
        streaming(program)
    assert caught[0].filename == __file__
    with pytest.warns(UnrollWarning, match="no example inputs"):
        streaming(graph_with_metadata(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streaming(program, check=False)
        warnings.filterwarnings("ignore", "The tensor attributes")
        streaming(torch.export.export(nn.Sequential(nn.GRU(4, 4)), (x,)))


def graph_with_metadata(x):
    from torch.fx.experimental.proxy_tensor import make_fx

    model = nn.Sequential(nn.GRU(4, 4))
    return make_fx(lambda x: model(x)[0], tracing_mode="real", pre_dispatch=True)(x)


def test_what_is_drawn_is_not_compared():
    x = torch.randn(2, 8, 4)
    dropped = Model(lambda m, x: m.rnn(m.drop(x))[0], drop=nn.Dropout(0.5))
    assert dropped.training and streaming(dropped, x).training
    always = Model(lambda m, x: m.rnn(functional.dropout(x, 0.5, training=True))[0])
    with pytest.warns(UnrollWarning, match="draws random numbers in evaluation mode too"):
        streaming(always, x)


class Counting(nn.Module):
    """A model that writes to its buffers, and keeps its last state in one."""

    def __init__(self):
        super().__init__()
        self.rnn, self.norm = nn.GRU(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1, 2, 4))

    def forward(self, x):
        self.seen += len(x)
        y, last = self.rnn(self.norm(x.transpose(1, 2)).transpose(1, 2))
        self.last.copy_(last)
        return y + 0 * self.last


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_changed_by_the_check(training):
    model, x = Counting().train(training), torch.randn(8, 2, 4)
    before, given, random = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    streamed = streaming(model, x)
    assert_equal(dict(model.state_dict()), dict(before))
    assert torch.equal(x, given) and torch.equal(torch.get_rng_state(), random)
    assert all(part.training is training for part in (*model.modules(), *streamed.modules()))
    looking = LOOKING["flip"][0]().train(training)
    random = torch.get_rng_state()
    with pytest.raises(UnrollError):
        streaming(looking, x)
    assert torch.equal(torch.get_rng_state(), random)


def test_which_dimension_is_time():
    """As many rows as steps, a mask beside the input, features before time, and samples that make up steps."""
    square, x = Model(lambda m, x: m.rnn(x)[0]), torch.randn(4, 4, 4)
    streaming(square, x)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.conv = nn.GRU(4, 4, batch_first=True), nn.Conv1d(1, 4, 10, 10)

        def forward(self, x, audio, *, mask):
            return self.rnn((x + self.conv(audio).transpose(1, 2)) * mask[..., None])[0]

    args = torch.randn(2, 6, 4), torch.randn(2, 1, 60)
    streaming(Masked(), args, kwargs={"mask": torch.ones(2, 6)})
    looking = Model(lambda m, x: m.rnn(x.cumsum(1))[0])
    assert problems(streaming, looking, x)


def test_layers_that_run_over_another_dimension():
    def run(m, x):  # [B, T, K, 4]
        b, t, k, _ = x.shape
        y = m.frequency(x.reshape(b * t, k, 4))[0].reshape(b, t, k, 4).transpose(1, 2)
        return m.rnn(y.reshape(b * k, t, 4))[0]

    model, x = Model(run, frequency=nn.GRU(4, 4, batch_first=True)), torch.randn(2, 8, 3, 4)
    (refused,) = problems(streaming, model, x)
    assert refused.startswith("frequency.h: has shape [1, 16, 4] for the example and [1, 10, 4] for a piece of it")
    streaming(model, x, where="rnn")


def test_results_of_every_form():
    """Lists of steps, dictionaries, the last step, and numbers."""

    def run(m, x):
        y = m.rnn(x)[0]
        return {"steps": list(y.unbind(1)), "last": y[:, -1], "count": x.shape[1], "kind": "gru"}

    streaming(Model(run), torch.randn(2, 8, 4))
    (refused,) = problems(streaming, Model(lambda m, x: (m.rnn(x)[0], x.shape[1] ** 2)), torch.randn(2, 8, 4))
    assert refused.startswith("output[1]: is 25 and 9 in pieces, 64 for the whole")


def test_an_option_of_two_values():
    (refused,) = problems(streaming, nn.GRU(4, 4), torch.randn(8, 2, 4), check="yes")
    assert refused == "streaming(check='yes'): is neither True nor False; give one of them"


def test_a_rule_for_the_whole_model():
    class Own(nn.Module):
        pass

    stand_in = nn.Sequential(nn.GRU(4, 4))
    streamed = streaming(Own(), torch.randn(8, 2, 4), rules={Own: lambda _: stand_in})
    assert list(streamed.initial_state()) == ["0.h"]
