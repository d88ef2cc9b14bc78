"""Unrolled models compiled for a GPU: Inductor, CUDA graphs that are really replayed, and packages of AOTInductor."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.profiler import ProfilerActivity, profile

from tests.cases import Case, replace
from tests.gpu.device import DEVICE, F64, ON_GPU, model_of, tensors_of, wide
from unroll import Plan, compare, unroll
from unroll import compile as compile_as_it_is

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    # What Inductor advises: TF32, and more multiprocessors than the device has.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Not enough SMs"),
]
only_on_gpu = pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a CUDA device")

COMPILED = [
    (Case("LSTM", num_layers=2, bidirectional=True, state=True), Plan(directions="stacked")),
    (Case("LSTM", num_layers=2, proj_size=2, batch_first=True), Plan(layers="wavefront")),
    (Case("GRU", num_layers=2, bidirectional=True), Plan()),
    (Case("RNN", state=True), Plan()),
    (Case("LSTMCell", state=True), Plan("split")),
    (Case("GRUCell"), Plan()),
]
NAMES = [f"{case}, {plan.directions}, {plan.layers}" for case, plan in COMPILED]


class Each(nn.Module):
    """A model each call of which is a step of its own to CUDA graphs: what it returned before may be overwritten."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        torch.compiler.cudagraph_mark_step_begin()
        return self.model(*args)


@pytest.fixture
def replays(monkeypatch):
    """How often a CUDA graph has been replayed so far, as the only item of a list."""
    count, replay = [0], torch.cuda.CUDAGraph.replay

    def counted(graph):
        count[0] += 1
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", counted)
    return count


def compiled(model, plan, mode):
    """Unrolled and compiled in place, so that parameters keep their names."""
    ours = unroll(model, plan=plan)
    ours.compile(fullgraph=True, mode=mode)
    return Each(ours)


@pytest.mark.parametrize(("case", "plan"), COMPILED, ids=NAMES)
def test_inductor_forward_and_backward(case, plan):
    case = wide(case, 4)
    model, args = model_of(case, torch.float32), tensors_of(case, torch.float32)
    compare(Each(model), compiled(model, plan, "default"), args, gradients=True).check()


@pytest.mark.parametrize(("case", "plan"), COMPILED[:3:2], ids=NAMES[:3:2])
def test_inductor_without_gradients(case, plan):
    case = wide(case, 4)
    model, args = model_of(case, torch.float32), tensors_of(case, torch.float32)
    compare(Each(model), compiled(model, plan, "default"), args).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_inductor_in_half_precision(dtype):
    case = wide(Case("LSTM" if dtype == torch.float16 else "GRU", bidirectional=True), 4)
    model, args = model_of(case, dtype), tensors_of(case, dtype)
    compare(Each(model), compiled(model, Plan(), "default"), args, gradients=True).check()


def assert_replayed(replays, least):
    if ON_GPU:
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert replays[0] >= least


CALLS = 4
"""The first runs without a graph, the second records it; every one from the second on replays it."""


@pytest.mark.parametrize(("case", "plan"), COMPILED[:4], ids=NAMES[:4])
def test_cuda_graphs_forward(case, plan, replays):
    case, dtype = wide(case, 4), torch.bfloat16 if case.kind == "LSTM" else torch.float32
    model, args = model_of(case, dtype), tensors_of(case, dtype)
    compare(Each(model), compiled(model, plan, "reduce-overhead"), [args] * CALLS).check()
    assert_replayed(replays, CALLS - 1)


@pytest.mark.parametrize(("case", "plan"), COMPILED[:4], ids=NAMES[:4])
def test_cuda_graphs_forward_and_backward(case, plan, replays):
    case = wide(case, 4)
    model, args = model_of(case, torch.float32), tensors_of(case, torch.float32)
    compare(Each(model), compiled(model, plan, "reduce-overhead"), [args] * CALLS, gradients=True).check()
    assert_replayed(replays, 2 * (CALLS - 1))


def test_cuda_graphs_of_a_model_that_stays_as_it_is(replays):
    case = wide(Case("GRU", num_layers=2), 4)
    model, args = model_of(case, torch.float32), tensors_of(case, torch.float32)
    ours = compile_as_it_is(model, options={"triton.cudagraphs": True})
    compare(Each(model), Each(ours), [args] * CALLS).check()
    assert_replayed(replays, CALLS - 1)


@only_on_gpu
def test_one_launch_in_place_of_hundreds():
    """As the profiler sees it: one call for the graph, and few others for the whole of many steps."""
    steps = 32
    layer = nn.LSTM(64, 64, num_layers=2, device=DEVICE)
    x = torch.randn(steps, 16, 64, device=DEVICE)
    launches = {}
    for mode in ("default", "reduce-overhead"):
        torch.compiler.reset()
        ours = compiled(layer, Plan(), mode)
        with torch.no_grad():
            for _ in range(CALLS):
                ours(x)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                ours(x)
                torch.cuda.synchronize()
        launches[mode] = Counter(event.name for event in seen.events() if "Launch" in event.name)
    if not launches["default"]:
        pytest.skip("the profiler sees no calls of CUDA on this machine")
    assert launches["default"]["cudaGraphLaunch"] == 0
    assert launches["default"].total() > steps
    assert launches["reduce-overhead"]["cudaGraphLaunch"] == 1
    assert launches["reduce-overhead"].total() < steps / 2


def test_a_package_of_aot_inductor(tmp_path):
    case = wide(Case("LSTM", num_layers=2, bidirectional=True), 4)
    model, args = model_of(case, torch.float32), tensors_of(case, torch.float32)
    shapes = ({1: Dim("batch", min=1, max=128)},)
    with torch.no_grad():
        program = unroll(torch.export.export(model, args, dynamic_shapes=shapes))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        package = torch._inductor.aoti_load_package(path)
        inputs = [tensors_of(replace(case, batch=batch), torch.float32) for batch in (case.batch, 2, 100)]
        compare(model, package, inputs).check()


def test_blocks_are_compiled_once_for_all_lengths():
    model = nn.GRU(6, 5).to(DEVICE)
    ours = unroll(model, plan=Plan(time=4))
    ours.compile(fullgraph=True, dynamic=True)
    lengths = [torch.randn(steps, 2, 6).to(DEVICE) for steps in (9, 50, 3)]
    compare(model, ours, [(x,) for x in lengths]).check()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("case", [Case("LSTM", num_layers=2, bidirectional=True), Case("GRU", state=True)], ids=str)
def test_blocks_in_programs_of_any_length(case):
    model, args = model_of(case, F64), tensors_of(replace(case, steps=7), F64)
    shapes = ({0: Dim.DYNAMIC}, *[None] * (len(args) - 1))
    with torch.no_grad():
        ours = torch.export.export(unroll(model, plan=Plan(time=3)), args, dynamic_shapes=shapes).module()
    for steps in (1, 3, 8, 20):
        compare(model, ours, tensors_of(replace(case, steps=steps), F64)).check()
