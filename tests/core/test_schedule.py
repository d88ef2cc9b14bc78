"""The loops over time, directions and layers: exactly with toy cells, and against torch on all options."""

import itertools

import pytest
import torch

from tests.cases import ALL_PLANS, CELL_KINDS, GRID, LAYER_KINDS, PLANS, Case, replace
from tests.checks import assert_same
from unroll import Plan
from unroll.core import schedule
from unroll.core.cells import CELLS, Cell
from unroll.core.layout import lay_out
from unroll.core.recurrence import CELL_MODES, Recurrence, read_cell, read_layer
from unroll.core.scan import scan, scan_packed
from unroll.core.values import Target
from unroll.core.weights import StepWeights

# --- all options, in float64 --------------------------------------------------------------------------------------


def recurrence_of(case: Case, layer) -> Recurrence:
    return read_cell(layer, CELL_MODES[type(layer)]) if case.is_cell else read_layer(layer)


def scheduled(case: Case, layer, plan):
    """A case by the schedule alone, without a module around it. Packed rows are given sorted."""
    recurrence = recurrence_of(case, layer)
    input, *hx = case.args(torch.float64)
    state = None if not hx else hx[0] if isinstance(hx[0], tuple) else (hx[0],)
    prepared = lay_out(recurrence, recurrence.weights(list(layer.parameters())), plan)
    if case.packed:
        sizes = input.batch_sizes.tolist()
        result = schedule.run(
            recurrence, prepared, input.data, state or zeros(recurrence, sizes[0]), steps=len(sizes), sizes=sizes
        )
        return schedule.joined_rows(result.outputs), tuple(schedule.joined_states(recurrence, result))
    batched = case.form == "batched"
    rows = schedule.flat_rows(recurrence, input, batched=batched)
    steps = 1 if case.is_cell else case.steps
    result = schedule.run(recurrence, prepared, rows, state, steps=steps)
    states = tuple(schedule.joined_states(recurrence, result, batched=batched))
    return states if case.is_cell else (schedule.joined_output(recurrence, result.outputs, batched=batched), states)


def zeros(recurrence: Recurrence, batch: int):
    return tuple(torch.zeros(recurrence.passes, batch, size, dtype=torch.float64) for size in recurrence.state_sizes)


def fused(case: Case, layer):
    """The same by torch."""
    result = layer(*case.args(torch.float64))
    if case.is_cell:
        return result if isinstance(result, tuple) else (result,)
    output, states = result
    return output.data if case.packed else output, states if isinstance(states, tuple) else (states,)


SORTED_GRID = [case for case in GRID if case.form != "unsorted"]


def parts_of_the_grid():
    """All cases for the default and for cells, else each seventh, which misses no option: none has seven values."""
    for kind, plan in itertools.product(LAYER_KINDS + CELL_KINDS, ALL_PLANS):
        whole = plan in PLANS and (plan == Plan() or kind in CELL_KINDS)
        if plan in PLANS and not whole:
            yield pytest.param(kind, plan, 7, id=f"{kind}-{plan}-each seventh")
        yield pytest.param(kind, plan, 1, id=f"{kind}-{plan}", marks=() if whole else pytest.mark.heavy)


@pytest.mark.parametrize(("kind", "plan", "every"), list(parts_of_the_grid()))
def test_grid(kind, plan, every):
    wrong = []
    with torch.no_grad():
        for case in [case for case in SORTED_GRID if case.kind == kind][::every]:
            layer = case.layer(torch.float64)
            try:
                assert_same(scheduled(case, layer, plan), fused(case, layer))
            except AssertionError as error:
                wrong.append(f"{case}: {error}")
    assert not wrong, f"{len(wrong)} cases, such as {wrong[0]}"


def test_the_grid_is_all_there():
    assert len(GRID) == len(set(map(str, GRID))) == 1664
    layers = {name: {getattr(case, name) for case in GRID} for name in vars(Case("LSTM"))}
    assert all(len(values) > 1 for name, values in layers.items() if name != "dropout")


# --- order, reversal and ends, exactly ----------------------------------------------------------------------------


def digits(t, x, state):
    """Writes down what it is given: after 1, 2, 3 the state is 123."""
    return (state[0] * 10 + x,)


def test_scan_goes_forth_and_back():
    assert scan(digits, [1, 2, 3], (0,)) == ([1, 12, 123], (123,))
    assert scan(digits, [1, 2, 3], (0,), reverse=True) == ([321, 32, 3], (321,))


def test_scan_tells_each_step_its_time():
    seen = []
    scan(lambda t, x, state: (seen.append((t, x)), state)[1], "abc", (0,), reverse=True)
    assert seen == [(2, "c"), (1, "b"), (0, "a")]


def test_scan_counts_steps():
    outputs, final = scan(lambda t, x, state: (state[0] + 1, state[1] - 1), [None] * 5, (0, 0))
    assert (outputs, final) == ([1, 2, 3, 4, 5], (5, -5))


# Three sequences 1 2 3 4, 5 6 and 7, as packed rows.
PACKED_ROWS = [torch.tensor(column, dtype=torch.float64)[:, None] for column in ([1, 5, 7], [2, 6], [3], [4])]
SIZES = [3, 2, 1, 1]


def listed(outputs):
    return [output[:, 0].tolist() for output in outputs]


def test_packed_scan_goes_forth():
    start = (torch.zeros(3, 1, dtype=torch.float64),)
    outputs, (final,) = scan_packed(digits, PACKED_ROWS, start, sizes=SIZES)
    assert listed(outputs) == [[1, 5, 7], [12, 56], [123], [1234]]
    assert final[:, 0].tolist() == [1234, 56, 7]


def test_packed_scan_goes_back_from_the_end_of_each_row():
    start = (torch.zeros(3, 1, dtype=torch.float64),)
    outputs, (final,) = scan_packed(digits, PACKED_ROWS, start, sizes=SIZES, reverse=True)
    assert listed(outputs) == [[4321, 65, 7], [432, 6], [43], [4]]
    assert final[:, 0].tolist() == [4321, 65, 7]


def test_packed_scan_starts_each_row_from_its_own_state():
    start = (torch.tensor([[8.0], [9.0], [1.0]], dtype=torch.float64),)
    forth = scan_packed(digits, PACKED_ROWS, start, sizes=SIZES)
    back = scan_packed(digits, PACKED_ROWS, start, sizes=SIZES, reverse=True)
    assert forth[1][0][:, 0].tolist() == [81234, 956, 17]
    assert back[1][0][:, 0].tolist() == [84321, 965, 17]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", [[4], [2, 2, 2], [3, 1], [4, 4, 2, 2, 1], [1, 1], [5, 4, 3, 2, 1]])
def test_packed_scan_counts_the_steps_of_each_row(sizes, reverse):
    def count(t, x, state):
        assert len(x) == len(state[0]) == sizes[t]
        return (state[0] + 1,)

    xs = [torch.zeros(size, 1) for size in sizes]
    _, (final,) = scan_packed(count, xs, (torch.zeros(sizes[0], 1),), sizes=sizes, reverse=reverse)
    assert final[:, 0].tolist() == [sum(size > row for size in sizes) for row in range(sizes[0])]


@pytest.fixture
def writer_cell(monkeypatch):
    """A cell whose state is the digits of its inputs so far, counted from the last feature."""

    def step(x, state, weights, label):
        rows = x[0][..., -1:]
        return (label(rows if state[0] is None else state[0] * 10 + rows, "h"),)

    monkeypatch.setitem(CELLS, "TOY", Cell(("only",), (), ("h",), True, step))
    prepared = StepWeights((lambda rows: rows,), (), None, 1)
    return lambda passes, stacks=0, width=1: schedule.Layout([prepared] * passes, [prepared] * stacks, (width,))


def test_run_reverses_and_stacks(writer_cell):
    toy = Recurrence("TOY", 1, 1, num_layers=2, bidirectional=True)
    rows = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    result = schedule.run(toy, writer_cell(4), rows, None, steps=3)
    # Layer 0 backwards gives 321, 32, 3; the second layer reads that, its last feature.
    forth, back = ([output.at(t).item() for t in range(3)] for output in result.outputs)
    assert forth == [321, 3210 + 32, 32100 + 320 + 3]
    assert back == [300 + 320 + 321, 30 + 32, 3]
    (finals,) = result.finals
    assert [h.item() for h in finals] == [123, 321, 32423, 941]


@pytest.mark.parametrize("state", [None, (torch.tensor([7.0, 8], dtype=torch.float64).reshape(2, 1, 1),)])
def test_stacked_directions_are_separate_ones(writer_cell, state):
    toy = Recurrence("TOY", 1, 1, bidirectional=True)
    rows = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    apart, together = (schedule.run(toy, writer_cell(2, stacks), rows, state, steps=3) for stacks in (0, 1))
    assert [h.item() for h in together.finals[0]] == ([123, 321] if state is None else [7123, 8321])
    assert_same(together.finals, apart.finals)
    for one, other in zip(together.outputs, apart.outputs, strict=True):
        assert_same(one.rows(), other.rows())
        assert_same([one.at(t) for t in range(3)], [other.at(t) for t in range(3)])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_wavefront_is_layer_after_layer(writer_cell, layers, steps, given):
    toy = Recurrence("TOY", 1, 1, num_layers=layers)
    rows = torch.arange(1.0, 2 * steps + 1, dtype=torch.float64).reshape(-1, 1)  # two sequences
    state = (torch.arange(2.0 * layers, dtype=torch.float64).reshape(layers, 2, 1),) if given else None
    seen = []

    class Scopes(Target):
        def enter(self, scope):
            seen.append(scope)

    apart = schedule.run(toy, writer_cell(layers), rows, state, steps=steps)
    together = schedule.run(toy, writer_cell(layers, 1), rows, state, steps=steps, target=Scopes())
    assert_same(together.finals, apart.finals)
    assert_same(together.outputs[0].rows(), apart.outputs[0].rows())
    for t in range(steps):
        assert_same(together.outputs[0].at(t), apart.outputs[0].at(t))
    waves = [scope for scope in dict.fromkeys(seen) if scope.startswith("stacked.t")]
    assert len(waves) == max(0, steps - layers + given)  # all others are steps of one layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 9, 17])
@pytest.mark.parametrize("case", [
    Case("LSTM", num_layers=3), Case("LSTM", num_layers=2, proj_size=2), Case("GRU", num_layers=5, bias=False),
    Case("RNN", num_layers=2), Case("LSTM", num_layers=2, bidirectional=True), Case("GRU", bidirectional=True),
], ids=str)  # fmt: skip
def test_stacks_for_a_gpu_are_layer_after_layer(case, steps, given, masked):
    layer = case.layer(torch.float64)
    recurrence = recurrence_of(case, layer)
    weights = recurrence.weights(list(layer.parameters()))
    rows = torch.randn(3 * steps, recurrence.input_size, dtype=torch.float64)
    state = zeros(recurrence, 3) if given or masked else None
    state = tuple(torch.randn_like(s) for s in state) if state and given else state
    lengths = torch.tensor([steps, (steps + 1) // 2, 1])
    mask = (torch.arange(steps)[:, None] < lengths).reshape(-1, 1) if masked else None
    results, on_gpu, stacks = [], Target().compile_for("cuda"), Plan(directions="stacked", layers="wavefront")
    # frozen weights are laid out for no target, and others for theirs
    for plan, laid_for, target in ((Plan(), Target(), Target()), (stacks, Target(), on_gpu), (stacks, on_gpu, on_gpu)):
        torch.manual_seed(1)
        layout, dropout = lay_out(recurrence, weights, plan, target=laid_for), torch.nn.Dropout(0.5)
        results.append(
            schedule.run(recurrence, layout, rows, state, steps=steps, mask=mask, dropout=dropout, target=target)
        )
    apart = results[0]
    expected = schedule.joined_rows(apart.outputs)
    for together in results[1:]:
        assert_same(together.finals, apart.finals)
        assert_same(schedule.joined_states(recurrence, together), schedule.joined_states(recurrence, apart))
        put_out = schedule.joined_rows(together.outputs)
        # of rows that have no step nobody reads the output
        assert_same(put_out if mask is None else torch.where(mask, put_out, expected), expected)


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("case", [
    Case("LSTM", steps=9), Case("LSTM", bias=False), Case("GRU", steps=9), Case("GRU", bias=False),
    Case("RNN", bias=False),
], ids=str)  # fmt: skip
def test_steps_for_a_gpu_are_those_of_others(case, plan):
    layer = case.layer(torch.float64)
    recurrence = recurrence_of(case, layer)
    weights, rows = recurrence.weights(list(layer.parameters())), torch.randn(3 * case.steps, recurrence.input_size)
    results = []
    for target in (Target(), Target().compile_for("cuda")):
        layout = lay_out(recurrence, weights, plan, target=target)
        results.append(schedule.run(recurrence, layout, rows.double(), None, steps=case.steps, target=target))
    (expected, finals), (put_out, others) = ((schedule.joined_rows(r.outputs), r.finals) for r in results)
    assert_same(put_out, expected)
    assert_same(others, finals)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_wavefront_applies_the_dropout_of_layer_after_layer(writer_cell, steps):
    toy = Recurrence("TOY", 1, 1, num_layers=3)
    rows = torch.ones(2 * steps, 1, dtype=torch.float64)
    results = []
    for stacks in (0, 1):
        torch.manual_seed(0)
        layout = writer_cell(3, stacks)
        results.append(schedule.run(toy, layout, rows, None, steps=steps, dropout=torch.nn.Dropout(0.5)))
    assert_same(results[1].outputs[0].rows(), results[0].outputs[0].rows())
    assert_same(results[1].finals, results[0].finals)


def test_run_applies_dropout_between_layers_only(writer_cell):
    toy, calls = Recurrence("TOY", 1, 1, num_layers=3), []

    def dropout(rows):
        calls.append(tuple(rows.shape))
        return rows * 0

    rows = torch.ones(4 * 2, 1, dtype=torch.float64)
    result = schedule.run(toy, writer_cell(3), rows, None, steps=4, dropout=dropout)
    assert calls == [(8, 1), (8, 1)]
    assert result.outputs[0].rows().tolist() == [[0]] * 8


def test_run_names_each_step(writer_cell):
    said = []

    class Recorder(Target):
        def enter(self, scope):
            self.scope = scope

        def __call__(self, value, name):
            said.append(f"{self.scope}.{name}")
            return value

    toy = Recurrence("TOY", 1, 1, num_layers=2, bidirectional=True)
    schedule.run(toy, writer_cell(4), torch.ones(2, 1), None, steps=2, target=Recorder())
    assert {name for name in said if name.endswith("h")} == {
        f"{layer}.t{t}.h" for layer in ("l0", "l0.reverse", "l1", "l1.reverse") for t in (0, 1)
    }


def test_results_do_not_depend_on_batch_or_length():
    """A row alone, and a beginning alone, are what they are among others and before more."""
    case = Case("LSTM", num_layers=2, steps=6, batch=5)
    layer = case.layer(torch.float64)
    whole = scheduled(case, layer, PLANS[0])[0]
    x = case.args(torch.float64)[0]
    for part, expected in ((x[:, 2:3], whole[:, 2:3]), (x[:4], whole[:4])):
        recurrence = read_layer(layer)
        prepared = lay_out(recurrence, recurrence.weights(list(layer.parameters())), PLANS[0])
        result = schedule.run(recurrence, prepared, schedule.flat_rows(recurrence, part), None, steps=len(part))
        assert_same(schedule.joined_output(recurrence, result.outputs), expected)


def test_case_variants_share_their_weights():
    case = Case("GRU", num_layers=2)
    for a, b in zip(case.layer().parameters(), replace(case, steps=9, batch=1).layer().parameters(), strict=True):
        assert torch.equal(a, b)
