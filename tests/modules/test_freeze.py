"""`unroll(..., freeze=True)`: weights laid out once, in buffers, with the same results."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.cases import CHOSEN, PACKED, PLANS, Case, flat
from tests.checks import assert_equal, assert_same, gradients, problems
from unroll import Plan, Unrolled, UnrollError, streaming, trace, unroll

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

F64 = torch.float64
TWO_LAYERS = [Case(kind, num_layers=2, bidirectional=True, batch_first=True) for kind in ("LSTM", "GRU", "RNN")]
EACH = [*TWO_LAYERS, Case("LSTM", proj_size=2, state=True), Case("LSTMCell"), Case("GRUCell"), Case("RNNCell")]
LAYOUT = {"transpose", "chunk", "cat", "stack", "unbind", "unflatten"}
"""What lays out weights, and takes no part in the steps of one layer in one direction with a state"""


def both(case, **options):
    layer = case.layer(F64)
    return unroll(layer, **options), unroll(layer, freeze=True, **options)


# --- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_result_is_that_of_the_layer_with_parameters(case, plan):
    unfrozen, frozen = both(case, plan=plan)
    # an nn.Linear that is called adds its bias after the product, or in it: which, hangs on what it is given
    assert_as = assert_same if plan.products == "linear" else assert_equal
    assert_as(frozen(*case.args(F64)), unfrozen(*case.args(F64)))
    assert not list(frozen.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", EACH, ids=str)
def test_result_in_other_types(case, dtype):
    layer = case.layer(dtype)
    with torch.no_grad():  # where gradients may be asked for, a layer in half precision runs by another way
        assert_equal(unroll(layer, freeze=True)(*case.args(dtype)), unroll(layer)(*case.args(dtype)))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_gradients_of_inputs_are_the_same(case):
    unfrozen, frozen = both(case)
    found = gradients(frozen, case.args(F64))
    assert found and all(name.startswith("input") for name in found)
    expected = gradients(unfrozen, case.args(F64))
    assert_equal(found, {name: expected[name] for name in found})


def test_dropout_follows_train_and_eval():
    x = torch.randn(4, 3, 6, dtype=F64)
    unfrozen, frozen = both(Case("LSTM", num_layers=3, dropout=0.4))

    def run(layer):
        torch.manual_seed(5)
        return layer(x)[0]

    assert_equal(run(frozen), run(unfrozen))
    trained = run(frozen)
    assert_equal(run(frozen.eval()), run(unfrozen.eval()))
    assert not torch.equal(run(frozen), trained)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_nothing_is_shared_with_the_original(case):
    layer = case.layer(F64)
    names = list(layer.state_dict())
    frozen = unroll(layer, freeze=True)
    before = [*flat(frozen(*case.args(F64)))]
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(3)
    assert_equal([*flat(frozen(*case.args(F64)))], before)
    assert list(layer.state_dict()) == names


@pytest.mark.parametrize("case", EACH, ids=str)
@pytest.mark.parametrize("plan", [Plan(), PLANS[-1]], ids=str)
def test_copies(case, plan):
    _, frozen = both(case, plan=plan)
    expected, file = frozen(*case.args(F64)), io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    other = unroll(case.layer(F64, seed=7), plan=plan, freeze=True)
    other.load_state_dict(frozen.state_dict())
    copies = [copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen)), torch.load(file, weights_only=False), other]
    for copied in [*copies, unroll(frozen), unroll(frozen, freeze=True, plan=plan)]:
        assert_equal(copied(*case.args(F64)), expected)
        assert list(copied.state_dict()) == list(frozen.state_dict())


@pytest.mark.parametrize("case", [EACH[0], EACH[1], EACH[3], EACH[4]], ids=str)
def test_compiled(case):
    torch._dynamo.reset()
    _, frozen = both(case)
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(*case.args(F64)), frozen(*case.args(F64)))


@pytest.mark.parametrize("case", EACH, ids=str)
def test_exported(case):
    model = case.model(F64)
    programs = [torch.export.export(unroll(model, freeze=freeze).eval(), case.tensors(F64)) for freeze in (False, True)]
    unfrozen, frozen = (program.module()(*case.tensors(F64)) for program in programs)
    assert_equal(frozen, unfrozen)
    assert len(programs[1].graph.nodes) < len(programs[0].graph.nodes)
    assert not programs[1].graph_signature.parameters


def operators(graph):
    return {str(getattr(node.target, "__name__", node.target)).partition(".")[0] for node in graph.nodes}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_nothing_is_laid_out_in_an_exported_program(kind):
    """Of a cell, which joins and divides nothing else."""
    case = Case(f"{kind}Cell", state=True)
    for freeze in (False, True):
        program = torch.export.export(unroll(case.model(F64), freeze=freeze), case.tensors(F64))
        # The gates of a step are divided by chunk and split.
        assert bool(operators(program.graph) & (LAYOUT - {"chunk"})) is not freeze


def test_parts_of_a_model():
    """A layer under two names stays one; tied weights are laid out twice; others keep their parameters."""
    model = nn.ModuleDict({"a": nn.GRU(3, 3), "b": nn.GRU(3, 3), "c": nn.GRU(3, 3), "linear": nn.Linear(3, 3)})
    model["same"] = model["a"]
    model["b"].weight_hh_l0 = model["a"].weight_hh_l0
    frozen = unroll(model, freeze=True, where=["a", "b"])
    assert frozen["same"] is frozen["a"]
    assert {name.partition(".")[0] for name, _ in frozen.named_parameters()} == {"linear"} | {"c"}
    assert isinstance(frozen["c"], nn.GRU)
    assert frozen["linear"].weight is model["linear"].weight
    x = torch.randn(4, 2, 3)
    for name in "ab":
        assert_equal(frozen[name](x), unroll(model)[name](x))


def test_where_may_ask_for_the_class_of_a_layer():
    model = nn.ModuleList([nn.LSTM(3, 5), nn.GRU(3, 5)])
    first, second = unroll(model, where=lambda name, layer: isinstance(layer, nn.LSTM), freeze=True)
    assert isinstance(first, Unrolled) and first.frozen is not None and isinstance(second, nn.GRU)


class Scaled(nn.GRU):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, input, hx=None):
        return super().forward(self.scale * input, hx)


def test_subclass_keeps_what_is_its_own():
    layer, x = Scaled(3, 5), torch.randn(4, 2, 3)
    frozen = unroll(layer, freeze=True)
    assert [name for name, _ in frozen.named_parameters()] == ["scale"]
    assert_equal(frozen(x), unroll(layer)(x))
    assert_equal(pickle.loads(pickle.dumps(frozen))(x), frozen(x))


@pytest.mark.parametrize("already", [False, True])
def test_parametrizations_are_folded(already):
    layer, x = nn.GRU(3, 5, dtype=F64), torch.randn(4, 2, 3, dtype=F64)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    parametrizations.spectral_norm(layer, "weight_ih_l0")
    given = unroll(layer) if already else layer
    before = copy.deepcopy(layer.state_dict())
    frozen = unroll(given, freeze=True)
    assert_equal(dict(given.state_dict()), dict(before))
    assert not parametrize.is_parametrized(frozen) and not list(frozen.parameters())
    assert parametrize.is_parametrized(given, "weight_hh_l0")
    assert_equal(frozen(x), unroll(layer).eval()(x))


def test_streaming_of_a_frozen_model():
    x = torch.randn(7, 2, 3, dtype=F64)
    model = nn.Sequential(nn.GRU(3, 5, dtype=F64))
    streamed, expected = streaming(unroll(model, freeze=True), x), streaming(unroll(model), x)
    state = streamed.initial_state()
    assert_equal(streamed(x[:4], state=state), expected(x[:4], state=expected.initial_state()))


# --- what a frozen layer has no more --------------------------------------------------------------------------------


def test_attributes_of_training_say_so():
    frozen = unroll(nn.Sequential(nn.LSTM(3, 5)), freeze=True)[0]
    no_parameters = "0: is frozen and has no parameters any more; use the model that unroll gives without freeze"
    for act in (lambda: frozen.all_weights, frozen.reset_parameters):
        assert problems(act) == [f"{no_parameters}, and freeze that again"]
    with pytest.raises(UnrollError, match="cannot be given another weight_hh_l0"):
        frozen.weight_hh_l0 = nn.Parameter(torch.zeros(20, 5))
    with pytest.raises(UnrollError, match="cannot be given another plan"):
        frozen.plan = Plan(gates="split")
    with pytest.raises(UnrollError, match="has no _flat_weights any more"):
        frozen._flat_weights[0] = torch.zeros(20, 3)
    with pytest.raises(UnrollError, match="cannot be given other _flat_weights"):
        frozen._flat_weights = []
    with pytest.raises(UnrollError, match="cannot be given another plan"):
        unroll(frozen, plan=Plan(gates="split"))
    with pytest.raises(UnrollError, match="cannot be scripted"):
        torch.jit.script(frozen)
    with pytest.raises(UnrollError, match="cannot be traced"):
        torch.jit.trace(frozen, (torch.zeros(4, 2, 3),))
    frozen.flatten_parameters()
    frozen.batch_first = True
    assert frozen(torch.zeros(2, 4, 3))[0].shape == (2, 4, 5)


def test_another_dtype_is_refused():
    frozen, x = unroll(nn.Sequential(nn.LSTM(3, 5)), freeze=True), torch.zeros(4, 2, 3)
    finding = "0: was frozen in torch.float32, and now runs in torch.bfloat16"
    with torch.autocast("cpu", torch.bfloat16):
        assert [p.partition(";")[0] for p in problems(frozen, x)] == [finding]
    assert [p.partition(";")[0] for p in problems(frozen.bfloat16(), x.bfloat16())] == [finding]
    assert frozen.float()(x)[0].dtype == torch.float32


@pytest.mark.parametrize("promoting", [False, True])
def test_autocast_to_the_frozen_type(promoting):
    kind = nn.GRU if promoting else nn.LSTM
    layer, x = kind(3, 5).bfloat16(), torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        frozen = unroll(layer, freeze=True)
        with torch.no_grad():
            assert_equal(frozen(x), unroll(layer)(x))
        assert "was frozen in torch.bfloat16, and now runs in torch.float32" in problems(frozen.float(), x)[0]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_set_from_outside_are_refused():
    model = nn.ModuleList([nn.GRU(3, 5), nn.LSTM(3, 5), nn.LSTM(3, 5)])
    nn.utils.weight_norm(model[0], "weight_hh_l0")
    prune.random_unstructured(model[1], "weight_ih_l0", 0.5)
    found = problems(unroll, model, freeze=True)
    assert [p.partition(";")[0] for p in found] == [
        "0: weight_hh_l0 is set from outside before each call",
        "1: weight_ih_l0 is set from outside before each call",
    ]


@pytest.mark.parametrize("freeze", ["no", 1, None])
def test_anything_else_than_a_bool_is_refused(freeze):
    for model in (nn.LSTM(3, 5), torch.jit.script(nn.LSTM(3, 5))):
        assert problems(unroll, model, freeze=freeze) == [
            f"unroll(freeze={freeze!r}): is neither True nor False; give one of them"
        ]


# --- graphs ---------------------------------------------------------------------------------------------------------


class Traceable(nn.Module):
    """A case as a module that looks at no value."""

    def __init__(self, case):
        super().__init__()
        self.rnn, self.case, self.count = case.layer(F64), case, len(case.tensors())

    def forward(self, x, a=None, b=None, c=None):
        case, given = self.case, [a, b, c][: self.count - 1]
        if case.packed:
            x = pack_padded_sequence(x, given.pop(0), case.batch_first, enforce_sorted=case.form == "packed")
        result = self.rnn(x, tuple(given) if len(given) > 1 else given[0]) if given else self.rnn(x)
        return (pad_packed_sequence(result[0], case.batch_first)[0], result[1]) if case.packed else result


@pytest.mark.parametrize("plan", [Plan(), PLANS[-1]], ids=str)
@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
def test_graph_of_modules(case, plan):
    graph, args = trace(Traceable(case)), case.tensors(F64)
    unfrozen, frozen = (unroll(graph, args, plan=plan, freeze=freeze) for freeze in (False, True))
    assert_equal(frozen(*args), unfrozen(*args))
    assert not list(frozen.parameters())
    assert list(graph.parameters())
    read = {str(node.target) for node in frozen.graph.find_nodes(op="get_attr")}
    assert {name for name, _ in frozen.named_buffers()} == read


def test_graph_of_frozen_layers():
    model, x = nn.Sequential(nn.LSTM(3, 5, 2, bidirectional=True)), torch.randn(4, 2, 3)
    graph = unroll(trace(unroll(model, freeze=True)), (x,))
    assert_equal(graph(x), unroll(model)(x))
    assert not list(graph.parameters())


@pytest.mark.parametrize("plan", [Plan(), PLANS[-1]], ids=str)
@pytest.mark.parametrize("case", [*EACH, Case("GRU", num_layers=2, state=True)], ids=str)
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_graph_of_functions(case, plan):
    args = case.tensors(F64)
    graph = torch.export.export(case.model(F64), args).module()
    unfrozen, frozen = (unroll(graph, plan=plan, freeze=freeze) for freeze in (False, True))
    assert_equal(frozen(*args), unfrozen(*args))
    assert not list(frozen.parameters())
    assert list(graph.parameters())
    assert len(frozen.graph.nodes) < len(unfrozen.graph.nodes)
    assert all("val" in node.meta for node in frozen.graph.find_nodes(op="get_attr"))
    program = torch.export.export(frozen, args)
    assert_equal(program.module()(*args), frozen(*args))


def test_graph_of_a_function_on_packed_rows():
    weights = [w.detach() for w in nn.GRU(3, 5, bidirectional=True, dtype=F64).parameters()]
    packed = pack_sequence([torch.randn(n, 3, dtype=F64) for n in (5, 3, 1)])
    args = packed.data, packed.batch_sizes, torch.randn(2, 3, 5, dtype=F64)

    def model(data, sizes, state):
        return torch.gru(data, sizes, state, weights, True, 1, 0.0, False, True)

    graph = make_fx(model, tracing_mode="real", pre_dispatch=True)(*args)
    unfrozen, frozen = (unroll(graph, freeze=freeze) for freeze in (False, True))
    assert_equal(frozen(*args), unfrozen(*args))
    assert not {name for name, _ in frozen.named_buffers()} & {name for name, _ in unfrozen.named_buffers()}


def test_blocks_in_a_loop():
    torch._dynamo.reset()
    unfrozen, frozen = both(Case("GRU", bidirectional=True), plan=Plan(time=2))
    compiled = torch.compile(frozen, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for steps in (4, 9):
            x = torch.randn(steps, 3, 6, dtype=F64)
            assert_same(compiled(x), unfrozen(x))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_frozen_graph_refuses_another_dtype(functional):
    model, x = nn.Sequential(nn.LSTM(3, 5)), torch.zeros(4, 2, 3)
    graph = torch.export.export(model, (x,)).module() if functional else trace(model)
    frozen = unroll(graph, None if functional else (x,), freeze=True)
    frozen(x)
    with pytest.raises(AssertionError, match=r"0: was frozen in torch\.float32"):
        frozen.double()(x.double())


def test_weights_that_are_no_attributes_are_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w_hh = nn.Parameter(torch.zeros(20, 5))
            self.register_buffer("b", torch.zeros(20))

        def forward(self, x, h, c, w_ih):
            self.b.add_(x.sum())
            return torch.lstm_cell(x, (h, c), w_ih, self.w_hh * 2, self.b, self.b)

    args = (torch.zeros(2, 3), torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(20, 3))
    graph = torch.fx.symbolic_trace(Functional())
    unroll(graph, args)
    found = problems(unroll, graph, args, freeze=True)
    assert [p.partition(";")[0] for p in found] == [
        "lstm_cell: takes its weight w_ih as an input of the graph",
        "lstm_cell: takes its weight mul from other operations of the graph",
        "lstm_cell: has the weight b, to which the graph writes",
    ]


# --- what has no frozen form ----------------------------------------------------------------------------------------


def test_refused_for_programs_and_scripts():
    model, x = nn.Sequential(nn.GRU(3, 5)), torch.zeros(4, 2, 3)
    place = "unroll(freeze=True): was given for"
    assert problems(unroll, torch.export.export(model, (x,)), freeze=True) == [
        f"{place} an ExportedProgram; export what unroll(module, freeze=True) returns"
    ]
    assert problems(unroll, torch.jit.script(model), freeze=True) == [
        f"{place} a ScriptModule; leave freeze out, and use torch.jit.freeze"
    ]
    assert problems(unroll, "model.onnx", freeze=True) == [
        f"{place} an ONNX model; leave freeze out: constants are always folded there"
    ]
    inside = nn.ModuleList([torch.jit.script(nn.GRU(3, 5))])
    assert problems(unroll, inside, freeze=True) == [
        "0: is a ScriptModule, which unroll does not freeze; leave freeze out, and use torch.jit.freeze"
    ]


def test_gradients_of_frozen_weights_are_refused():
    (problem,) = problems(unroll, nn.Sequential(nn.GRU(3, 5)), plan="gradients=joined", freeze=True)
    assert "0: runs with gradients='joined', and frozen weights have no gradients" in problem


def test_a_checkpoint_with_parameters_is_refused_in_words():
    model = nn.Sequential(nn.GRU(3, 5))
    frozen = unroll(model, freeze=True)
    for strict in (True, False):
        (problem,) = problems(lambda strict=strict: frozen.load_state_dict(model.state_dict(), strict=strict))
        assert problem == (
            "0: is frozen and cannot load weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0; "
            "use the model that unroll gives without freeze, and freeze that again"
        )
    frozen.load_state_dict(unroll(model, freeze=True).state_dict())
