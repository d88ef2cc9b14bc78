"""`packing(eager=True)`: models that pack, with their padding, under the transforms of `torch.func`."""

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.cases import PACKED, Case
from tests.checks import assert_same, problems
from unroll import Plan, packing, record, unroll

F64 = torch.float64
LENGTHS = torch.tensor([2, 6, 4])


class Tagger(nn.Module):
    """Packs, runs two layers, and pads; gives the output and the last states."""

    def __init__(self, kind="LSTM", total_length=None, **options):
        super().__init__()
        self.rnn = getattr(nn, kind)(3, 4, 2, bidirectional=True, dtype=F64, **options)
        self.head = nn.Linear(8, 2, dtype=F64)
        self.total_length = total_length

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        packed = PackedSequence(torch.tanh(packed.data), *packed[1:])
        output, state = self.rnn(packed)
        padded, _ = pad_packed_sequence(output, total_length=self.total_length)
        return self.head(padded), state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_results_and_gradients_are_torchs(case):
    model, tensors = case.model(F64), case.tensors(F64)
    with packing(eager=True):
        found = unroll(model)(*tensors)
        gradients = torch.autograd.grad(sum(t.square().sum() for t in found), list(model.parameters()))
    expected = model(*tensors)
    assert_same(found, expected)
    wanted = torch.autograd.grad(sum(t.square().sum() for t in expected), list(model.parameters()))
    assert_same(gradients, wanted)


def loss_of(model):
    """The loss of one sample, of parameters, `x` `[T, F]` and a length: of its own steps alone."""

    def loss(params, x, length):
        output, last = functional_call(model, params, (x[:, None], length[None]))
        own = torch.arange(len(x)) < length
        return (output.square().sum((1, 2)) * own).sum() + last.square().sum()

    return loss


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("plan", [Plan(), Plan(products="linear"), Plan(directions="stacked")], ids=str)
def test_gradients_of_each_sample_with_a_length_of_its_own(kind, plan):
    fused, x = Tagger(kind), torch.randn(6, 3, 3, dtype=F64)
    model = unroll(fused, plan=plan)
    params = {name: p.detach() for name, p in model.named_parameters()}
    with packing(eager=True):
        each = vmap(grad(loss_of(model)), (None, 1, 0))(params, x, LENGTHS)
    names = {id(p): name for name, p in fused.named_parameters()}
    for k, length in enumerate(LENGTHS):
        output, last = fused(x[:length, k : k + 1], length[None])
        fused.zero_grad()
        (output.square().sum() + last.square().sum()).backward()
        found = {names[id(p)]: each[name][k] for name, p in model.named_parameters()}
        assert_same({n: found[n] for n in sorted(found)}, {n: p.grad for n, p in sorted(fused.named_parameters())})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_other_transforms():
    fused, x = Tagger("GRU", total_length=6), torch.randn(6, 3, 3, dtype=F64)
    model, direction = unroll(fused), torch.randn(6, 3, 3, dtype=F64)
    with packing(eager=True):
        forth = jvp(lambda x: model(x, LENGTHS)[1], (x,), (direction,))[1]
        twice = hessian(lambda s: model(x * s, LENGTHS)[1].sum())(torch.ones((), dtype=F64))
    x.requires_grad_()
    last = fused(x, LENGTHS)[1]
    weights = torch.randn_like(last)
    (back,) = torch.autograd.grad((last * weights).sum(), [x])
    assert_same((forth * weights).sum(), (back * direction).sum())
    scale = torch.ones((), dtype=F64, requires_grad=True)
    # torch's packing has derivatives of both orders by autograd
    (once,) = torch.autograd.grad(unroll(fused)(x.detach() * scale, LENGTHS)[1].sum(), [scale], create_graph=True)
    assert_same(twice, torch.autograd.grad(once, [scale])[0])


def test_lengths_that_torch_refuses():
    model, x = unroll(Tagger()), torch.randn(6, 3, 3, dtype=F64)
    params = {name: p.detach() for name, p in model.named_parameters()}
    for lengths in (torch.tensor([0, 6, 4]), torch.tensor([2, 7, 4])):
        with packing(eager=True):
            for function in (
                lambda lengths=lengths: model(x, lengths),
                lambda lengths=lengths: vmap(grad(loss_of(model)), (None, 1, 0))(params, x, lengths),
            ):
                assert "lengths must be from 1 to the number of padded steps" in problems(function)[0]


def test_rows_are_watched():
    class Mixing(Tagger):
        def forward(self, x, lengths):
            return pack_padded_sequence(x, lengths, enforce_sorted=False).data.mean()

    with packing(eager=True):
        assert (
            "is given to mean, which may mix its rows" in problems(unroll(Mixing()), torch.randn(6, 3, 3), LENGTHS)[0]
        )
        layer, packed = nn.GRU(3, 4), pack_padded_sequence(torch.randn(6, 3, 3), LENGTHS, enforce_sorted=False)
        assert "or with eager=True call it" in problems(layer, packed)[0]


def test_only_inside_and_only_in_this_thread():
    model, x, sizes = Tagger(), torch.randn(6, 3, 3, dtype=F64), []

    def rows():
        sizes.append(len(pack_padded_sequence(x, LENGTHS, enforce_sorted=False).data))

    with packing(eager=True):
        rows()
        thread = threading.Thread(target=rows)
        thread.start()
        thread.join()
    rows()
    with packing():
        rows()
    assert sizes == [18, 12, 12, 12]
    assert_same(model(x, LENGTHS), unroll(model)(x, LENGTHS))


def test_graphs_are_made_as_ever():
    model, x = unroll(Tagger("GRU", total_length=6)), torch.randn(6, 3, 3, dtype=F64)
    with packing(eager=True):
        program = torch.export.export(model, (x, LENGTHS))
    other = torch.tensor([1, 3, 6])
    assert_same(program.module()(x, other), model(x, other))


def test_gates_of_padded_rows():
    case = Case("GRU", form="unsorted", bidirectional=True)
    model, tensors = unroll(case.model(F64)), case.tensors(F64)
    with record(model) as packed:
        model(*tensors)
    with packing(eager=True), record(model) as padded:
        model(*tensors)
    assert_same(dict(padded), dict(packed))
