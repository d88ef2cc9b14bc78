"""Presets whose plan depends on the layer and its sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import unroll
from tests.cases import Case
from unroll import Plan, UnrollError
from unroll.core.plan import PRESETS, Preset
from unroll.core.presets import RULES, Rule, Situation
from unroll.core.recurrence import Recurrence

LAYER = Recurrence("GRU", 3, 4)


def test_names_of_presets_are_a_type_too():
    assert set(get_args(Preset)) == set(PRESETS)


@pytest.mark.parametrize("name", RULES)
def test_rules_make_plans(name):
    for rule in RULES[name]:
        assert replace(PRESETS[name], preset="", **rule.choices) != PRESETS["default"]
        assert "time" not in rule.choices or rule.kind in (
            "onnx",
            "module",
            "torchscript",
            "compiled",
        )  # a graph has no loops
        assert rule.choices.get("products") != "linear"  # modules would have to hold weights otherwise
    assert PRESETS[name].preset == name


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (Rule({}), [Situation(LAYER), Situation(LAYER, 3, 2, packed=True)]),
        (Rule({}, steps=(4, 8)), [Situation(LAYER, 4), Situation(LAYER, 8)]),
        (Rule({}, batch=(2, 3)), [Situation(LAYER, None, 2), Situation(LAYER, 9, 3)]),
        (Rule({}, packed=False), [Situation(LAYER)]),
        (Rule({}, packed=True), [Situation(LAYER, packed=True)]),
        (Rule({}, device="cuda"), [Situation(LAYER, device="cuda")]),
        (Rule({}, kind="onnx"), [Situation(LAYER, kind="onnx", device="cuda")]),
        (Rule({}, layer={"mode": "GRU", "hidden_size": 5}), [Situation(replace(LAYER, hidden_size=5))]),
    ],
    ids=repr,
)
def test_conditions(rule, fits):
    assert all(map(rule.holds, fits))
    assert not rule.holds(Situation(replace(LAYER, is_cell=True), 4, 2, packed=True))
    others = [Situation(LAYER, 3, 1), Situation(LAYER, 9, 4), Situation(LAYER), Situation(LAYER, packed=True)]
    if rule != Rule({}):
        assert not all(map(rule.holds, others))


def test_a_preset_with_rules_is_read_back_from_its_text():
    plan = Plan.of("tensorrt")
    assert str(plan) == "tensorrt" and Plan.of(str(plan)) == plan != Plan()
    assert plan.resolve(Situation(LAYER, 10, kind="onnx")) is plan is plan.resolve(Situation(LAYER, 100))
    assert plan.resolve(Situation(LAYER, 100, kind="onnx")) == Plan(time=4)
    assert str(replace(plan, gates="split")) == "gates=split,preset=tensorrt"
    assert Plan.of(str(replace(plan, gates="split"))) == replace(plan, gates="split")
    with pytest.raises(UnrollError, match="got 'nowhere'; choose one of '', 'tensorrt'"):
        Plan(preset="nowhere")


def test_choices_by_hand_and_frozen_weights_stay(monkeypatch):
    monkeypatch.setitem(RULES, "tensorrt", (Rule({"gates": "split", "time": 8}),))
    plan, at = Plan.of("tensorrt"), Situation(LAYER, 3)
    assert plan.resolve(at) == Plan(gates="split", time=8)
    assert replace(plan, gates="paired").resolve(at) == Plan(gates="paired", time=8)
    assert plan.resolve(replace(at, frozen=True)) == Plan(time=8)


@pytest.fixture
def split_where(monkeypatch):
    """Have the preset `tensorrt` split gates, under conditions."""

    def under(**conditions):
        monkeypatch.setitem(RULES, "tensorrt", (Rule({"gates": "split"}, **conditions),))

    return under


STEPS, BATCH = 3, 2
X = torch.randn(STEPS, BATCH, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model():
    return torch.nn.Sequential(torch.nn.GRU(3, 4)).double().eval()


def products(graph):
    return sum(getattr(n.target, "__name__", "").split(".")[0] in ("addmm", "matmul", "mm") for n in graph.nodes)


def of_program(plan, **given):
    return products(unroll.unroll(torch.export.export(model(), (X,), **given), plan=plan).graph)


def of_exported_module(plan, **given):
    return products(torch.export.export(unroll.unroll(model(), plan=plan), (X,), **given).graph)


def of_graph(plan):
    return products(unroll.unroll(unroll.trace(model()), X, plan=plan).graph)


def of_decompositions(plan):
    table = unroll.decompositions(plan)
    return products(torch.export.export(model(), (X,)).run_decompositions(table).graph)


def of_compiled(plan):
    return compiled(unroll.compile, model(), plan=plan)


def of_compiled_module(plan):
    return compiled(torch.compile, unroll.unroll(model(), plan=plan))


def compiled(compiler, model, **given):
    counts = []

    def backend(graph, inputs):
        counts.append(products(graph.graph))
        return graph

    torch.compiler.reset()
    with torch.no_grad():
        compiler(model, backend=backend, fullgraph=True, **given)(X)
    (count,) = counts
    return count


def of_traced_module(plan):
    return str(torch.jit.trace(unroll.unroll(model(), plan=plan), X).inlined_graph).count("aten::addmm(")


def of_script(plan):
    return str(unroll.unroll(torch.jit.script(model()), X, plan=plan).inlined_graph).count("aten::addmm(")


WAYS = {
    of_program: "graph",
    of_exported_module: "module",
    of_graph: "graph",
    of_decompositions: "graph",
    of_compiled: "graph",
    of_compiled_module: "module",
    of_traced_module: "torchscript",
    of_script: "torchscript",
}
"""Ways to a graph, and the kind of model that asks the rules on each"""


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", WAYS)
def test_rules_hold_for_every_kind_of_model(way, split_where):
    merged, split = way("default"), way("gates=split")
    assert merged < split
    sizes = {"steps": (STEPS, STEPS)} | ({} if WAYS[way] == "torchscript" else {"batch": (BATCH, BATCH)})
    split_where(**sizes, device="cpu", packed=False, kind=WAYS[way], layer={"bidirectional": False})
    assert way("tensorrt") == split
    for other in ({"steps": (4, 9)}, {"batch": (3, 9)}, {"device": "cuda"}, {"packed": True}, {"kind": "onnx"}):
        split_where(**other)
        assert way("tensorrt") == merged


@pytest.mark.parametrize("way", [of_program, of_exported_module])
def test_open_sizes_meet_no_condition(way, split_where):
    shapes = ({1: torch.export.Dim("batch", max=64)},)
    split_where(batch=(1, 100))
    assert way("tensorrt", dynamic_shapes=shapes) == way("default")
    split_where(steps=(1, 100))
    assert way("tensorrt", dynamic_shapes=shapes) == way("gates=split")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", [of_traced_module, of_script])
def test_the_batch_is_open_in_torchscript(way, split_where):
    split_where(batch=(1, 100))
    assert way("tensorrt") == way("default")


class Products(TorchDispatchMode):
    """Counts products, while it lasts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.__name__.split(".")[0] in ("addmm", "mm")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("freeze", [False, True])
def test_a_module_asks_at_each_call(freeze, split_where):
    split_where(steps=(4, 9))
    original = model()
    merged, split, ours = (
        unroll.unroll(original, plan=p, freeze=freeze) for p in ("default", "gates=split", "tensorrt")
    )
    for steps, as_this in ((3, merged), (5, merged if freeze else split)):  # frozen weights are laid out before
        x = X.new_ones(steps, BATCH, 3)
        with Products() as wanted:
            as_this(x)
        with Products() as found:
            result = ours(x)[0]
        assert found.count == wanted.count
        assert torch.allclose(result, original(x)[0], rtol=0, atol=1e-12)


class Twice(torch.nn.Module):
    """One layer, called at two lengths."""

    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(3, 4)

    def forward(self, x):
        return self.rnn(x)[0], self.rnn(x[:9])[0]


@pytest.mark.parametrize("exported", [True, False])
def test_calls_of_different_steps_have_layouts_of_their_own(exported, split_where):
    split_where(steps=(10, 12))
    original, x = Twice().double().eval(), torch.randn(12, 2, 3, dtype=torch.float64)
    graph = torch.export.export(original, (x,)) if exported else unroll.trace(original)
    example = {} if exported else {"args": x}
    done = {plan: unroll.unroll(graph, **example, plan=plan) for plan in ("default", "tensorrt", "gates=split")}
    assert products(done["default"].graph) < products(done["tensorrt"].graph) < products(done["gates=split"].graph)
    run = done["tensorrt"].module() if exported else done["tensorrt"]
    for found, wanted in zip(run(x), original(x), strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("steps", "loops"), [(63, 0), (64, 1)])
def test_files_in_blocks_from_a_number_of_steps_on(steps, loops, tmp_path):
    pytest.importorskip("onnx")
    case = Case("RNN", steps=steps)
    done = unroll.export_onnx(case.model().eval(), case.tensors(), tmp_path / "m.onnx", plan="tensorrt")
    assert done.operators["Scan"] == loops


@pytest.mark.parametrize("plan", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("open_length", [False, True])
def test_packed_rows_run_in_loops_that_the_library_takes(plan, open_length, tmp_path):
    """Its Scan has no booleans, which rows without a step are marked by."""
    pytest.importorskip("onnx")
    case = Case("LSTM", form="packed", steps=7 if open_length else 64)
    shapes = {"input": {0: "time"}, "rest": (None,)} if open_length else None
    model, args = case.model().eval(), case.tensors()
    done = unroll.export_onnx(model, args, tmp_path / "m.onnx", plan=plan, dynamic_shapes=shapes)
    assert done.operators["Scan"] == 1
    assert unroll.check(tmp_path / "m.onnx", target=plan).check()


def test_frozen_layers_keep_their_preset(tmp_path):
    pytest.importorskip("onnx")
    case = Case("GRU", steps=64)
    frozen = unroll.unroll(case.model().eval(), plan="tensorrt", freeze=True)
    done = unroll.export_onnx(frozen, case.tensors(), tmp_path / "m.onnx")
    assert done.operators["Scan"] == 1


def test_layers_of_different_steps_share_weights_by_plan(tmp_path):
    """One layer called at two lengths, of which one runs in a loop."""
    pytest.importorskip("onnx")

    done = unroll.export_onnx(Twice().eval(), torch.randn(70, 2, 3), tmp_path / "m.onnx", plan="tensorrt")
    assert done.operators["Scan"] == 1


LSTM = Recurrence("LSTM", 8, 512)
BOTH, THREE = replace(LSTM, bidirectional=True), replace(LSTM, num_layers=3)


@pytest.mark.parametrize(
    ("layer", "batch", "chosen"),
    [
        (LSTM, 1, "gates=split,products=sums"),
        (BOTH, 1, "gates=split,products=sums"),
        (replace(LSTM, hidden_size=2048), 1, None),
        (LSTM, 2, None),
        (LSTM, 16, None),
        (LSTM, None, None),
        (BOTH, 16, "directions=stacked"),
        (BOTH, 4, None),
        (THREE, 64, "layers=wavefront"),
    ],
)
def test_inductor_on_a_gpu(layer, batch, chosen):
    plan, at = Plan.of("inductor"), Situation(layer, 9, batch, device="cuda")
    assert str(plan.resolve(at)) == (chosen or "inductor")
    for other in (replace(at, device="cpu"), replace(at, trained=True), replace(at, packed=True)):
        assert plan.resolve(other) is plan
