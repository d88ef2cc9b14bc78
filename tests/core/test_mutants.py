"""Wrong recipes, each of which the comparison with torch must catch."""

from dataclasses import replace as changed

import pytest
import torch

from tests.cases import CHOSEN, GRID, Case
from tests.checks import assert_same
from unroll import UnrollError, compare, unroll
from unroll.core import cells, recurrence, schedule

F64 = torch.float64
SMALL_GRID = GRID[:: len(GRID) // 200] + CHOSEN


def caught_by_grid(cases=SMALL_GRID):
    """The cases whose results differ from torch's, or that cannot be run."""
    caught = []
    for case in cases:
        layer = case.layer(F64)
        try:
            assert_same(unroll(layer)(*case.args(F64)), layer(*case.args(F64)))
        except Exception:
            caught.append(case)
    return caught


def patch_cell(monkeypatch, mode, **fields):
    monkeypatch.setitem(cells.CELLS, mode, changed(cells.CELLS[mode], **fields))


def swapped_gates(monkeypatch):
    patch_cell(monkeypatch, "LSTM", gates=("forget", "input", "cell", "output"))
    return "LSTM"


def swapped_gru_gates(monkeypatch):
    patch_cell(monkeypatch, "GRU", gates=("update", "reset", "new"))
    return "GRU"


def onnx_gate_order(monkeypatch):
    patch_cell(monkeypatch, "LSTM", gates=("input", "output", "forget", "cell"))
    return "LSTM"


def reset_before_the_product(monkeypatch):
    def step(x, state, weights, label):
        (h,) = state
        (both, new), (product,) = x, weights.hidden
        h = torch.zeros(new.shape, dtype=new.dtype) if h is None else h
        size = weights.hidden_size
        r, z = torch.sigmoid(both + product(h)[:, : 2 * size]).chunk(2, 1)
        n = torch.tanh(new + product(r * h)[:, 2 * size :])
        return (label(n + z * (h - n), "h"),)

    patch_cell(monkeypatch, "GRU", step=step)
    return "GRU"


def update_the_other_way_round(monkeypatch):
    right = cells.CELLS["GRU"].step

    def step(x, state, weights, label):
        (h,) = right(x, state, weights, label)
        x_new = x[-1]
        old = torch.zeros_like(x_new) if state[0] is None else state[0]
        return (old - h + old,)

    patch_cell(monkeypatch, "GRU", step=step)
    return "GRU"


def folded_gru_bias(monkeypatch):
    """`b_hn` added to the input's side, where reset does not scale it."""
    right = cells.Cell.prepare

    def prepare(self, weights, *args, **kwargs):
        if weights.b_ih is not None and self.candidate == "new":
            *_, b_hn = weights.b_hh.chunk(3)
            moved = torch.cat([torch.zeros_like(b_hn), torch.zeros_like(b_hn), b_hn])
            weights = weights._replace(b_ih=weights.b_ih + moved, b_hh=weights.b_hh - moved)
        return right(self, weights, *args, **kwargs)

    monkeypatch.setattr(cells.Cell, "prepare", prepare)
    return "GRU"


def not_reversed_back(monkeypatch):
    right = schedule.scan

    def scan(step, xs, state, *, reverse=False):
        outputs, state = right(step, xs, state, reverse=reverse)
        return (outputs[::-1] if reverse else outputs), state

    monkeypatch.setattr(schedule, "scan", scan)


def not_reversed(monkeypatch):
    right = schedule.scan
    monkeypatch.setattr(schedule, "scan", lambda step, xs, state, *, reverse=False: right(step, xs, state))


def dropped_bias(monkeypatch):
    right = recurrence.Recurrence.weights

    def weights(self, flat):
        return [w._replace(b_hh=w.b_hh * 0) if w.b_hh is not None else w for w in right(self, flat)]

    monkeypatch.setattr(recurrence.Recurrence, "weights", weights)


def dropped_state(monkeypatch):
    right = schedule.run
    monkeypatch.setattr(schedule, "run", lambda r, p, rows, state, **kwargs: right(r, p, rows, None, **kwargs))


def swapped_states(monkeypatch):
    right = schedule.run

    def run(r, p, rows, state, **kwargs):
        return right(r, p, rows, state and state[::-1], **kwargs)

    monkeypatch.setattr(schedule, "run", run)
    return "LSTM"


def swapped_directions(monkeypatch):
    right = schedule.joined_rows
    monkeypatch.setattr(schedule, "joined_rows", lambda outputs: right(outputs[::-1]))


def dropped_projection(monkeypatch):
    right = cells.Cell.prepare

    def prepare(self, weights, *args, **kwargs):
        prepared = right(self, weights, *args, **kwargs)
        if prepared.projection is None:
            return prepared
        return prepared._replace(projection=torch.eye(*prepared.projection.shape, dtype=F64))

    monkeypatch.setattr(cells.Cell, "prepare", prepare)
    return "LSTM"


def relu_for_tanh(monkeypatch):
    monkeypatch.setitem(cells.CELLS, "RNN_TANH", cells.CELLS["RNN_RELU"])
    return "RNN"


def batch_first_ignored(monkeypatch):
    right = schedule.flat_rows

    def flat_rows(r, input, **kwargs):
        return right(changed(r, batch_first=False), input, **kwargs)

    monkeypatch.setattr(schedule, "flat_rows", flat_rows)


MUTANTS = [
    swapped_gates,
    swapped_gru_gates,
    onnx_gate_order,
    reset_before_the_product,
    update_the_other_way_round,
    folded_gru_bias,
    not_reversed_back,
    not_reversed,
    dropped_bias,
    dropped_state,
    swapped_states,
    swapped_directions,
    dropped_projection,
    relu_for_tanh,
    batch_first_ignored,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_grid_catches(mutant, monkeypatch):
    kind = mutant(monkeypatch)
    caught = caught_by_grid()
    assert len(caught) >= 3, f"{mutant.__name__} goes unnoticed"
    assert kind is None or all(case.kind.startswith(kind) for case in caught)


def test_grid_catches_nothing_when_nothing_is_wrong():
    assert caught_by_grid() == []


@pytest.mark.parametrize("mutant", MUTANTS[:6], ids=lambda mutant: mutant.__name__)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_compare_catches(mutant, dtype, monkeypatch):
    case = Case(mutant(monkeypatch), state=True)
    layer = case.layer(dtype)
    with pytest.raises(UnrollError, match="the rewritten model is not the original"):
        compare(layer, unroll(layer), case.args(dtype)).check()
