"""What would have been ignored, or half done, is refused or done."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torch.export import Dim
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import unroll as library
from tests.checks import problems
from unroll import Plan, UnrollError, UnrollWarning, compare, trace, unroll
from unroll.graphs.calls import form_of

X = torch.randn(4, 3, 6, dtype=torch.float64)


def gru(**options) -> nn.GRU:
    return nn.GRU(6, 6, dtype=torch.float64, **options)


class Doubling(nn.GRU):
    def forward(self, x, hx=None):
        return super().forward(2 * x, hx)


def test_a_forward_of_its_own_is_not_dropped_from_a_graph():
    model = nn.Sequential(Doubling(6, 6, dtype=torch.float64))
    compare(model, unroll(model), X).check()
    (problem,) = problems(unroll, trace(model), X)
    assert problem.startswith("0: has a forward of its own, which no graph would run")
    plain = nn.Sequential(gru())
    run = plain[0].forward
    plain[0].forward = lambda x, hx=None: run(2 * x, hx)
    assert problems(unroll, trace(plain), X) == [problem]


def test_unknown_keywords_are_refused():
    graph = trace(nn.Sequential(gru()))
    (node,) = graph.graph.find_nodes(op="call_module", target="0")
    node.kwargs = {"state": None}
    assert problems(unroll, graph, X) == ["0: is called with state; a layer takes input and hx"]


def test_a_predicate_is_asked_about_the_layer_that_was():
    graph = unroll(trace(nn.Sequential(gru())), X, where=lambda name, layer: isinstance(layer, nn.GRU))
    assert not graph.graph.find_nodes(op="call_module", target="0")
    kept = unroll(trace(nn.Sequential(gru())), X, where=lambda name, layer: isinstance(layer, nn.LSTM))
    assert isinstance(kept.get_submodule("0"), nn.GRU)


def test_a_predicate_that_picks_no_call_of_a_program_is_told():
    program = torch.export.export(nn.Sequential(gru()), (X,), strict=True)
    with pytest.raises(UnrollError, match="where: picks none of the program's recurrent calls; it is asked about"):
        unroll(program, where=lambda name, layer: isinstance(layer, nn.GRU))
    assert unroll(program, where=lambda name, node: name == "0" and isinstance(node, fx.Node))


def test_an_open_length_that_steps_fix_is_told():
    model, x = nn.Sequential(nn.GRU(3, 4)), torch.randn(5, 2, 3)
    with pytest.warns(UnrollWarning, match=r"0: is given an open length, .* plan='time=8'"):
        torch.export.export(unroll(model), (x,), dynamic_shapes=({0: Dim.AUTO},))
    torch.export.export(unroll(model), (x,), dynamic_shapes=({1: Dim.DYNAMIC},))  # of the batch nothing is said


def test_lengths_above_the_padded_steps_are_told():
    """Torch packs them, with fewer rows than batch sizes ask for."""
    packed = pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([6, 3]))
    (problem,) = problems(unroll(nn.GRU(3, 4)), packed)
    assert problem == (
        "GRU: packed.data: has 8 rows, and batch sizes that ask for 9; "
        "give pack_padded_sequence no length above the number of padded steps"
    )


def test_weights_without_values_are_told():
    (problem,) = problems(unroll(nn.GRU(3, 4, device="meta")), torch.randn(5, 2, 3))
    assert problem == "GRU: input: is on cpu, the weights on meta; load the weights first"


def test_names_of_steps_are_checked():
    assert problems(unroll, trace(nn.Sequential(gru())), X, steps={"gru": 4}) == [
        "steps['gru']: names no recurrent layer; the layers with steps are: 0"
    ]


def test_a_plan_reaches_layers_that_are_unrolled_already():
    model = unroll(nn.Sequential(gru()), plan=Plan("paired"))
    assert unroll(model)[0].plan == Plan("paired")
    other = unroll(model, plan=Plan("split"))
    assert other[0].plan == Plan("split")
    assert model[0].plan == Plan("paired")


def test_blanks_in_a_plan_mean_nothing():
    assert Plan.of(" gates = split, time = 4 ") == Plan.of("gates=split,time=4") == Plan("split", time=4)
    assert Plan.of(" npu ") == Plan.of("npu")
    for text in ("", " ", "ga tes=split", "gates=split,", "gates=split gates=split"):
        with pytest.raises(UnrollError):
            Plan.of(text)


@pytest.mark.parametrize("function", [unroll, library.compile, library.decompositions])
def test_a_plan_is_a_plan(function):
    args = () if function is library.decompositions else (gru(),)
    with pytest.raises(UnrollError, match=r"plan='webgl': is no plan; did you mean webgpu\? give default"):
        Plan.of("webgl")
    with pytest.raises(UnrollError, match=r"plan='split': is no plan; give default, .*, or fields and values"):
        function(*args, plan="split")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = gru()

    def forward(self, x):
        return checkpoint(lambda y: self.gru(y)[0], x, use_reentrant=False)


def test_graphs_inside_of_graphs():
    model, seen = Checkpointed(), []

    def keep(graph, inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compare(model, library.compile(model, backend=keep), X).check()
    parts = [part for graph in seen for part in graph.modules() if isinstance(part, fx.GraphModule)]
    assert len(parts) > len(seen)
    assert not [node for part in parts for node in part.graph.nodes if form_of(node)]

    inner = torch.export.export(nn.Sequential(gru()), (X,), strict=True).module()
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    outer = fx.GraphModule(nn.ModuleDict({"inner": inner}), graph)
    ours = unroll(outer)
    assert not [n for p in ours.modules() if isinstance(p, fx.GraphModule) for n in p.graph.nodes if form_of(n)]
    compare(outer, ours, X, reference=False).check()


def test_compile_checks_names_and_survives_copies_and_dynamic_shapes():
    model = nn.Sequential(gru(num_layers=2, dropout=0.3)).eval()
    with pytest.raises(UnrollError, match="where='gru': names no recurrent layer; the recurrent layers are: 0"):
        library.compile(model, where="gru")
    torch._dynamo.reset()
    compiled = library.compile(model, backend="eager", dynamic=True)
    for function in (compiled, copy.deepcopy(compiled)):
        compare(model, function, [(X,), (X[:2],)]).check()
    assert torch._dynamo.config.allow_rnn is False


def test_compare_refuses_what_is_no_input():
    for args in ([], [X, X]):
        with pytest.raises(UnrollError, match=r"compare\(args=...\): is no input"):
            compare(gru(), gru(), args)


def test_compare_after_a_call_with_gradients():
    layer = nn.LSTM(6, 5)
    weight_norm(layer, "weight_hh_l0")
    unrolled, x = unroll(layer), torch.randn(4, 3, 6)
    compare(layer, unrolled, x, gradients=True).check()
    compare(layer, unrolled, x).check()
