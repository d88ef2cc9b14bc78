"""Unrolling inside `torch.compile`."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import fx, nn
from torch._inductor.utils import run_and_get_code
from torch.nn.utils import rnn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import unroll as library
from tests.cases import DROPOUT, PACKED, Case
from tests.checks import assert_same
from unroll import Plan, UnrollError, compare
from unroll.core import rows
from unroll.graphs import dynamo
from unroll.graphs.calls import form_of

F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    assert torch._dynamo.config.allow_rnn is False
    torch._dynamo.reset()


class Seen:
    """A backend that runs graphs as they are and remembers them."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward

    @property
    def recurrent(self) -> list[fx.Node]:
        return [node for graph in self.graphs for node in graph.graph.nodes if form_of(node)]


@pytest.mark.parametrize(
    "case", [Case("LSTM", num_layers=2, bidirectional=True), Case("GRU", state=True), Case("RNNCell")], ids=str
)
def test_an_unchanged_model_compiles_as_one_graph(case):
    model, seen = case.model(F64), Seen()
    compiled = library.compile(model, backend=seen)
    compare(model, compiled, case.tensors(F64)).check()
    assert len(seen.graphs) == 1
    assert not seen.recurrent
    assert compiled.state_dict().keys() == {f"_orig_mod.{key}" for key in model.state_dict()}


@pytest.mark.parametrize("case", DROPOUT[:2], ids=str)
def test_training(case):
    model = case.model(F64).train()
    compiled = library.compile(model, backend="aot_eager")
    args = case.tensors(F64)
    expected, found = [], []
    for function, gradients in ((model, expected), (compiled, found)):
        torch.manual_seed(3)
        model.zero_grad()
        sum(t.sum() for t in function(*args)).backward()
        gradients += [p.grad.clone() for p in model.parameters()]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_inductor():
    case = Case("LSTM", steps=3)
    model = case.model()
    compare(model, library.compile(model, plan=Plan("paired")), case.tensors()).check()


def test_each_length_is_a_graph_of_its_own_and_stays_compiled():
    model, seen = nn.GRU(6, 5).double(), Seen()
    compiled = library.compile(model, backend=seen)
    for steps in (4, 4, 5, 6, 6, 4):
        compare(model, compiled, (torch.randn(steps, 2, 6, dtype=F64),)).check()
    assert 2 <= len(seen.graphs) <= 3


def test_where_and_plan_reach_the_graph():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.GRU(6, 5), nn.GRU(5, 4)

        def forward(self, x):
            return self.second(self.first(x)[0])[0]

    model, seen = Two().double(), Seen()
    compiled = library.compile(model, backend=seen, where="first", plan=Plan("split"))
    compare(model, compiled, (torch.randn(3, 2, 6, dtype=F64),)).check()
    assert [node.name for node in seen.recurrent] == ["gru_1"] or len(seen.recurrent) == 1
    names = [node.name for node in seen.graphs[0].graph.nodes]
    assert any(name.startswith("first_l0_t2_") for name in names)
    assert sum(name.startswith("first_l0_t2_addmm") for name in names) == 3


def test_a_function_compiles_too():
    layer, seen = nn.LSTM(6, 5).double(), Seen()
    compiled = library.compile(lambda x: layer(x)[1][0] * 2, backend=seen)
    x = torch.randn(3, 2, 6, dtype=F64)
    torch.testing.assert_close(compiled(x), layer(x)[1][0] * 2, rtol=1e-9, atol=1e-12)
    assert not seen.recurrent


def test_the_registered_name_with_options():
    assert "unroll" in torch.compiler.list_backends()
    case, seen = Case("LSTM", num_layers=2), Seen()
    model = case.model(F64)
    options = {"backend": seen, "plan": Plan("paired")}
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, backend="unroll", options=options, fullgraph=True)
        compare(model, compiled, case.tensors(F64)).check()
    assert seen.graphs
    assert not seen.recurrent


@pytest.mark.parametrize("shown", [True, False])
def test_the_name_warns_where_it_is_first_looked_up(shown):
    """Dynamo would call no backend for a layer that it hides; torch's registry asks for the name once in a process."""
    code = f"""
import torch
from torch import nn
torch._dynamo.config.allow_rnn = {shown}
layer, x = nn.GRU(3, 4), torch.zeros(5, 2, 3)
for _ in range(2):
    torch.compile(layer, backend="unroll", options={{"backend": "eager"}})(x)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = 'UnrollWarning: torch.compile(backend="unroll"): Dynamo keeps nn.LSTM'
    assert done.stderr.count(told) == (0 if shown else 1)
    assert shown or "use unroll.compile(model)" in done.stderr


@pytest.mark.filterwarnings("ignore:torch.compile.backend=.unroll:unroll.UnrollWarning")
def test_the_plain_name_says_what_to_do():
    with pytest.raises(Exception, match=r"use unroll.compile\(model\)") as caught:
        torch.compile(nn.GRUCell(6, 5), backend="unroll")(torch.randn(2, 6))
    assert isinstance(caught.value.inner_exception, UnrollError)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_refusals_keep_their_words(fullgraph):
    compiled = torch.compile(library.unroll(nn.GRU(3, 4)), backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match="its last size must be input_size=3") as caught:
        compiled(torch.ones(5, 2, 6))
    assert fullgraph or isinstance(caught.value, UnrollError)


def test_unknown_options_are_refused():
    with (
        torch._dynamo.config.patch(allow_rnn=True),
        pytest.raises(Exception, match="has speed, unknown to the backend"),
    ):
        torch.compile(nn.GRUCell(6, 5), backend="unroll", options={"speed": 1})(torch.randn(2, 6))


def test_packed_sequences_break_the_graph_and_agree():
    case = PACKED[0]
    model = case.model(F64)
    compiled = library.compile(model, backend=Seen(), fullgraph=False)
    compare(model, compiled, case.tensors(F64)).check()


def _kernels(model: nn.Module, *args: torch.Tensor) -> int:
    """How many kernels Inductor compiles for a model on a CPU."""
    torch._dynamo.reset()
    with torch.no_grad():
        result, (code,) = run_and_get_code(library.compile(model), *args)
        assert_same(result, model(*args), 1e-5)
    return code.count("async_compile.cpp")


@pytest.mark.parametrize(
    "model",
    [nn.GRU(3, 4), library.unroll(nn.GRU(3, 4)), library.unroll(nn.LSTM(3, 4), plan="products=sums")],
    ids=["by the backend", "module", "sums"],
)
def test_no_step_has_a_kernel_of_its_own(model, monkeypatch):
    monkeypatch.setattr(rows, "STEPS_PER_COPY", 2)
    few, more = (_kernels(model, torch.randn(steps, 2, 3)) for steps in (5, 9))
    assert 0 < more <= few


def test_no_step_of_packed_rows_has_a_kernel_of_its_own(monkeypatch):
    monkeypatch.setattr(rows, "STEPS_PER_COPY", 2)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return pad_packed_sequence(self.lstm(packed)[0], total_length=len(x))[0]

    few, more = (_kernels(Packed(), torch.randn(steps, 2, 3), torch.tensor([steps, 3])) for steps in (5, 9))
    assert 0 < more <= few + 1


def test_torch_is_changed_while_dynamo_compiles_and_not_when_the_result_is_called():
    compiling, calling, before = [], [], (nn.GRU.forward, rnn._VF, torch._dynamo.config.allow_rnn)

    def now():
        return nn.GRU.forward, rnn._VF, torch._dynamo.config.allow_rnn

    def backend(graph, inputs):
        compiling.append(now())
        return lambda *args: [calling.append(now()), graph(*args)][1]

    compiled = library.compile(nn.GRU(3, 4), backend=backend)
    for _ in range(3):
        compiled(torch.zeros(2, 1, 3))
    assert len(compiling) == 1 and not any(a is b for a, b in zip(compiling[0], before, strict=True))
    assert calling == [before] * 3


def test_what_changes_in_the_original_reaches_the_compiled():
    model = nn.Sequential(nn.LSTM(3, 4, num_layers=2, dropout=0.9))
    compiled, x = library.compile(model, backend="aot_eager"), torch.randn(5, 2, 3)
    model.eval()
    assert torch.allclose(compiled(x)[0], model(x)[0], atol=1e-6)
    model.train()
    assert not torch.allclose(compiled(x)[0], compiled(x)[0])
    model.eval()
    with torch.no_grad():
        model[0].weight_ih_l0.mul_(2)
    assert torch.allclose(compiled(x)[0], model(x)[0], atol=1e-6)
    model[0].weight_hh_l1 = nn.Parameter(torch.randn(16, 4))
    assert torch.allclose(compiled(x)[0], model(x)[0], atol=1e-6)
    model.load_state_dict(nn.Sequential(nn.LSTM(3, 4, num_layers=2)).state_dict())
    assert torch.allclose(compiled(x)[0], model(x)[0], atol=1e-6)


class Settings:
    scale = 2.0


def scaled(settings):
    def decorate(function):
        def forward(self, x):
            return function(self, x) * settings.scale

        return forward

    return decorate


def test_what_the_models_own_closures_hold_still_reaches_it():
    settings = Settings()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)

        @scaled(settings)
        def forward(self, x):
            return self.lstm(x)[0]

    model, x = Model().eval(), torch.randn(5, 2, 3)
    compiled = library.compile(model, backend="eager")
    with torch.no_grad():
        for scale in (2.0, 5.0):
            settings.scale = scale
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, pytest.param(nn.GRU, marks=pytest.mark.heavy)])
def test_more_lengths_than_dynamo_compiles_for(kind):
    torch._dynamo.reset()
    model = nn.Sequential(kind(3, 5)).eval()
    compiled = library.compile(model, backend="eager")
    with torch.no_grad():
        for steps in range(1, 9):
            compiled(torch.randn(steps, 2, 3))
        with pytest.raises(UnrollError, match=r"^unroll.compile: has been compiled 8 times.*plan=Plan\(time=16\)"):
            compiled(torch.randn(9, 2, 3))
        torch._dynamo.reset()
        compiled = library.compile(model, backend="eager", plan=Plan(time=16))
        for steps in range(1, 12):
            x = torch.randn(steps, 2, 3)
            torch.testing.assert_close(compiled(x)[0], model(x)[0])


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "fast"}, "is no mode of Inductor; choose one of default, .*reduce-overhead"),
        ({"mode": "default", "options": {}}, "is of Inductor, and in place of options"),
        ({"mode": "default", "backend": "eager"}, "is of Inductor, and in place of options"),
    ],
    ids=str,
)
def test_modes_that_are_refused(options, message):
    with pytest.raises(UnrollError, match=message):
        library.compile(nn.GRU(3, 5), **options)


@pytest.mark.parametrize(
    ("asked", "on_cuda", "mode"),
    [
        ({}, True, "reduce-overhead"),
        ({}, False, None),
        ({"mode": "default"}, True, "default"),
        ({"options": {}}, True, None),
        ({"backend": "eager"}, True, None),
    ],
    ids=str,
)
def test_cuda_graphs_are_taken_on_a_gpu_alone(asked, on_cuda, mode, monkeypatch):
    torch.compiler.reset()
    given = []

    def note(graph, inputs, *, options):
        given.append(options.get("mode"))
        return graph.forward

    monkeypatch.setattr(dynamo, "_on_cuda", lambda inputs: on_cuda)
    monkeypatch.setattr(dynamo, "unroll_backend", note)
    library.compile(nn.Linear(3, 5), **asked)(torch.zeros(2, 3))
    assert given == [mode]
