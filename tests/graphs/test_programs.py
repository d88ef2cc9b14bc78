"""The pass on exported programs."""

from __future__ import annotations

import copy
import io
import operator
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

from tests.cases import CHOSEN, DROPOUT, PLANS, Case, flat, replace
from unroll import Plan, UnrollError, compare, decompositions, streaming, unroll
from unroll.core.recurrence import CELL_MODES, read_call, read_cell, read_layer
from unroll.graphs.calls import form_of
from unroll.graphs.functions import bind

# What torch's own exporter and packager say while they work.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
]


def recurrent(program: ExportedProgram) -> list[str]:
    """The recurrent operators of a program, branches of control flow included."""
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return [node.name for part in parts for node in part.graph.nodes if form_of(node)]


def exported(case: Case, dtype: torch.dtype = torch.float64, **options) -> ExportedProgram:
    program = export(case.model(dtype), case.tensors(dtype), **options)
    assert recurrent(program)
    return program


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_a_program_computes_the_same(case):
    program = exported(case, strict=False)
    text = str(program)
    unrolled = unroll(program)
    assert not recurrent(unrolled)
    compare(program.module(), unrolled.module(), case.tensors(torch.float64), gradients=True).check()
    assert str(program) == text


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_every_plan(kind, plan):
    case = Case(kind, num_layers=2, bidirectional=True)
    program = exported(case)
    compare(program.module(), unroll(program, plan=plan).module(), case.tensors(torch.float64)).check()


AT_ONCE = [Plan(directions="stacked"), Plan(layers="wavefront")]
"""Plans whose steps are those of several passes."""


@pytest.mark.parametrize("plan", AT_ONCE, ids=str)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_an_empty_batch(kind, state, plan):
    case = Case(kind, num_layers=2, bidirectional=plan.directions == "stacked", batch=0, state=state)
    program = exported(case)
    ours, theirs = (list(flat(p.module()(*case.tensors(torch.float64)))) for p in (unroll(program, plan=plan), program))
    assert [part.shape for part in ours] == [part.shape for part in theirs]
    assert ours[0].shape[:2] == (4, 0)


@pytest.mark.parametrize("plan", AT_ONCE, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_dynamic_batch_in_plans_that_stack(kind, plan):
    """Empty ones too."""
    case = Case(kind, num_layers=2, bidirectional=plan.directions == "stacked")
    args = case.tensors(torch.float64)
    program = export(case.model(torch.float64), args, dynamic_shapes=({1: Dim("batch", min=0)},))
    unrolled = unroll(program, plan=plan).module()
    for size in (2, 5):
        compare(program.module(), unrolled, replace(case, batch=size).tensors(torch.float64)).check()
    assert [part.shape[1] for part in unrolled(*replace(case, batch=0).tensors(torch.float64))][:2] == [0, 0]


@pytest.mark.parametrize("case", [c for c in CHOSEN if c.steps != 1][::3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_as_good_as_the_operator(case, dtype):
    program = exported(case, dtype)
    compare(case.model(dtype), unroll(program).module(), case.tensors(dtype)).check()


@pytest.mark.parametrize("case", [c for c in CHOSEN if c.form == "batched" and c.kind != "RNN"][::2], ids=str)
def test_a_dynamic_batch_stays_dynamic(case):
    case = replace(case, batch=3)
    args = case.tensors(torch.float64)
    axis = 0 if case.is_cell or case.batch_first else 1
    axes = [axis] + [0 if case.is_cell else 1] * (len(args) - 1)
    batch = Dim("batch")
    shapes = [{axis: batch} for axis in axes]
    program = export(case.model(torch.float64), args, dynamic_shapes=(shapes[0], tuple(shapes[1:]))[: 1 + case.state])
    unrolled = unroll(program)
    assert unrolled.range_constraints == program.range_constraints
    assert unrolled.range_constraints
    for size in (2, 3, 7):
        compare(program.module(), unrolled.module(), replace(case, batch=size).tensors(torch.float64)).check()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", DROPOUT, ids=str)
def test_training_keeps_dropout_between_layers(case, strict):
    program = export(case.model(torch.float64).train(), case.tensors(torch.float64), strict=strict)
    unrolled = unroll(program)
    compare(program.module(), unrolled.module(), case.tensors(torch.float64), gradients=True).check()
    first, second = (next(flat(unrolled.module()(*case.tensors(torch.float64)))) for _ in range(2))
    assert not torch.equal(first, second)


def test_evaluation_has_no_dropout():
    case = DROPOUT[0]
    unrolled = unroll(export(case.model(torch.float64).eval(), case.tensors(torch.float64)))
    assert not [node for node in unrolled.graph.nodes if "dropout" in str(node.target)]


class Tagger(nn.Module):
    """An embedding in front, a layer called twice, one whose output is read in part."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True)
        self.decoder = nn.GRU(10, 4, batch_first=True)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, tokens):
        encoded, (h, _) = self.encoder(self.embedding(tokens))
        first, state = self.decoder(encoded)
        second, state = self.decoder(encoded.flip(1), state)
        return {"tags": first + second * self.scale, "last": encoded[:, -1], "forward": encoded[..., :5], "top": h[-1]}


@pytest.fixture(scope="module", params=[True, False], ids=["strict", "non_strict"])
def tagger(request):
    """A model and its program, which no test changes."""
    torch.manual_seed(0)
    model = Tagger().double()
    tokens = torch.randint(0, 11, (2, 6))
    return model, export(model, (tokens,), dynamic_shapes=({0: Dim("batch")},), strict=request.param)


def test_signature_names_and_metadata_survive(tagger):
    model, program = tagger
    unrolled = unroll(program)
    before, after = program.graph_signature, unrolled.graph_signature
    assert [spec.target for spec in after.input_specs] == [spec.target for spec in before.input_specs]
    assert [spec.arg.name for spec in after.input_specs] == [spec.arg.name for spec in before.input_specs]
    assert list(unrolled.state_dict) == list(program.state_dict)
    assert set(unrolled.state_dict) == set(model.state_dict())
    assert all(unrolled.state_dict[key] is value for key, value in program.state_dict.items())
    assert unrolled.range_constraints == program.range_constraints
    unrolled.validate()
    gates = [node for node in unrolled.graph.nodes if node.name == "encoder_l1_reverse_t3_forget"]
    assert len(gates) == 1
    assert gates[0].meta["val"].shape[1:] == (5,)
    assert list(gates[0].meta["nn_module_stack"].values())[-1][0] == "encoder"
    lstm = next(node for node in program.graph.nodes if node.target is torch.ops.aten.lstm.input)
    assert gates[0].meta.get("stack_trace") == lstm.meta.get("stack_trace")
    for node in unrolled.graph.nodes:
        assert node.op == "output" or "val" in node.meta, node


ONE_IS_HEAVY = pytest.mark.parametrize(
    "tagger", [pytest.param(True, marks=pytest.mark.heavy), False], ids=["strict", "non_strict"], indirect=True
)


@ONE_IS_HEAVY
def test_every_road_out_of_a_program_agrees(tagger):
    _, program = tagger
    unrolled = unroll(program)
    inputs = [(torch.randint(0, 11, (batch, 6)),) for batch in (2, 5)]
    compare(program.module(), unrolled.module(), inputs).check()
    buffer = io.BytesIO()
    torch.export.save(unrolled, buffer)
    buffer.seek(0)
    compare(program.module(), torch.export.load(buffer).module(), inputs).check()
    decomposed = unrolled.run_decompositions()
    assert not recurrent(decomposed)
    compare(program.module(), decomposed.module(), inputs).check()
    compiled = torch.compile(unrolled.module(), fullgraph=True, backend="aot_eager", dynamic=True)
    compare(program.module(), compiled, inputs).check()
    assert str(unroll(unrolled).graph) == str(unrolled.graph)


@pytest.mark.heavy
def test_a_package_of_aot_inductor_agrees(tmp_path):
    model = Tagger()
    tokens = torch.randint(0, 11, (2, 4))
    unrolled = unroll(export(model, (tokens,), dynamic_shapes=({0: Dim("batch", max=16)},)))
    path = torch._inductor.aoti_compile_and_package(unrolled, package_path=str(tmp_path / "model.pt2"))
    compare(model, torch._inductor.aoti_load_package(path), [(tokens,), (torch.randint(0, 11, (5, 4)),)]).check()


def test_dead_results_are_not_computed():
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(6, 5, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0][:, -1, :5]

    program = export(Last(), (torch.randn(2, 4, 6),))
    names = [node.name for node in unroll(program).graph.nodes]
    assert [name for name in names if name.startswith("rnn_l0_t3")]
    assert not [name for name in names if "reverse_t" in name or "results_cat" in name]


def test_branches_of_control_flow():
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(6, 5)

        def forward(self, x):
            weights = list(self.rnn.parameters())

            def run(y):
                return torch.gru(y, y.new_zeros(1, 2, 5), weights, True, 1, 0.0, False, False, False)[0]

            return torch.cond(x.sum() > 0, run, lambda y: run(-y), (x,))

    model = Either().double()
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    program = export(model, (x,))
    assert len(recurrent(program)) == 2
    unrolled = unroll(program)
    assert not recurrent(unrolled)
    compare(model, unrolled.module(), [(x.abs(),), (-x.abs(),)]).check()


def test_the_readers_agree():
    for case in CHOSEN + DROPOUT:
        layer = case.layer()
        read = read_cell(layer, CELL_MODES[type(layer)]) if case.is_cell else read_layer(layer)
        program = exported(case, torch.float32, strict=False)
        node = next(node for node in program.graph.nodes if form_of(node))
        kind, form = form_of(node)
        given = bind(form, node.args, node.kwargs)
        shapes = [weight.meta["val"].shape for weight in given["params"] if weight is not None]
        names = ("has_biases", "num_layers", "dropout", "bidirectional", "batch_first")
        assert read_call(kind, shapes, **{name: given[name] for name in names}, is_cell=case.is_cell) == read, case


def test_cost_is_linear_in_steps():
    def nodes(steps: int) -> int:
        case = Case("LSTM", num_layers=2, bidirectional=True, steps=steps)
        return len(unroll(exported(case)).graph.nodes)

    assert nodes(40) - nodes(30) == nodes(30) - nodes(20)


def test_where_chooses_by_name(tagger):
    _, program = tagger
    some = unroll(program, where="encoder")
    assert len(recurrent(some)) == 2
    tokens = torch.randint(0, 11, (3, 6))
    compare(program.module(), some.module(), (tokens,)).check()
    with pytest.raises(
        UnrollError, match=r"where='coder': names no recurrent layer; the recurrent layers are: encoder, decoder$"
    ):
        unroll(program, where="coder")


def test_arguments_without_meaning_are_refused(tagger):
    _, program = tagger
    for name, value in {"args": (1,), "steps": 3, "rules": {}}.items():
        with pytest.raises(UnrollError, match=f"unroll\\({name}=...\\): was given for an ExportedProgram"):
            unroll(program, **{name: value})


@pytest.mark.parametrize("case", CHOSEN[::4] + DROPOUT[:1], ids=str)
def test_the_table_of_decompositions(case):
    model = case.model(torch.float64).train()
    args = case.tensors(torch.float64)
    program = export(model, args)
    decomposed = program.run_decompositions(torch.export.default_decompositions() | decompositions(Plan("paired")))
    assert not recurrent(decomposed)
    targets = {node.target for node in decomposed.graph.nodes if node.op == "call_function"}
    assert torch.ops.aten.addmm.default in targets or torch.ops.aten.mm.default in targets
    compare(model, decomposed.module(), args).check()


@ONE_IS_HEAVY
def test_the_program_can_be_copied_and_traced_again(tagger):
    _, program = tagger
    unrolled = unroll(program)
    tokens = (torch.randint(0, 11, (2, 6)),)
    again = export(unrolled.module(), tokens)
    compare(unrolled.module(), again.module(), tokens).check()
    copied = copy.deepcopy(unrolled.graph_module)
    assert [node.target for node in copied.graph.nodes if node.target is not operator.getitem]


OPEN = """
import torch
from torch import nn
from torch.export import Dim, _patches, export
from unroll import Plan, UnrollError, unroll

model, x, sizes = nn.Sequential(nn.LSTM(3, 5)).eval(), torch.randn(6, 2, 3), ({0: Dim.DYNAMIC},)
with _patches.register_lstm_while_loop_decomposition():
    program = export(model, (x,), dynamic_shapes=sizes)
for options in ({}, {"where": "0"}, {"plan": Plan(gates="split")}):
    try:
        unroll(program, **options)
    except UnrollError as error:
        assert "0: the number of time steps is unknown; fix it in the export" in str(error)
        assert "steps=" not in str(error) and "unroll(module, plan=Plan(time=16))" in str(error)
        print("refused")
"""


def test_an_open_number_of_steps_is_refused_with_advice_that_is_taken():
    """`steps=` is refused for programs. Torch's decomposition stays in its tables: another process has it."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OPEN], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused"] * 3, done.stderr
    model, x = nn.Sequential(nn.LSTM(3, 5)).eval(), torch.randn(6, 2, 3)
    with torch.no_grad():
        program = export(unroll(model, plan=Plan(time=16)), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    longer = torch.randn(40, 2, 3)
    torch.testing.assert_close(program.module()(longer)[0], model(longer)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_products_are_found_by_their_source(strict):
    """As quantizers look for them, in programs that were saved too."""
    model, x = nn.Sequential(nn.LSTM(3, 4, num_layers=2)), torch.randn(4, 2, 3)
    program = unroll(torch.export.export(model, (x,), strict=strict), plan="products=linear")
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        parts = get_source_partitions(each.graph, [nn.functional.linear])[nn.functional.linear]
        products = each.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        assert len(products) == 2 * (1 + 3)  # step 0 has no state
        assert [part.output_nodes for part in parts] == [[node] for node in products]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x, y, mask=None):
        return self.rnn(x)[0] - self.rnn(y)[0]


@pytest.mark.parametrize("strict", [True, False])
def test_a_program_that_reads_one_argument_in_place_of_another(strict):
    """`torch.export` gives all users of a tensor that is given twice to one of the arguments."""
    x, y = torch.randn(2, 5, 2, 3).unbind()
    for take in (unroll, streaming):
        with pytest.raises(UnrollError, match=r"^x: was exported with the tensor of another argument.* of its own for"):
            take(export(Pair(), (x, x), strict=strict))
    unread = torch.zeros(2)
    for args in ((x, y), (x, x.clone(), unread), (x, y, unread)):
        assert unroll(export(Pair(), args, strict=strict)).example_inputs
