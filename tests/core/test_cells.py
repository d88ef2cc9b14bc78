"""One step of each cell, against formulas and against torch's cells."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.cases import FEATURES, HIDDEN, PROJECTION, Case
from tests.checks import assert_same
from unroll.core.cells import CELLS
from unroll.core.recurrence import CELL_MODES, read_cell
from unroll.core.weights import Precision, Weights

LAYOUTS = ("merged", "paired", "split")
CELL_CASES = [
    Case("LSTMCell"),
    Case("LSTMCell", bias=False),
    Case("GRUCell"),
    Case("GRUCell", bias=False),
    Case("RNNCell"),
    Case("RNNCell", nonlinearity="relu", bias=False),
]


def unlabelled(value, name):
    return value


def one_step(layer, layout, x, state, label=unlabelled, precision=None):
    """A step with the weights of a torch cell."""
    recurrence = read_cell(layer, CELL_MODES[type(layer)])
    weights = recurrence.weights(list(layer.parameters()))[0]
    prepared = recurrence.cell.prepare(weights, layout, recurrence.hidden_size, precision)
    return recurrence.cell.step(tuple(inputs(x) for inputs in prepared.inputs), state, prepared, label)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_a_step_is_that_of_torchs_cell(case, layout):
    layer = case.layer(torch.float64)
    (x,) = case.args(torch.float64)
    states = [torch.randn(x.shape[0], HIDDEN, dtype=torch.float64) for _ in CELLS[read(layer).mode].states]
    expected = layer(x, tuple(states) if len(states) > 1 else states[0])
    assert_same(one_step(layer, layout, x, tuple(states)), expected if len(states) > 1 else (expected,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_a_state_of_none_is_a_state_of_zeros(case, layout):
    layer = case.layer(torch.float64)
    (x,) = case.args(torch.float64)
    count = len(read(layer).cell.states)
    zeros = (torch.zeros(x.shape[0], HIDDEN, dtype=torch.float64),) * count
    assert_same(one_step(layer, layout, x, (None,) * count), one_step(layer, layout, x, zeros))


def read(layer):
    return read_cell(layer, CELL_MODES[type(layer)])


def test_lstm_formula():
    layer = nn.LSTMCell(FEATURES, HIDDEN, dtype=torch.float64)
    x, h, c = (torch.randn(3, size, dtype=torch.float64) for size in (FEATURES, HIDDEN, HIDDEN))
    rows = x @ layer.weight_ih.T + layer.bias_ih + h @ layer.weight_hh.T + layer.bias_hh
    i, f, g, o = (rows[:, k * HIDDEN : (k + 1) * HIDDEN] for k in range(4))
    c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
    assert_same(one_step(layer, "merged", x, (h, c)), (o.sigmoid() * c_next.tanh(), c_next))


def test_gru_formula_resets_after_the_product():
    layer = nn.GRUCell(FEATURES, HIDDEN, dtype=torch.float64)
    x, h = (torch.randn(3, size, dtype=torch.float64) for size in (FEATURES, HIDDEN))
    of_x, of_h = x @ layer.weight_ih.T + layer.bias_ih, h @ layer.weight_hh.T + layer.bias_hh
    (xr, xz, xn), (hr, hz, hn) = of_x.split(HIDDEN, 1), of_h.split(HIDDEN, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    assert_same(one_step(layer, "split", x, (h,)), ((1 - z) * n + z * h,))


def test_projection_is_applied_to_h_alone():
    size = {"dtype": torch.float64}
    weights = Weights(
        torch.randn(4 * HIDDEN, FEATURES, **size),
        torch.randn(4 * HIDDEN, PROJECTION, **size),
        w_hr=torch.randn(PROJECTION, HIDDEN, **size),
    )
    wide = weights._replace(w_hr=torch.eye(HIDDEN, **size))
    x, h, c = torch.randn(3, FEATURES, **size), torch.randn(3, PROJECTION, **size), torch.randn(3, HIDDEN, **size)
    cell, results = CELLS["LSTM"], []
    for w in (weights, wide):
        prepared = cell.prepare(w, "merged", HIDDEN)
        results.append(cell.step(tuple(f(x) for f in prepared.inputs), (h, c), prepared, unlabelled))
    (h_small, c_small), (h_wide, c_wide) = results
    assert_same(h_small, h_wide @ weights.w_hr.T)
    assert_same(c_small, c_wide)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("LSTMCell", {"input", "forget", "cell", "output", "c", "h"}),
        ("GRUCell", {"reset", "update", "new", "h"}),
        ("RNNCell", {"h"}),
    ],
)
def test_every_gate_and_state_is_named_once(kind, names, layout):
    layer, said = Case(kind).layer(), []

    def label(value, name):
        assert value.shape == (3, HIDDEN)
        said.append(name)
        return value

    count = len(read(layer).cell.states)
    one_step(layer, layout, torch.randn(3, FEATURES), (torch.randn(3, HIDDEN),) * count, label)
    assert sorted(said) == sorted(names)


class Calls(TorchFunctionMode):
    """Records which functions are called on tensors."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


CLOSED = {"addmm", "matmul", "add", "sub", "mul", "sigmoid", "tanh", "relu", "split", "chunk", "cat", "transpose", "to"}
CLOSED |= {"neg"}  # of a bias, where gradients may be asked for; files have none


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CELL_CASES, ids=str)
def test_cells_call_a_closed_set_of_functions(case, layout):
    layer = case.layer(torch.bfloat16)
    count = len(read(layer).cell.states)
    state = tuple(torch.randn(3, HIDDEN, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)[:count])
    x = torch.randn(3, FEATURES, dtype=torch.bfloat16)
    with Calls() as calls:
        one_step(layer, layout, x, state, precision=Precision(torch.bfloat16, torch.float32))
    assert calls.names <= CLOSED, f"{calls.names - CLOSED} outside the set that every graph can write"


@pytest.mark.parametrize("mode", CELLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_are_counted_by_the_layout(mode, layout):
    cell = CELLS[mode]
    groups = cell.products(layout)
    assert [gate for group in groups for gate in group] == [*cell.sigmoid, cell.candidate]
    counts = {"merged": 1, "paired": 2 if cell.sigmoid else 1, "split": len(cell.gates)}
    assert len(groups) == counts[layout]
