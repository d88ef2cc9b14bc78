"""Blocks of steps in a loop, in programs and compiled modules: any length, from one compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.exc import Unsupported
from torch.export import Dim

from tests.by_version import PROVES_NAMED_BATCH
from tests.cases import Case, flat, replace
from tests.checks import assert_same
from unroll import Plan, UnrollError, compile, decompositions, trace, unroll
from unroll.core.torch_version import LOOP_TRAINS_COMPILED

# Dynamo's own, where it makes a loop of something that has gradients.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

BLOCK = 3
LAYERS = [
    Case("LSTM", num_layers=2, proj_size=2, bidirectional=True, batch_first=True, state=True),
    Case("LSTM"),
    Case("GRU", bidirectional=True),
    Case("RNN", nonlinearity="relu", bias=False, state=True),
]


class Loop(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.layer = case.layer(torch.float64)

    def forward(self, *args):
        return self.layer(*args)


def loops(program):
    return [node for node in program.graph.nodes if node.target is torch.ops.higher_order.scan]


def exported(case, strict=False):
    model = Loop(case)
    args = sized(case, 7, 4)
    spec = (({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, *(dynamic_batch(state) for state in args[1:])),)
    with torch.no_grad():
        program = torch.export.export(unroll(model, plan=Plan(time=BLOCK)), args, dynamic_shapes=spec, strict=strict)
    return model, program


def dynamic_batch(state):
    return tuple(map(dynamic_batch, state)) if isinstance(state, tuple) else {1: Dim.DYNAMIC}


def sized(case, steps, batch):
    return Case(**{**vars(case), "steps": steps, "batch": batch}).args(torch.float64)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_program_runs_at_any_length(case):
    model, program = exported(case)
    assert len(loops(program)) == model.layer.num_layers * (1 + model.layer.bidirectional)
    run = program.module()
    with torch.no_grad():
        for steps, batch in ((1, 4), (2, 1), (3, 4), (4, 2), (6, 4), (7, 4), (20, 4)):
            args = sized(case, steps, batch)
            assert_same(list(flat(run(*args))), list(flat(model(*args))))


def test_named_sizes():
    model = nn.Sequential(nn.GRU(3, 7, batch_first=True))
    sizes = {"input": {0: Dim("batch", min=2) if PROVES_NAMED_BATCH else Dim.AUTO, 1: Dim("time", min=1)}}
    with torch.no_grad():
        program = torch.export.export(
            unroll(model, plan="time=4"), (torch.randn(5, 9, 3),), dynamic_shapes=sizes, strict=False
        )
        for steps in (1, 10):
            x = torch.randn(3, steps, 3)
            torch.testing.assert_close(program.module()(x), model(x))


def test_autocast_that_changes_the_state_is_refused():
    model = unroll(nn.Sequential(nn.RNN(3, 4)), plan="time=4")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(UnrollError, match="under autocast"):
        torch.export.export(model, (torch.randn(9, 2, 3),))


def test_strict_programs_too():
    case = Case("LSTM", bidirectional=True, state=True)
    model, program = exported(case, strict=True)
    with torch.no_grad():
        for steps in (1, 8):
            args = sized(case, steps, 4)
            assert_same(list(flat(program.module()(*args))), list(flat(model(*args))))


def test_the_size_of_a_program_depends_on_the_block_alone():
    case = Case("GRU")
    sizes = set()
    for steps in (8, 80):
        args = sized(case, steps, 2)
        with torch.no_grad():
            program = torch.export.export(unroll(Loop(case), plan=Plan(time=4)), args)
        (loop,) = loops(program)
        sizes.add((len(program.graph.nodes), len(getattr(program.graph_module, loop.args[0].target).graph.nodes)))
    assert len(sizes) == 1


COMPILED = Case("LSTM", bidirectional=True)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.heavy)], ids="num_layers={}".format)
def compiled(request):
    torch.compiler.reset()
    model = Loop(replace(COMPILED, num_layers=request.param)).eval()
    yield model, torch.compile(unroll(model, plan=Plan(time=BLOCK)), fullgraph=True, backend="aot_eager", dynamic=True)
    torch.compiler.reset()


@settings(max_examples=12, deadline=None)
@given(steps=st.integers(1, 40), batch=st.integers(2, 5))
def test_compiled_modules_run_at_any_length(compiled, steps, batch):
    model, ours = compiled
    args = sized(COMPILED, steps, batch)
    with torch.no_grad():
        assert_same(list(flat(ours(*args))), list(flat(model(*args))))


HEAVY = pytest.mark.heavy


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=HEAVY), 5, 6, 7, pytest.param(8, marks=HEAVY)])
def test_a_known_number_of_steps_leaves_a_rest(steps):
    torch.compiler.reset()
    case = Case("GRU", bidirectional=True, state=True)
    model, args = Loop(case), sized(case, steps, 2)
    ours = torch.compile(unroll(model, plan=Plan(time=BLOCK)), fullgraph=True, backend="eager", dynamic=False)
    with torch.no_grad():
        assert_same(list(flat(ours(*args))), list(flat(model(*args))))


@pytest.mark.skipif(LOOP_TRAINS_COMPILED, reason="Inductor's gradients of torch.scan are right from 2.15 on")
def test_compiled_training_in_blocks_is_refused():
    torch.compiler.reset()
    model = nn.Sequential(nn.GRU(3, 5))
    x = torch.randn(8, 2, 3)
    with pytest.raises(Unsupported, match="Message: unroll: 0 would be trained in blocks"):
        torch.compile(unroll(model, plan=Plan(time=BLOCK)), fullgraph=True, backend="eager")(x)
    torch.compiler.reset()
    ours = torch.compile(unroll(model, plan=Plan(time=BLOCK)), backend="aot_eager")  # breaks the graph there
    found = [torch.autograd.grad(f(x)[0].sin().sum(), list(model.parameters())) for f in (ours, model)]
    assert_same(list(found[0]), list(found[1]), rtol=1e-5)


def test_gradients_of_a_program_in_blocks():
    case = Case("LSTM", bidirectional=True, state=True)
    model = Loop(case)
    spec = (({0: Dim.DYNAMIC}, (None, None)),)
    program = torch.export.export(unroll(model, plan=Plan(time=BLOCK)), sized(case, 7, 2), dynamic_shapes=spec)
    for steps in (8, 11):
        found = []
        for function in (program.module(), model):
            args = [a.requires_grad_() for a in flat(sized(case, steps, 2))]
            x, *state = args
            loss = torch.stack([(t.sin() * (k + 1)).sum() for k, t in enumerate(flat(function(x, tuple(state))))]).sum()
            weights = dict(function.named_parameters())
            found.append(torch.autograd.grad(loss, [*args, *(weights[name] for name, _ in model.named_parameters())]))
        assert_same(list(found[0]), list(found[1]))


@pytest.fixture
def backward_passes(monkeypatch):
    """The times that PyTorch traced the backward pass of a loop."""
    from torch._higher_order_ops.partitioner import HopGraphMinCutPartitioner

    trace_backward, found = HopGraphMinCutPartitioner.create_partitioned_graph, []

    def counted(*args, **kwargs):
        found.append(args)
        return trace_backward(*args, **kwargs)

    monkeypatch.setattr(HopGraphMinCutPartitioner, "create_partitioned_graph", counted)
    return found


def test_a_frozen_program_traces_a_backward_pass_only_for_its_input(backward_passes):
    layer = nn.GRU(3, 5, dtype=torch.float64)
    x = torch.randn(8, 2, 3, dtype=torch.float64)

    def exported(model):
        return torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()

    run, frozen = (exported(unroll(layer, plan=Plan(time=BLOCK), freeze=freeze)) for freeze in (False, True))
    backward_passes.clear()
    assert_same(list(flat(frozen(x))), list(flat(layer(x))))
    assert not backward_passes
    run(x)
    assert len(backward_passes) == 1
    x.requires_grad_()
    gradients = [torch.autograd.grad(function(x)[0].sin().sum(), x) for function in (frozen, layer)]
    assert_same(list(gradients[0]), list(gradients[1]))


@pytest.mark.heavy
def test_inductor_compiles_a_block_once_for_all_lengths():
    torch.compiler.reset()
    model = nn.GRU(3, 5)
    ours = torch.compile(unroll(model, plan=Plan(time=4)), fullgraph=True, dynamic=True)
    with torch.no_grad():
        for steps in (9, 50, 3, 500):
            x = torch.randn(steps, 2, 3)
            for a, b in zip(ours(x), model(x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compile_of_the_library_takes_blocks():
    torch.compiler.reset()
    model = Loop(Case("RNN"))
    x = torch.randn(10, 2, model.layer.input_size, dtype=torch.float64)
    ours = compile(model, plan=Plan(time=4), backend="aot_eager")
    with torch.no_grad():
        assert_same(list(flat(ours(x))), list(flat(model(x))))


def test_eager_modules_run_as_they_do():
    case = Case("LSTM", num_layers=2, proj_size=2)
    model, args = Loop(case), case.args(torch.float64)
    assert_same(list(flat(unroll(model, plan=Plan(time=4))(*args))), list(flat(model(*args))))


def test_graphs_have_no_loop():
    model = nn.Sequential(nn.GRU(3, 5))
    with pytest.raises(UnrollError, match="cannot run in blocks, time=4"):
        unroll(trace(model), plan=Plan(time=4), steps=8)
    program = torch.export.export(model, (torch.zeros(8, 2, 3),))
    with pytest.raises(UnrollError, match="cannot run in blocks, time=4"):
        unroll(program, plan="time=4")
    with pytest.raises(UnrollError, match="cannot make blocks, time=4"):
        decompositions("time=4")
