"""`Plan(products="linear")`: products by `nn.Linear` modules that hold the parameters of the layer."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.export import Dim
from torch.nn.utils import parametrizations

from tests.cases import CHOSEN, LINEAR, PACKED, Case, flat, replace
from tests.checks import assert_equal, assert_same, problems
from unroll import Plan, Stream, UnrollError, compare, export_onnx, streaming, trace, unroll

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

F64 = torch.float64
aten = torch.ops.aten


def linears(module):
    return {name: part for name, part in module.named_modules() if type(part) is nn.Linear}


@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_modules_hold_the_parameters_under_torchs_names(case):
    layer, other = case.layer(F64), case.layer(F64, seed=7)
    unrolled = unroll(layer, plan=LINEAR)
    assert list(unrolled.state_dict()) == list(layer.state_dict())
    assert {id(p) for p in unrolled.parameters()} == {id(p) for p in layer.parameters()}
    assert all(getattr(unrolled, name) is getattr(layer, name) for name in layer.state_dict())
    assert len(linears(unrolled)) == sum("weight" in name for name in layer.state_dict())
    copied = unroll(other, plan=LINEAR)
    assert copied.load_state_dict(layer.state_dict()).missing_keys == []
    for same in (copied, copy.deepcopy(unrolled), pickle.loads(pickle.dumps(unrolled)), unroll(unrolled)):
        assert_equal(same(*case.args(F64)), unrolled(*case.args(F64)))


@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_other_plans_take_the_parameters_back(case):
    layer = case.layer(F64)
    unrolled = unroll(layer, plan=LINEAR)
    for again in (unroll(unrolled, plan="gates=split"), unroll(unrolled, freeze=True)):
        assert not linears(again)
        assert_same(again(*case.args(F64)), layer(*case.args(F64)))
    assert list(unroll(unrolled, plan=Plan()).state_dict()) == list(layer.state_dict())
    assert len(linears(unrolled)) == sum("weight" in name for name in layer.state_dict())


def test_a_weight_set_by_its_name_runs():
    layer = unroll(nn.GRU(3, 5), plan=LINEAR)
    weight = nn.Parameter(torch.zeros(15, 5))
    layer.weight_hh_l0 = weight
    assert layer.hh_l0.weight is weight
    assert layer.weight_hh_l0 is weight
    other = nn.GRU(3, 5)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3)
    assert_same(layer(x), other(x), rtol=1e-6)
    with pytest.raises(AttributeError, match="weight_hh_l1"):
        _ = layer.weight_hh_l1
    with pytest.raises(AttributeError, match="bias_hh_l0"):
        _ = unroll(nn.GRU(3, 5, bias=False), plan=LINEAR).bias_hh_l0


def test_a_module_is_called_at_every_step():
    layer, calls = unroll(nn.LSTM(3, 5, 2), plan=LINEAR), []
    for name, linear in linears(layer).items():
        linear.register_forward_hook(lambda *_, name=name: calls.append(name))
    layer(torch.randn(4, 2, 3))
    assert {name: calls.count(name) for name in linears(layer)} == {"ih_l0": 1, "hh_l0": 4, "ih_l1": 1, "hh_l1": 4}


class Adapter(nn.Module):
    """A low-rank addition to a linear map."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    def merged(self):
        with torch.no_grad():
            return self.base.weight + self.up.weight @ self.down.weight


@pytest.mark.parametrize("case", [Case("LSTM", num_layers=2, proj_size=2), Case("GRU"), Case("RNNCell")], ids=str)
def test_an_adapter_in_the_place_of_a_module_is_what_runs(case, tmp_path):
    layer = case.layer(F64)
    unrolled = unroll(layer, plan=LINEAR)
    merged = copy.deepcopy(layer)
    for place, linear in linears(unrolled).items():
        setattr(unrolled, place, Adapter(linear))
        getattr(merged, f"weight_{place}").data = getattr(unrolled, place).merged()
    args = case.args(F64)
    assert_same(unrolled(*args), merged(*args))
    torch.compiler.reset()
    assert_same(torch.compile(unrolled, backend="eager", fullgraph=True)(*args), merged(*args))
    # what reads weights alone would leave the adapters out
    for function in (
        lambda: unroll(unrolled, plan=Plan()),
        lambda: unroll(unrolled, freeze=True),
        lambda: torch.jit.trace(unrolled, args),
        lambda: unroll(trace(nn.Sequential(unrolled)), args),
        lambda: export_onnx(nn.Sequential(unrolled).eval(), args, tmp_path / "model.onnx"),
    ):
        assert any("is a Adapter, which this would leave out" in problem for problem in problems(function))


def test_a_quantizer_finds_the_modules():
    layer = nn.LSTM(16, 32, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of it is deprecated
        quantized = quantize_dynamic(unroll(layer, plan=LINEAR), {nn.Linear}, dtype=torch.qint8)
    found = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(found) == 4
    x = torch.randn(6, 3, 16)
    with torch.no_grad():
        (ours, _), (theirs, _) = quantized(x), layer(x)
    assert 0 < (ours - theirs).abs().max() < 0.05


def test_weights_of_others_are_refused():
    normed = parametrizations.weight_norm(nn.LSTM(3, 5), "weight_hh_l0")
    assert "computes weight_hh_l0 at every call" in problems(unroll, normed, plan=LINEAR)[0]
    layer = nn.LSTM(3, 5)
    layer._flat_weights = [nn.Parameter(w.detach() + 1) for w in layer._flat_weights]
    assert "runs with a list of weights" in problems(unroll, layer, plan=LINEAR)[0]
    unrolled = unroll(nn.LSTM(3, 5), plan=LINEAR)
    assert [w is v for w, v in zip(unrolled._flat_weights, unrolled.parameters(), strict=True)]
    with pytest.raises(TypeError):
        unrolled._flat_weights[0] = torch.zeros(20, 3)
    with pytest.raises(UnrollError, match="runs with no list"):
        unrolled._flat_weights = []
    layer = nn.LSTM(3, 5)
    layer.hh_l0 = nn.Identity()
    assert "has attributes called hh_l0" in problems(unroll, layer, plan=LINEAR)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", [c for c in CHOSEN if not c.is_cell], ids=str)
def test_graphs_have_linear(case):
    layer, args, passes = case.layer(F64), case.args(F64), case.num_layers * (1 + case.bidirectional)

    def count(zeros):
        """Products: with x, with h but not at a first step whose zeros are left out, and of the projection."""
        return passes * (1 + case.steps - (not case.state and not zeros) + case.steps * bool(case.proj_size))

    if not case.state:
        graph = unroll(trace(nn.Sequential(layer)), args, plan=LINEAR)
        assert len(graph.graph.find_nodes(op="call_function", target=torch.nn.functional.linear)) == count(zeros=False)
        assert not graph.graph.find_nodes(op="call_function", target=torch.addmm)
        assert_same(graph(*args), layer(*args))
    model, tensors = case.model(F64), case.tensors(F64)
    program = unroll(torch.export.export(model, tensors), plan=LINEAR)
    found = [node.target for node in program.graph.nodes]
    assert (found.count(aten.linear.default), found.count(aten.addmm.default)) == (count(zeros=case.steps == 1), 0)
    assert_same(program.module()(*tensors), model(*tensors))
    script = unroll(torch.jit.trace(model, tensors), plan=LINEAR)
    assert_same(script(*tensors), model(*tensors))
    assert str(script.inlined_graph).count("aten::linear") >= passes * 2
    assert "aten::addmm" not in str(script.inlined_graph)


@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_modules_are_exported_traced_and_scripted(case):
    model, tensors = case.model(F64), case.tensors(F64)
    unrolled = unroll(model, plan=LINEAR)
    if not case.packed:
        program = torch.export.export(unrolled, tensors)
        assert aten.linear.default in [node.target for node in program.graph.nodes]
        assert_same(program.module()(*tensors), model(*tensors))
        layer, args = case.layer(F64), case.args(F64)
        assert_same(torch.jit.script(unroll(layer, plan=LINEAR))(*args), layer(*args))
    assert_same(torch.jit.trace(unrolled, tensors)(*tensors), model(*tensors))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["LSTM", pytest.param("GRU", marks=pytest.mark.heavy)])
def test_blocks(kind):
    case = Case(kind, num_layers=2, bidirectional=True)
    layer = case.layer(F64)
    with torch.no_grad():
        unrolled = unroll(nn.Sequential(layer), plan=Plan(products="linear", time=3))
        program = torch.export.export(unrolled, case.args(F64), dynamic_shapes=({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},))
        for steps in (2, 3, 8):
            args = replace(case, steps=steps, batch=2).args(F64)
            assert_same(program.module()(*args), layer(*args))


def test_the_backend_writes_linear():
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    layer, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    torch.compiler.reset()
    compiled = torch.compile(unroll(layer, plan=LINEAR), backend=backend, fullgraph=True)
    assert_same(compiled(x), layer(x), rtol=1e-6)
    assert seen.count(torch.nn.functional.linear) == 5


@pytest.mark.parametrize(
    "case", [Case("LSTM", num_layers=2, bidirectional=True), Case("GRU"), Case("LSTMCell")], ids=str
)
def test_gradients(case):
    layer = case.layer()
    assert compare(layer, unroll(layer, plan=LINEAR), case.args(), gradients=True)


def test_streams():
    layer, x = nn.LSTM(3, 5, 2), torch.randn(6, 2, 3)
    stream = Stream(streaming(layer, x, plan=LINEAR), 2)
    pieces = torch.cat([next(flat(stream(piece))) for piece in x.split(2)])
    assert_same(pieces, layer(x)[0], rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frozen_and_half(dtype):
    case = Case("LSTM", num_layers=2, state=True)
    layer = case.layer(dtype)
    expected = unroll(layer)(*case.args(dtype))
    assert_same(unroll(layer, plan=LINEAR)(*case.args(dtype)), expected, rtol=2e-2)
    assert_same(unroll(layer, plan=LINEAR, freeze=True)(*case.args(dtype)), expected, rtol=2e-2)


@pytest.mark.parametrize(
    "other", [{"gates": "split"}, {"gates": "paired"}, {"directions": "stacked"}, {"layers": "wavefront"}]
)
def test_plans_that_cut_or_join_weights_are_refused(other):
    (problem,) = problems(lambda: Plan(products="linear", **other))
    assert "with products='linear', whose weights are the layer's own, in one piece" in problem
