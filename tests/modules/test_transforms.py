"""Compiling, vectorising and differentiating unrolled modules."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

from tests.cases import CHOSEN, KINDS, LAYER_KINDS, PROJECTION, Case, replace
from tests.checks import assert_same, check_vmap_over_inputs, check_vmap_over_weights, gradients
from unroll import unroll

F64 = torch.float64
SHORT = [replace(case, steps=2, batch=2) for case in (Case("LSTM", proj_size=PROJECTION, num_layers=2), Case("GRU"))]
SHORT += [Case("LSTM", bidirectional=True, state=True, steps=2, batch=1), Case("RNN", steps=2, batch=1)]
SHORT += [Case("LSTMCell", state=True, batch=1), Case("GRUCell", state=True, batch=1), Case("RNNCell", batch=1)]

# Inductor and forward derivatives use TorchScript inside, and torch warns of it.
WITH_TORCHSCRIPT = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


COMPILED = [case for case in CHOSEN if case.state or case.proj_size or case.form == "unbatched"]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiles_whole(case):
    layer = case.layer(F64)
    compiled = torch.compile(unroll(layer), fullgraph=True, backend="eager")
    assert_same(compiled(*case.args(F64)), layer(*case.args(F64)))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_compiles_whole_with_backward(kind):
    case = Case(kind, num_layers=2, bidirectional=True, batch_first=True, steps=3)
    model = case.model(F64)
    ours = unroll(model)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*case.tensors(F64)), model(*case.tensors(F64)))
    theirs = gradients(model, case.tensors(F64))
    found = gradients(compiled, case.tensors(F64))
    assert_same({name.removeprefix("_orig_mod."): g for name, g in found.items()}, theirs)


class Mixed(nn.Module):
    """Layers and cells with what models do around them."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(10, 4)
        self.last = nn.RNN(4, self.rnn.hidden_size, batch_first=True)

    def forward(self, x):
        self.rnn.flatten_parameters()
        y, (h, _) = self.rnn(x)
        state, states = None, []
        for t in range(y.shape[1]):
            state = self.cell(y[:, t] * self.rnn.num_layers, state)
            states.append(state)
        return self.last(torch.stack(states, 1))[1] + h[:1]


@pytest.mark.heavy
@WITH_TORCHSCRIPT
def test_compiles_with_inductor():
    model = Mixed()
    compiled = torch.compile(unroll(model), fullgraph=True)
    x = torch.randn(3, 3, 6)
    ours, theirs = compiled(x), model(x)
    assert_same(ours, theirs, rtol=1e-5)
    ours.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    theirs.square().sum().backward()
    assert_same(found, {name: p.grad for name, p in model.named_parameters()}, rtol=1e-5)


def test_explains_itself_without_breaks():
    explanation = torch._dynamo.explain(unroll(Mixed()))(torch.randn(3, 3, 6))
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def test_compiles_in_training_with_dropout():
    ours = unroll(nn.GRU(6, 5, num_layers=2, dropout=0.5))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = torch.randn(4, 3, 6)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    ours.eval()
    assert_same(compiled(x), ours(x), rtol=1e-5)


@WITH_TORCHSCRIPT
@pytest.mark.parametrize(
    ("plan", "backend"),
    [
        ("default", "aot_eager"),
        ("quantize", "aot_eager"),
        ("gates=split", "eager"),
        pytest.param("default", "inductor", marks=pytest.mark.heavy),
    ],
)
def test_compiles_vmap(plan, backend):
    layer = nn.LSTM(6, 5)
    compiled = torch.compile(vmap(unroll(layer, plan=plan)), fullgraph=True, backend=backend)
    xs = torch.randn(3, 4, 2, 6)
    assert_same(compiled(xs)[0], torch.stack([layer(x)[0] for x in xs]), rtol=1e-5)


def test_compiles_under_autocast():
    ours = unroll(nn.LSTM(6, 5))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = compiled(torch.randn(4, 3, 6))
    assert output.dtype == torch.bfloat16


def test_compiles_parametrized_weights():
    layer = nn.utils.parametrizations.weight_norm(nn.GRU(6, 5, dtype=F64), "weight_hh_l0")
    x = torch.randn(4, 3, 6, dtype=F64)
    assert_same(torch.compile(unroll(layer), fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize("case", [Case("LSTM", num_layers=2, bidirectional=True), Case("GRUCell", state=True)], ids=str)
def test_exports(case):
    """With torch.export as it is, and no recurrent operator in the program."""
    model = case.model(F64)
    program = torch.export.export(unroll(model), case.tensors(F64))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(word in target for target in called for word in ("lstm", "gru", "rnn"))
    assert_same(program.module()(*case.tensors(F64)), model(*case.tensors(F64)))


# --- torch.func -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_inputs(kind):
    check_vmap_over_inputs(Case(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_weights(kind):
    check_vmap_over_weights(Case(kind))


def test_gradients_of_each_sample():
    case = Case("LSTM", num_layers=2)
    layer = case.layer(F64)
    ours, (x,) = unroll(layer), case.args(F64)

    def loss(parameters, x):
        return functional_call(ours, parameters, (x[:, None],))[0].square().sum()

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    each = vmap(grad(loss), in_dims=(None, 1))(parameters, x)
    for k in range(x.shape[1]):
        found = torch.autograd.grad(layer(x[:, k : k + 1])[0].square().sum(), list(layer.parameters()))
        assert_same([g[k] for g in each.values()], list(found))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    case = Case(kind)
    layer, other = case.layer(F64), case.layer(F64, seed=9)
    replaced = functional_call(unroll(layer), dict(other.named_parameters()), case.args(F64))
    assert_same(replaced, other(*case.args(F64)))


@WITH_TORCHSCRIPT
def test_forward_derivative_is_the_backward_one():
    case = SHORT[1]
    ours, (x,) = unroll(case.layer(F64)), case.args(F64)
    direction = torch.randn_like(x)
    _, forth = jvp(lambda x: ours(x)[0], (x,), (direction,))
    back = torch.einsum("tbhsif,sif->tbh", jacrev(lambda x: ours(x)[0])(x), direction)
    assert_same(forth, back)


# --- gradients against finite differences -------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_gradcheck(case):
    check(torch.autograd.gradcheck, case)


@pytest.mark.parametrize("case", [SHORT[1], SHORT[2], SHORT[4]], ids=str)
def test_gradgradcheck(case):
    check(torch.autograd.gradgradcheck, case)


def check(how, case):
    ours = unroll(case.model(F64))
    names = [name for name, _ in ours.named_parameters()]
    tensors = case.tensors(F64)

    def function(*values):
        return functional_call(ours, dict(zip(names, values[len(tensors) :], strict=True)), values[: len(tensors)])

    values = [t.detach().clone().requires_grad_() for t in (*tensors, *ours.parameters())]
    assert how(function, values, fast_mode=True)
