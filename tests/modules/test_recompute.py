"""`Plan(recompute=k)`: blocks of steps that are computed anew in the backward pass."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad
from torch.nn.utils.rnn import pack_padded_sequence

from tests.cases import CHOSEN, PACKED, flat
from tests.checks import assert_same, problems
from unroll import Plan, UnrollError, decompositions, export_onnx, packing, trace, unroll

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

F64 = torch.float64


def gradients(layer, args):
    """Results, and gradients of all that they are computed of."""
    given = [t for t in flat(args) if t.is_floating_point()]
    results = list(flat(layer(*args)))
    total = sum((k + 1) * r.square().sum() for k, r in enumerate(results) if r.is_floating_point())
    wanted = [*given, *layer.parameters()]
    return results, torch.autograd.grad(total, wanted, allow_unused=True)


def inputs(case):
    """Arguments of a layer, all of which gradients go to."""
    args = case.args(F64)
    if case.packed:
        x, lengths, *_ = case.tensors(F64)
        x.requires_grad_()
        args = (pack_padded_sequence(x, lengths, case.batch_first, case.form == "packed"), *args[1:])
    for tensor in flat(args):
        if tensor.is_leaf and tensor.is_floating_point():
            tensor.requires_grad_()
    return args


@pytest.mark.parametrize("block", [1, 3, 9])
@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_results_and_gradients_are_the_same(case, block):
    layer, args = case.layer(F64), inputs(case)
    for products in ("matrix", "sums", "linear"):
        plan = Plan(recompute=block, products=products)
        torch.manual_seed(3)
        found = gradients(unroll(layer, plan=plan), args)
        torch.manual_seed(3)
        expected = gradients(unroll(layer, plan=Plan(products=products)), args)
        order = [id(p) for p in unroll(layer, plan=plan).parameters()]
        assert order == [id(p) for p in unroll(layer, plan=Plan(products=products)).parameters()]
        assert_same(found, expected)


def test_dropout_is_drawn_once():
    layer, x = nn.LSTM(3, 5, 3, dropout=0.5, bidirectional=True), torch.randn(10, 2, 3)
    found = []
    for plan in (Plan(), Plan(recompute=4)):
        unrolled = unroll(layer, plan=plan)
        torch.manual_seed(1)
        output, _ = unrolled(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters())), torch.rand(1)])
    assert_same(found[1], found[0], rtol=1e-5)
    assert torch.equal(found[1][-1], found[0][-1])


class Dropping(nn.Module):
    """A linear map whose input is dropped at random, as adapters have it."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(nn.functional.dropout(x, 0.5))


def test_modules_that_draw_draw_the_same_again():
    layer, x = nn.GRU(3, 5).double(), torch.randn(10, 2, 3, dtype=F64)
    found = []
    for recompute in (10, 3):
        unrolled = unroll(layer, plan=Plan(products="linear", recompute=recompute))
        unrolled.hh_l0 = Dropping(unrolled.hh_l0)
        torch.manual_seed(1)
        output, _ = unrolled(x)
        torch.manual_seed(2)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))])
    assert_same(found[1], found[0])


def kept(run):
    """How many numbers are kept for the backward pass."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its memory would be another's
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(size for size, _ in sizes.values()), result


@pytest.mark.parametrize(("kind", "ratio"), [("LSTM", 10), ("GRU", 10), ("RNN", 2)])
def test_steps_are_not_kept(kind, ratio):
    layer, x = getattr(nn, kind)(3, 16, 2, bidirectional=True), torch.randn(60, 4, 3)
    plain, _ = kept(lambda: unroll(layer)(x))
    # what a checkpoint packs inside goes to its own hooks
    blocks, _ = kept(lambda: unroll(layer, plan="recompute=10")(x))
    assert blocks < plain / ratio


def test_nothing_is_computed_anew_without_gradients():
    layer, x = unroll(nn.GRU(3, 5), plan=Plan(products="linear", recompute=2)), torch.randn(6, 1, 3)
    calls = []
    layer.hh_l0.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        layer(x)
    assert len(calls) == 6
    layer(x)[0].sum().backward()
    assert len(calls) >= 6 + 6 + 5  # the last step of a block is not needed again


@pytest.mark.parametrize("kind", ["LSTM", pytest.param("GRU", marks=pytest.mark.heavy)])
def test_compiled(kind):
    layer, x = getattr(nn, kind)(3, 5, 2, bidirectional=True).double(), torch.randn(7, 2, 3, dtype=F64)
    torch.compiler.reset()
    compiled = torch.compile(unroll(layer, plan=Plan(recompute=3)), backend="aot_eager", fullgraph=True)
    assert_same(gradients(compiled, (x.requires_grad_(),)), gradients(layer, (x,)))


def test_higher_derivatives_and_forward_ones():
    layer = unroll(nn.GRU(3, 4).double(), plan=Plan(recompute=2))
    x = torch.randn(5, 1, 3, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x)[0], x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], x, fast_mode=True)


def test_copies_and_files_keep_it():
    layer, x = unroll(nn.GRU(3, 5), plan="recompute=4"), torch.randn(6, 2, 3)
    assert "recompute=4" in repr(layer)
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), unroll(layer)):
        assert same.plan == Plan(recompute=4)
        assert_same(same(x), layer(x))


def test_padded_rows():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 5, bidirectional=True).double()

        def forward(self, x, lengths):
            packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], total_length=7)[0]

    model = Encoder()
    x, lengths = torch.randn(7, 3, 3, dtype=F64), torch.tensor([2, 7, 5])
    torch.compiler.reset()
    with packing():
        compiled = torch.compile(unroll(model, plan="recompute=3"), backend="aot_eager", fullgraph=True)
        found = gradients(compiled, (x.requires_grad_(), lengths))
    assert_same(found, gradients(model, (x, lengths)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_has_no_backward_pass_refuses(tmp_path):
    model, x = nn.Sequential(nn.GRU(3, 5)), torch.randn(4, 2, 3)
    plan = Plan(recompute=2)
    for function in (
        lambda: unroll(trace(model), x, plan=plan),
        lambda: unroll(torch.export.export(model, (x,)), plan=plan),
        lambda: unroll(torch.jit.trace(model, (x,), check_trace=False), plan=plan),
        lambda: torch.export.export(unroll(model, plan=plan), (x,)),
        lambda: torch.jit.script(unroll(model, plan=plan)),
        lambda: decompositions(plan),
    ):
        assert any("of the backward pass of a module" in problem for problem in problems(function))
    with pytest.raises(UnrollError, match="of the backward pass of a module"):
        export_onnx(model.eval(), x, tmp_path / "model.onnx", plan=plan)
    # without gradients there is nothing to compute anew
    with torch.no_grad():
        program = torch.export.export(unroll(model, plan=plan), (x,))
    assert_same(program.module()(x), model(x), rtol=1e-5)


def test_gradients_of_torch_func_are_refused():
    layer, x = unroll(nn.GRU(3, 5), plan="recompute=2"), torch.randn(4, 2, 3)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    with pytest.raises(UnrollError, match=r"torch.func's gradients with recompute=2"):
        grad(lambda w: functional_call(layer, w, (x,))[0].sum())(weights)


@pytest.mark.parametrize(
    ("choices", "finding"),
    [
        ({"recompute": 0}, "Plan(recompute=...): got 0; choose 'nothing', or the number of steps in a block"),
        ({"recompute": True}, "got True"),
        ({"recompute": "all"}, "got 'all'"),
        ({"recompute": 4, "directions": "stacked"}, "Plan(directions=...): got 'stacked' with recompute=4"),
        ({"recompute": 4, "layers": "wavefront"}, "got 'wavefront' with recompute=4"),
        ({"recompute": 4, "time": 8}, "Plan(time=...): got 8 with recompute=4"),
    ],
)
def test_plans_that_are_refused(choices, finding):
    (problem,) = problems(lambda: Plan(**choices))
    assert finding in problem
