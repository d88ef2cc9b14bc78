"""TorchScript both ways: script modules unrolled, and unrolled modules scripted and traced."""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from tests.cases import CHOSEN, DROPOUT, EMPTY, LAYER_KINDS, PACKED, PLANS, Case, replace
from tests.checks import assert_equal, assert_same, gradients
from unroll import Plan, UnrollError, unroll
from unroll.core.recurrence import CELL_MODES, read_cell, read_layer
from unroll.torchscript.calls import find_calls

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
F64 = torch.float64
OPERATORS = {f"aten::{kind}{cell}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")}


class Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer

    def forward(self, input: Tensor):
        return self.rnn(input)


class WithState(Alone):
    def forward(self, input: Tensor, hx: Tensor):
        return self.rnn(input, hx)


class WithPair(Alone):
    def forward(self, input: Tensor, h: Tensor, c: Tensor):
        return self.rnn(input, (h, c))


class Packed(Alone):
    def __init__(self, layer: nn.Module, case: Case) -> None:
        super().__init__(layer)
        self.batch_first, self.sorted = case.batch_first, case.form == "packed"

    def forward(self, input: Tensor, lengths: Tensor):
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=self.sorted)
        output, state = self.rnn(packed)
        return pad_packed_sequence(output, self.batch_first)[0], state


class PackedWithState(Packed):
    def forward(self, input: Tensor, lengths: Tensor, hx: Tensor):
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=self.sorted)
        output, state = self.rnn(packed, hx)
        return pad_packed_sequence(output, self.batch_first)[0], state


class PackedWithPair(Packed):
    def forward(self, input: Tensor, lengths: Tensor, h: Tensor, c: Tensor):
        packed = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=self.sorted)
        output, state = self.rnn(packed, (h, c))
        return pad_packed_sequence(output, self.batch_first)[0], state


def model_of(case: Case, dtype: torch.dtype = F64) -> nn.Module:
    """The layer of a case inside a module that TorchScript can compile."""
    states = case.state * (1 + case.kind.startswith("LSTM"))
    if case.packed:
        return (Packed, PackedWithState, PackedWithPair)[states](case.layer(dtype), case)
    return (Alone, WithState, WithPair)[states](case.layer(dtype))


@functools.cache
def script_of(case: Case) -> torch.jit.ScriptModule:
    """The model of a case, compiled once for all tests that only read and run it."""
    return torch.jit.script(model_of(case))


@functools.cache
def frozen_script_of(case: Case) -> torch.jit.ScriptModule:
    return torch.jit.freeze(torch.jit.script(model_of(case).eval()))


def scripted(case: Case, args: tuple):
    return script_of(case)


def traced(case: Case, args: tuple):
    return torch.jit.trace(model_of(case), args)


def frozen(case: Case, args: tuple):
    return frozen_script_of(case)


def loaded(case: Case, args: tuple):
    return reloaded(script_of(case))


def frozen_and_loaded(case: Case, args: tuple):
    return reloaded(frozen(case, args))


FORMS = [scripted, traced, frozen, loaded, frozen_and_loaded]


def reloaded(module):
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def kinds(block):
    for node in block.nodes():
        yield node.kind()
        for inner in node.blocks():
            yield from kinds(inner)


def operators(module) -> list[str]:
    """The kinds of all nodes in all methods of all submodules, calls inlined."""
    methods = [m._c._get_method(name) for m in module.modules() for name in m._c._method_names()]
    return [kind for method in methods for kind in kinds(method.inlined_graph)]


def assert_unrolled(module) -> None:
    assert not OPERATORS & set(operators(module))


# --- script modules unrolled ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_result_is_torchs(case, form):
    args = case.tensors(F64)
    module = form(case, args)
    result = unroll(module)
    assert_unrolled(result)
    assert isinstance(result, torch.jit.ScriptModule)
    assert_same(result(*args), module(*args))
    assert not OPERATORS & set(kinds(result.graph_for(*args)))  # the graph that ran
    assert_same(reloaded(result)(*args), module(*args))


@pytest.mark.parametrize("case", [*CHOSEN, *EMPTY], ids=str)
def test_any_length_and_batch_size(case):
    module = script_of(case)
    result = unroll(module)
    for steps in (1, 3, 9):
        for batch in (0, 1, 5):
            args = replace(case, steps=steps, batch=batch).tensors(F64)
            assert_same(result(*args), module(*args))


@pytest.mark.parametrize("form", [scripted, frozen, loaded])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_of_any_length(case, form):
    module = form(case, case.tensors(F64))
    result = unroll(module)
    assert_unrolled(result)
    for steps in (1, 4, 7):
        args = replace(case, steps=steps).tensors(F64)
        assert_same(result(*args), module(*args))
    assert not OPERATORS & set(kinds(result.graph_for(*args)))


@pytest.mark.parametrize("case", [case for case in CHOSEN if not case.is_cell], ids=str)
def test_explicit_steps_are_free_of_loops_and_hold_for_one_length(case):
    args = case.tensors(F64)
    module = script_of(case)
    by_args, by_number = unroll(module, args), unroll(module, steps=case.steps)
    assert by_args.code == by_number.code
    assert "prim::Loop" in kinds(unroll(module).inlined_graph)
    assert "prim::Loop" not in kinds(by_args.inlined_graph)
    for batch in (0, 1, 5):
        args = replace(case, batch=batch).tensors(F64)
        assert_same(by_args(*args), module(*args))
    with pytest.raises(
        torch.jit.Error, match=f"rnn: the input has {case.steps + 2} time steps, unrolled were {case.steps}"
    ):
        by_args(*replace(case, steps=case.steps + 2).tensors(F64))


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("case", [case for case in CHOSEN if not case.is_cell], ids=str)
def test_blocks_of_steps(case, block):
    module = script_of(case)
    result = unroll(module, plan=Plan(time=block))
    loops = list(kinds(result.inlined_graph)).count("prim::Loop")
    assert loops == case.num_layers * (1 + case.bidirectional) * (2 if block > 1 else 1)
    for steps in range(1, 2 * block + 2):
        args = replace(case, steps=steps, batch=steps % 3).tensors(F64)
        assert_same(result(*args), module(*args))
    assert_same(gradients(result, args), gradients(module, args))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_packed_sequences_take_no_blocks(case):
    module = script_of(case)
    blocks = unroll(module, plan=Plan(time=3))
    for steps in (1, 4, 7):
        args = replace(case, steps=steps).tensors(F64)
        assert_same(blocks(*args), module(*args))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_blocks_of_known_steps(kind):
    case = Case(kind, bidirectional=True, steps=1000)
    module = torch.jit.script(model_of(case))
    args = case.tensors(F64)
    by_args, open_ = unroll(module, args, plan=Plan(time=16)), unroll(module, plan=Plan(time=16))
    assert_same(by_args(*args), module(*args))
    assert len(operators(by_args)) <= len(operators(open_)) + 20
    with pytest.raises(torch.jit.Error, match="has 7 time steps, unrolled were 1000"):
        by_args(*replace(case, steps=7).tensors(F64))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", [case for case in CHOSEN if not case.is_cell], ids=str)
def test_scripting_and_tracing_a_layer_in_blocks(case):
    model = case.model(F64)
    layer = unroll(model, plan=Plan(time=3))
    modules = [(torch.jit.script(layer.rnn), model.rnn), (torch.jit.trace(layer, case.tensors(F64)), model)]
    for steps in (1, 2, 3, 7):
        other = replace(case, steps=steps, batch=2)
        for module, original in modules:
            args = other.args(F64) if original is model.rnn else other.tensors(F64)
            assert_same(module(*args), original(*args))


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell"])
def test_every_plan(kind, plan):
    case = Case(kind, state=True)
    module = script_of(case)
    assert_same(unroll(module, plan=plan)(*case.tensors(F64)), module(*case.tensors(F64)))


def test_plans_differ():
    module = torch.jit.script(Alone(nn.LSTM(3, 5)))
    merged, split = (unroll(module, plan=Plan(gates=gates)) for gates in ("merged", "split"))
    assert operators(split).count("aten::addmm") > operators(merged).count("aten::addmm")


@pytest.mark.parametrize("case", [*CHOSEN, *PACKED], ids=str)
def test_the_readers_agree(case):
    layer = case.layer(F64)
    kind = getattr(nn, case.kind)
    expected = read_cell(layer, CELL_MODES[kind]) if case.is_cell else read_layer(layer)
    for module in (script_of(case), frozen(case, ())):
        calls = find_calls(module)
        assert any(call.packed == case.packed for call in calls)
        for call in calls:
            # A packed sequence has been put in order of time before.
            same = replace(expected, batch_first=False) if call.packed else expected
            assert call.read(None)[0] == same


@pytest.mark.parametrize("case", DROPOUT, ids=str)
@pytest.mark.parametrize("steps", [None, 4])
def test_dropout_draws_as_torch_and_follows_train_and_eval(case, steps):
    module = torch.jit.script(model_of(case))
    result = unroll(module, steps=steps)
    args = case.tensors(F64)
    results = []
    for mode in (True, False, True):
        for m in (module, result):
            torch.manual_seed(0)
            results.append(m.train(mode)(*args))
        assert_same(results[-1], results[-2])
    assert_equal(results[1], results[5])
    assert not torch.equal(results[1][0], results[3][0])


@pytest.mark.parametrize("steps", [None, 4])
@pytest.mark.parametrize("case", [c for c in CHOSEN if c.num_layers > 1 or c.state], ids=str)
def test_gradients_are_torchs(case, steps):
    module = script_of(case)
    result = unroll(module, steps=None if case.is_cell or case.steps != 4 else steps)
    args = case.tensors(F64)
    assert_same(gradients(result, args), gradients(module, args))


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_gradients_of_packed_sequences_are_torchs(case):
    module = script_of(case)
    assert_same(gradients(unroll(module), case.tensors(F64)), gradients(module, case.tensors(F64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_lower_precision_is_no_worse_than_torchs(kind, dtype):
    case = Case(kind, num_layers=2, bidirectional=True, steps=20)
    exact = model_of(case)(*case.tensors(F64))[0]
    module = torch.jit.script(model_of(case, dtype))
    args = case.tensors(dtype)
    for result in (unroll(module), torch.jit.script(unroll(model_of(case, dtype)))):
        ours, theirs = result(*args)[0], module(*args)[0]
        assert ours.dtype == dtype
        limit = 2 * (theirs.double() - exact).abs().max() + torch.finfo(dtype).eps
        assert (ours.double() - exact).abs().max() <= limit


def test_parameters_are_shared_and_the_original_is_as_it_was():
    module = torch.jit.script(Alone(nn.LSTM(3, 5, 2)))
    before = str(module.inlined_graph)
    result = unroll(module)
    assert str(module.inlined_graph) == before
    assert list(result.state_dict()) == list(module.state_dict())
    assert all(ours is theirs for ours, theirs in zip(result.parameters(), module.parameters(), strict=True))
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        module.rnn.weight_hh_l1.mul_(2)
    assert_same(result(x), module(x), rtol=1e-5)
    optimizer = torch.optim.SGD(result.parameters(), lr=0.5)
    result(x)[0].sum().backward()
    optimizer.step()
    assert_same(result(x), module(x), rtol=1e-5)
    result.load_state_dict({name: torch.zeros_like(value) for name, value in result.state_dict().items()})
    assert not module(x)[0].any() and not result(x)[0].any()


def test_moving_and_casting_the_result():
    case = Case("GRU", num_layers=2)
    module = torch.jit.script(model_of(case, torch.float32))
    assert_same(unroll(module).double()(*case.tensors(F64)), module.double()(*case.tensors(F64)))


@pytest.mark.parametrize("form", [scripted, frozen])
def test_unrolling_twice_changes_nothing_more(form):
    case = Case("LSTM", num_layers=2, bidirectional=True)
    once = unroll(form(case, case.tensors(F64)))
    twice = unroll(once)
    assert operators(twice) == operators(reloaded(once))
    assert_equal(twice(*case.tensors(F64)), once(*case.tensors(F64)))
    assert_equal(unroll(once, where="rnn" if form is scripted else None)(*case.tensors(F64)), once(*case.tensors(F64)))


def test_freezing_the_result():
    case = Case("LSTM", num_layers=2, dropout=0.5)
    module = torch.jit.script(model_of(case).eval())
    result = torch.jit.freeze(unroll(module))
    assert not list(result.parameters())
    assert_same(result(*case.tensors(F64)), module(*case.tensors(F64)))


def test_frozen_weights_are_laid_out_once():
    """Transposes and sums of constant weights are constants themselves."""
    case = Case("LSTM")
    assert "aten::transpose" not in operators(unroll(frozen(case, ())))
    assert "aten::transpose" in operators(unroll(scripted(case, ())))


# --- control flow ---------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """A layer called twice, one in a branch, one in a loop over chunks until the data says stop, and a cell."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(3, 4, batch_first=True, bidirectional=True)
        self.deep = nn.GRU(8, 8, num_layers=2, dropout=0.3)
        self.chunks = nn.LSTM(8, 8)
        self.cell = nn.GRUCell(8, 6)

    def forward(self, x: Tensor, limit: float):
        y, (h, _c) = self.first(x)
        y = y + self.first(x.flip(1), (h, h))[0]
        if bool(y.sum() > 0):
            y = self.deep(y)[0]
        state = (y.new_zeros(1, y.size(1), 8), y.new_zeros(1, y.size(1), 8))
        t = 0
        pieces: list[Tensor] = []
        while t < y.size(0) and float(state[0].detach().abs().sum()) < limit:
            piece, state = self.chunks(y[t : t + 2], state)
            pieces.append(piece)
            t += 2
        y = torch.cat(pieces)
        h = y.new_zeros(y.size(1), 6)
        for step in y.unbind(0):
            h = self.cell(step, h)
        return y, h, len(pieces)


@pytest.mark.parametrize("way", ["unrolled", "scripted"])
def test_control_flow_survives(way):
    torch.manual_seed(0)
    model = Branching().double()
    module = torch.jit.script(model)
    result = unroll(module) if way == "unrolled" else torch.jit.script(unroll(model))
    assert_unrolled(result)
    counts = set()
    for batch, steps in ((2, 3), (5, 1), (7, 6), (4, 2)):
        for sign in (1, -1):
            for limit in (0.1, 1e9):
                x = sign * torch.rand(batch, steps, 3, dtype=F64)
                torch.manual_seed(1)
                expected = module(x, limit)
                torch.manual_seed(1)
                assert_same(result(x, limit), expected)
                assert_same(reloaded(result).eval()(x, limit), copy.deepcopy(model).eval()(x, limit))
                counts.add(expected[2])
    assert len(counts) > 2


def test_explicit_steps_of_some_layers_only():
    module = torch.jit.script(Branching().double())
    result = unroll(module, steps={"first": 3, "chunks": 2})
    x = torch.rand(4, 3, 3, dtype=F64)
    torch.manual_seed(0)
    expected = module(x, 1e9)
    torch.manual_seed(0)
    assert_same(result(x, 1e9), expected)
    with pytest.raises(torch.jit.Error, match=r"chunks: the input has 1 time steps, unrolled were 2"):
        result(x[:3], 1e9)


class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.GRU(3, 4), nn.GRU(3, 4)

    def forward(self, x: Tensor):
        future = torch.jit.fork(self.left, x)
        return torch.jit.wait(future)[0] + self.right(x)[0]


def test_layers_in_parallel_tasks():
    module = torch.jit.script(Forked().double())
    x = torch.randn(5, 2, 3, dtype=F64)
    result = unroll(module)
    assert_same(result(x), module(x))
    assert_unrolled(result)


def run_lstm(x: Tensor, h: Tensor, weights: list[Tensor], layers: int):
    return torch.lstm(x, (h, h), weights, True, layers, 0.0, False, False, False)[0]


class Functional(nn.Module):
    """Calls operators itself: one in a method, one through a function that is no method."""

    def __init__(self):
        super().__init__()
        self.holder = nn.LSTM(3, 5)
        self.w_ih, self.w_hh = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor):
        h = x.new_zeros(1, x.size(1), 5)
        holder = self.holder
        weights = [holder.weight_ih_l0, holder.weight_hh_l0, holder.bias_ih_l0, holder.bias_hh_l0]
        y = run_lstm(x, h, weights, 1)
        h = h[..., :4]
        y, _ = torch.rnn_relu(y, h, [self.w_ih, self.w_hh], False, 1, 0.0, False, False, False)
        y, _ = torch.rnn_tanh(y, h, [self.w_hh, self.w_hh], False, 1, 0.0, False, False, False)
        return y


@pytest.mark.parametrize("form", [lambda m: m, reloaded, lambda m: torch.jit.freeze(m.eval())])
def test_operators_called_by_the_model_itself(form):
    module = form(torch.jit.script(Functional().double()))
    x = torch.randn(5, 2, 3, dtype=F64)
    result = unroll(module)
    assert_same(result(x), module(x))
    assert_unrolled(result)


# --- which layers, and refusals -------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.LSTM(3, 4)
        self.b = nn.LSTM(4, 5)
        self.twins = nn.ModuleList([nn.GRU(5, 5), nn.GRU(5, 5)])
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor):
        y = self.b(self.a(x)[0])[0]
        for twin in self.twins:
            y = twin(y)[0]
        return self.out(y)


def encoder():
    return torch.jit.script(nn.Sequential(Encoder().double()))


def test_where_names_layers_by_their_path():
    module = encoder()
    x = torch.randn(4, 2, 3, dtype=F64)
    for where, left in (
        ("0.a", {"aten::lstm", "aten::gru"}),
        (["0.a", "0.b"], {"aten::gru"}),
        ("*twins*", {"aten::lstm"}),
        (lambda name, layer: layer.original_name == "GRU", {"aten::lstm"}),
    ):
        result = unroll(module, where=where)
        assert OPERATORS & set(operators(result)) == left
        assert_same(result(x), module(x))
        assert_same(unroll(result, where=where)(x), module(x))
        assert_unrolled(unroll(result))


def test_where_names_operators_of_a_frozen_module():
    module = torch.jit.freeze(encoder().eval())
    x = torch.randn(4, 2, 3, dtype=F64)
    result = unroll(module, where=["lstm", "gru_2"])
    assert operators(result).count("aten::lstm") == operators(result).count("aten::gru") == 1
    assert_same(result(x), module(x))


def problems(call, *args, **kwargs) -> str:
    with pytest.raises(UnrollError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_all_problems_are_told_at_once():
    assert problems(unroll, encoder(), where=["0.c", "0.twins.0"]).splitlines() == [
        "2 problems",
        "where='0.c': names no recurrent layer; the recurrent layers are: 0.a, 0.b, 0.twins.0, 0.twins.1",
        "0.twins.0, 0.twins.1: share one piece of compiled code; choose all of them, or freeze the module "
        "(torch.jit.freeze)",
    ]
    assert problems(unroll, encoder(), steps={"0.a": 0, "0.b": 2, "0.c": 1}).splitlines() == [
        "2 problems",
        "steps['0.c']: names no recurrent layer; the layers with steps are: 0.a, 0.b, 0.twins.0, 0.twins.1",
        "0.a: steps=0; give a whole number from 1 upwards",
    ]
    assert problems(unroll, encoder(), steps={"0.twins.0": 3}) == (
        "0.twins.0, 0.twins.1: share one piece of compiled code; give the same number for each, or freeze the module "
        "(torch.jit.freeze)"
    )
    found = problems(unroll, encoder(), (torch.randn(4, 2, 3, dtype=F64),), steps=7)
    assert found.count("has 4 time steps with these args, but steps=7 was given") == 3
    assert "cannot be run on them" in problems(unroll, encoder(), (torch.randn(4, 2, 9, dtype=F64),))
    assert "given for a ScriptModule" in problems(unroll, encoder(), rules={})


def test_packed_data_has_no_fixed_length():
    case = PACKED[0]
    module = script_of(case)
    for given in ({"args": case.tensors(F64)}, {"steps": 4}):
        assert problems(unroll, module, **given) == (
            "rnn: runs on packed data, whose batch sizes are known when it runs; leave its length open, without args "
            "and steps, or leave the layer out by where="
        )


def test_lengths_that_differ_or_are_unknown():
    module = torch.jit.script(Branching().double())
    found = problems(unroll, module, (torch.ones(3, 3, 3, dtype=F64), 1e9))
    assert "chunks: runs with [1, 2] time steps" in found
    found = problems(unroll, module, (torch.ones(4, 3, 3, dtype=F64), -1.0), where="chunks")
    assert "args: the module cannot be run on them" in found
    found = problems(unroll, module, (-torch.ones(4, 3, 3, dtype=F64), -1.0), where="deep")


class Options(nn.Module):
    layers: int

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5)
        self.layers = 1
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor):
        h = x.new_zeros(1, x.size(1), 5)
        rnn = self.rnn
        weights = [self.scale * rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0]
        return torch.gru(x, h, weights, True, self.layers, 0.0, False, False, False)[0]


def test_options_and_weights_that_only_the_run_knows():
    module = torch.jit.script(Options().double())
    assert problems(unroll, module).splitlines() == [
        "2 problems",
        "gru: has its num_layers only in an attribute that may change; make it a constant of the graph, by Final[...] "
        "or torch.jit.freeze",
        "gru: computes its weights, so that their shapes are unknown; give example inputs, unroll(module, args)",
    ]
    frozen = torch.jit.freeze(module.eval())
    x = torch.randn(4, 2, 3, dtype=F64)
    assert_same(unroll(frozen)(x), module(x))


class WeightNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = parametrizations.weight_norm(nn.LSTM(3, 5), "weight_hh_l0")

    def forward(self, x: Tensor):
        return self.rnn(x)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_computed_weights_in_a_trace():
    model, x = WeightNormed().double(), torch.randn(4, 2, 3, dtype=F64)
    module = torch.jit.trace(model, (x,))
    assert "computes its weights" in problems(unroll, module)
    result = unroll(module, (x,))
    assert_same(result(x), model(x))
    assert_same(gradients(result, (x,)), gradients(module, (x,)))
    both = torch.jit.trace(unroll(model), (x,))
    assert_same(both(x), model(x))
    assert "remove the parametrization" in problems(torch.jit.script, unroll(model))


def test_quantized_layers_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(Alone(nn.LSTM(3, 5)), {nn.LSTM})
        module = torch.jit.script(model)
    assert "runs aten::quantized_lstm, whose weights are in a form of its own" in problems(unroll, module)


def test_arguments_that_torch_refuses_are_refused():
    for module in (torch.jit.script(WithState(nn.GRU(3, 5).double())), torch.jit.trace(*call_and_args())):
        result = unroll(module)
        for x, h in (((4, 2, 3), (1, 3, 5)), ((4, 2, 3), (1, 1, 5)), ((4, 2, 4), (1, 2, 5)), ((0, 2, 3), (1, 2, 5))):
            x, h = torch.zeros(x, dtype=F64), torch.zeros(h, dtype=F64)
            for m in (module, result):
                with pytest.raises((RuntimeError, torch.jit.Error)):
                    m(x, h)
        with pytest.raises(torch.jit.Error):  # torch.gru itself broadcasts this one on a CPU, and fails elsewhere
            result(torch.zeros(4, 1, 3, dtype=F64), torch.zeros(1, 2, 5, dtype=F64))
        args = torch.ones(4, 2, 3, dtype=F64), torch.zeros(1, 2, 5, dtype=F64)
        assert_same(result(*args), module(*args))


def call_and_args():
    layer = nn.GRU(3, 5).double()

    def call(x, h):
        return torch.gru(x, h, layer._flat_weights, True, 1, 0.0, False, False, False)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, h):
            return call(x, h)

    return Call(), (torch.ones(4, 2, 3, dtype=F64), torch.zeros(1, 2, 5, dtype=F64))


def test_no_warnings_of_ours():
    module = torch.jit.script(Alone(nn.LSTM(3, 5)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unroll(module)


# --- unrolled modules scripted and traced ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*CHOSEN, *EMPTY], ids=str)
def test_scripting_an_unrolled_layer(case):
    layer = case.layer(F64)
    for module, model in ((torch.jit.script(unroll(layer)), layer), scripted_holder(case)):
        assert list(module.state_dict()) == list(model.state_dict())
        bare = model is layer
        again = reloaded(module)
        assert_unrolled(again)
        for steps, batch in ((case.steps, case.batch), (7, 2), (1, 0)):
            other = replace(case, steps=steps, batch=batch)
            args = other.args(F64) if bare else other.tensors(F64)
            assert_same(module(*args), model(*args))
            assert_same(again(*args), model(*args))


def scripted_holder(case):
    model = model_of(case)
    return torch.jit.script(unroll(model)), model


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", [*CHOSEN, *EMPTY], ids=str)
def test_tracing_an_unrolled_layer(case):
    model = case.model(F64)
    module = torch.jit.trace(unroll(model), case.tensors(F64))
    assert "prim::Loop" not in operators(module)
    for result in (module, reloaded(module)):
        for batch in (case.batch, 0, 1, 5):
            args = replace(case, batch=batch).tensors(F64)
            assert_same(result(*args), model(*args))
    if not case.is_cell:
        with pytest.raises(torch.jit.Error, match=f"unrolled were {case.steps}"):
            module(*replace(case, steps=case.steps + 1).tensors(F64))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_tracing_packed_sequences_of_any_length(case):
    model = case.model(F64)
    module = torch.jit.trace(unroll(model), case.tensors(F64))
    for steps, batch in ((case.steps, case.batch), (9, 5), (2, 1)):
        args = replace(case, steps=steps, batch=batch).tensors(F64)
        assert_same(module(*args), model(*args))


@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_dropout_of_scripted_and_traced_layers(case):
    model, args = model_of(case), case.tensors(F64)
    unrolled = unroll(model)
    for module in (torch.jit.script(unrolled), torch.jit.trace(unrolled, args, check_trace=False)):
        torch.manual_seed(0)
        expected = model(*args)
        torch.manual_seed(0)
        assert_same(module(*args), expected)
    assert_same(torch.jit.script(unrolled).eval()(*args), model.eval()(*args))


@pytest.mark.parametrize("case", [c for c in CHOSEN if c.num_layers > 1 or c.is_cell], ids=str)
def test_gradients_of_scripted_and_traced_layers(case):
    model, args = model_of(case), case.tensors(F64)
    expected = gradients(model, args)
    assert_same(gradients(torch.jit.script(unroll(model)), args), expected)
    assert_same(gradients(torch.jit.trace(unroll(model), args), args), expected)


def test_the_scripted_module_trains_the_same_parameters():
    model = Alone(nn.LSTM(3, 5, 2))
    module = torch.jit.script(unroll(model))
    assert all(ours is theirs for ours, theirs in zip(module.parameters(), model.parameters(), strict=True))
    assert list(module.state_dict()) == list(model.state_dict())


def test_a_module_that_was_scripted_is_the_module_it_was():
    model = unroll(Encoder())
    x = torch.randn(4, 2, 3)
    expected, layers = model(x), [model.a, model.b, *model.twins]
    torch.jit.script(model)
    assert [model.a, model.b, *model.twins] == layers
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), unroll(model)):
        assert_equal(other(x), expected)
        assert_same(torch.jit.script(other)(x), expected, rtol=1e-5)
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))
    assert isinstance(model.a(packed)[0], PackedSequence)
    model.a.weight_hh_l0 = nn.Parameter(torch.zeros_like(model.a.weight_hh_l0))
    assert_same(torch.jit.script(model)(x), model(x), rtol=1e-5)


def test_what_torchscript_would_compile_otherwise_is_refused():
    class Flipped(nn.GRU):
        def forward(self, input, hx=None):
            return super().forward(input.flip(0), hx)

    assert problems(torch.jit.script, unroll(nn.Sequential(Flipped(3, 5)))) == (
        "0: Flipped has methods of its own, which call super(); TorchScript knows no super(); use torch.jit.trace"
    )
    case = PACKED[0]
    with pytest.raises(RuntimeError, match="PackedSequence"):
        torch.jit.script(unroll(model_of(case)))
    traced = torch.jit.trace(unroll(Flipped(3, 5)), (torch.ones(4, 2, 3),))
    assert_unrolled(traced)


@pytest.mark.parametrize("given", ["steps", "loop"])
def test_a_wavefront_runs_again_with_gradients(given):
    model, x = nn.LSTM(3, 4, 2), torch.randn(7, 2, 3)
    steps = {"steps": 7} if given == "steps" else {}
    ours = unroll(torch.jit.script(nn.Sequential(model)), plan="layers=wavefront", **steps)
    for _ in range(3):
        torch.testing.assert_close(ours(x)[0], model(x)[0])


class Results(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x):
        out, h = self.rnn(x)
        return out[-1], h


class Doubled(Results):
    def forward(self, x):
        out, h = self.rnn(x)
        out[-1].mul_(2.0)
        return out, h


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", [Results, Doubled])
def test_results_share_memory_only_where_torchs_do(kind, steps):
    model, x = kind().eval(), torch.randn(steps, 2, 3)
    script = torch.jit.script(model)
    forms = unroll(script), unroll(script, (x,)), torch.jit.trace(unroll(model), (x,)), torch.jit.script(unroll(model))
    for ours in forms:
        with torch.no_grad():
            out, h = ours(x)
            torch.testing.assert_close((out, h), model(x))
            h.zero_()
            torch.testing.assert_close(out, model(x)[0])


@pytest.mark.parametrize("kept", [["0"], ["0", "1"]], ids=str)
@pytest.mark.parametrize("deep", [False, True])
def test_frozen_modules_that_keep_their_submodules(kept, deep):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.offset = nn.LSTM(5, 4), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.rnn(x)[0] + self.offset

    model, x = nn.Sequential(nn.Linear(3, 5), Inner()).eval(), torch.randn(4, 2, 3)
    if deep:
        model = nn.Sequential(model, nn.Linear(4, 4)).eval()
    frozen = torch.jit.freeze(torch.jit.script(model), preserved_attrs=kept)
    ours = unroll(frozen)
    torch.testing.assert_close(ours(x), model(x))
    assert_unrolled(ours)
