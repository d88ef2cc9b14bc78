"""Which nodes a graph gets: no dead ones, few a step, named; and the whole of it, as printed."""

import operator
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from tests.cases import PLANS, Case
from tests.grid import nodes_per_step, unrolling
from unroll import Plan, trace, unroll
from unroll.graphs.results import constant_index

GOLDEN = Path(__file__).parent / "golden"


class Reading(nn.Module):
    """A layer of which `read` takes what it wants."""

    def __init__(self, layer, read):
        super().__init__()
        self.rnn = layer
        self.read = read

    def forward(self, x):
        return self.read(self.rnn(x))


def called(layer, read, steps=8, **kwargs):
    """How often each function is called in the graph of a layer read so."""
    graph = unroll(trace(Reading(layer, read)), steps=steps, **kwargs).graph
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    return Counter(
        node.target.__name__ for node in nodes if node.target not in (operator.getitem, getattr, operator.eq)
    )


# --- dead results -----------------------------------------------------------------------------------------------------


def test_all_results_for_comparison():
    found = called(nn.LSTM(6, 5), lambda r: r)
    assert (found["cat"], found["reshape"], found["tanh"]) == (3 + 1, 1 + 3, 16)


@pytest.mark.parametrize("read", [lambda r: r[0][-1], lambda r: r[1][0][0], lambda r: r[1][0][-1]])
def test_last_step_alone_is_not_stacked(read):
    found = called(nn.LSTM(6, 5), read)
    assert found["cat"] == 3  # the weights and their bias
    assert found["reshape"] == 1  # the input


def test_a_slice_of_all_is_the_whole():
    assert called(nn.LSTM(6, 5), lambda r: r[0][0:]) == called(nn.LSTM(6, 5), lambda r: r[0])
    graph = fx.Graph()
    x = graph.placeholder("x")
    for args in ((x,), (x, 0), (x, 0, 0)):
        assert constant_index(graph.call_function(torch.ops.aten.slice.Tensor, args), x, 2) == (slice(None),) * 2
    assert constant_index(graph.call_function(torch.ops.aten.slice.Tensor, (x, 1, 2)), x, 2) == (
        slice(None),
        slice(2, None),
    )


def test_unused_final_states_are_not_shaped():
    assert called(nn.LSTM(6, 5), lambda r: r[0])["reshape"] == 2
    assert called(nn.LSTM(6, 5), lambda r: r[1][1])["reshape"] == 2
    assert called(nn.LSTM(6, 5), lambda r: r[1][1])["cat"] == 3


def test_last_h_is_not_computed_where_only_c_is_read():
    assert called(nn.LSTM(6, 5), lambda r: r[1][1])["tanh"] == 8 + 7


def test_steps_that_nothing_reads_are_not_computed():
    assert called(nn.GRU(6, 5), lambda r: r[0][2])["tanh"] == 3
    assert called(nn.GRU(6, 5), lambda r: r[0][0])["addmm"] == 2  # the two products with x


@pytest.mark.parametrize(
    ("read", "tanhs"),
    [
        (lambda r: r[0], 16),
        (lambda r: r[0][..., :5], 8),
        (lambda r: r[0][..., 5:], 8),
        (lambda r: r[1][0], 8),
        (lambda r: r[1][1], 8),
        (lambda r: r[0][-1], 8 + 1),
        (lambda r: r[0][0], 1 + 8),
        (lambda r: r[0][-1, :, 5:], 1),
        (lambda r: (r[1][0], r[0][0, :, 5:]), 16),
    ],
)
def test_a_direction_that_nothing_reads_is_not_computed(read, tanhs):
    assert called(nn.RNN(6, 5, bidirectional=True), read)["tanh"] == tanhs


def test_the_last_layer_of_two_keeps_both_directions_of_the_first():
    found = called(nn.RNN(6, 5, num_layers=2, bidirectional=True), lambda r: r[0][..., :5])
    assert found["tanh"] == 8 + 8 + 8


def test_an_unread_layer_leaves_only_its_checks():
    found = called(nn.LSTM(6, 5), lambda r: None)
    assert set(found) == {"_assert"}


def test_weights_of_a_layer_called_twice_are_prepared_once():
    once = called(nn.GRU(6, 5), lambda r: r[0])

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 5)

        def forward(self, x):
            return self.rnn(x)[0], self.rnn(x + 1)[0]

    graph = unroll(trace(Twice()), steps=8).graph
    assert len(graph.find_nodes(op="call_function", target=torch.transpose)) == once["transpose"]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_no_node_is_unread(kind, plan):
    model = Reading(Case(kind, num_layers=2, bidirectional=True).layer(), lambda r: r[0][-1])
    graph = unroll(trace(model), steps=3, plan=plan).graph
    unread = [node for node in graph.nodes if not node.users and node.op != "output"]
    assert {node.target for node in unread} <= {torch._assert}
    before = len(graph.nodes)
    graph.eliminate_dead_code(lambda node: node.op == "output" or node.target is torch._assert)
    assert len(graph.nodes) == before


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "plan", "nodes"),
    [
        (Case("LSTM"), Plan(gates="merged"), 10),
        (Case("LSTM"), Plan(gates="paired"), 10),
        (Case("LSTM"), Plan(gates="split"), 13),
        (Case("LSTM", proj_size=2), Plan(gates="merged"), 11),
        (Case("GRU"), Plan(gates="merged"), 11),
        (Case("GRU"), Plan(gates="paired"), 10),
        (Case("GRU"), Plan(gates="split"), 11),
        (Case("RNN"), Plan(gates="merged"), 2),
        (Case("RNN"), Plan(gates="paired"), 2),
        (Case("RNN"), Plan(gates="split"), 2),
        (Case("RNN"), Plan(products="sums"), 5),
    ],
    ids=str,
)
def test_nodes_a_step(case, plan, nodes):
    assert nodes_per_step(case, plan) == nodes


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_nodes_grow_with_the_steps_alone(kind):
    """No node of the whole sequence is written again at each step."""
    sizes = [len(unroll(trace(nn.Sequential(Case(kind).layer())), steps=t).graph.nodes) for t in (5, 10, 20)]
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0])


def test_time_is_linear_in_the_steps():
    unrolling(20)
    short, long = (min(unrolling(steps).processor_seconds for _ in range(2)) for steps in (50, 200))
    assert long < 4 * 2.5 * short


# --- names ------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(6, 5, num_layers=2, bidirectional=True)})
        self.cell = nn.GRUCell(10, 3)

    def forward(self, x):
        y, (h, c) = self.encoder["lstm"](x)
        return self.cell(y[-1]), y, h, c


def test_names_tell_layer_direction_step_and_gate():
    names = {node.name for node in unroll(trace(Encoder()), steps=8).graph.nodes}
    gates = ("input", "forget", "cell", "output", "c", "h")
    for scope in ("l0", "l0_reverse", "l1", "l1_reverse"):
        for t in range(8):
            first = t == (7 if "reverse" in scope else 0)
            wanted = {f"encoder_lstm_{scope}_t{t}_{gate}" for gate in gates if not (first and gate == "forget")}
            assert wanted <= names
        assert {f"encoder_lstm_{scope}_weight_hh", f"encoder_lstm_{scope}_bias_ih"} <= names
    assert "encoder_lstm_l1_reverse_t6_forget" in names
    assert "cell_l0_t0_new" in names


def test_nodes_keep_the_metadata_of_the_call():
    graph = trace(Encoder())
    for node in graph.graph.nodes:
        node.meta["stack_trace"] = f"line of {node.name}"
    ours = unroll(graph, steps=3)
    (node,) = (node for node in ours.graph.nodes if node.name == "encoder_lstm_l1_t2_forget")
    assert node.meta["stack_trace"] == "line of encoder_lstm"


# --- the printed graph ------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, bidirectional=True)

    def forward(self, words):
        return self.lstm(words)[0]


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRUCell(3, 2)

    def forward(self, x, h):
        return self.gru(x, h)


GRAPHS = {
    "lstm": lambda: unroll(trace(Tagger()), steps=2),
    "lstm_paired": lambda: unroll(trace(Tagger()), steps=2, plan=Plan(gates="paired")),
    "gru_cell": lambda: unroll(trace(Decoder())),
    "lstm_linear": lambda: unroll(trace(Tagger()), steps=2, plan="products=linear"),
    "gru_linear": lambda: unroll(trace(Reading(nn.GRU(3, 2), lambda r: r[1])), steps=2, plan="products=linear"),
    "rnn": lambda: unroll(trace(Reading(nn.RNN(3, 2, num_layers=2, dropout=0.5), lambda r: r[1][-1])), steps=3),
}


def printed(module: fx.GraphModule) -> str:
    """The code, without the statements that only free memory."""
    lines = (line.split(";  ")[0].rstrip() for line in module.code.strip().splitlines())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", GRAPHS)
def test_printed_graph(name):
    """To write the files anew after a change that was meant: `UPDATE_GOLDEN=1 pytest tests/test_graph_nodes.py`."""
    path, code = GOLDEN / f"{name}.txt", printed(GRAPHS[name]())
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(code)
    assert code == path.read_text()
