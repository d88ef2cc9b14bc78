"""`record`: gates and states of unrolled layers, by name, with their gradients."""

import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils.rnn import pad_packed_sequence

from tests.cases import CHOSEN, PACKED, Case
from tests.checks import assert_same, problems
from unroll import Plan, UnrollError, record, trace, unroll

F64 = torch.float64
GATES = {"LSTM": "input forget cell output h c", "GRU": "reset update new h", "RNN": "h"}


def names(case, place="rnn"):
    passes = [
        f"l{layer}{side}" for layer in range(case.num_layers) for side in ("", ".reverse")[: 1 + case.bidirectional]
    ]
    return {f"{place}.{p}.{gate}" for p in passes for gate in GATES[case.kind.removesuffix("Cell")].split()}


@pytest.mark.parametrize("case", CHOSEN + PACKED, ids=str)
@pytest.mark.parametrize("plan", [Plan(), Plan(gates="split"), Plan(products="linear"), Plan(recompute=3)], ids=str)
def test_gates_add_up_to_the_results(case, plan):
    """By the formulas of torch's documentation: the states of the record are those that its gates make."""
    model = unroll(case.model(F64), plan=plan)
    with record(model) as gates:
        results = model(*case.tensors(F64))
    assert gates.keys() == names(case)
    last = case.num_layers - 1
    sides = ("", ".reverse")[: 1 + case.bidirectional]
    h = torch.cat([gates[f"rnn.l{last}{side}.h"] for side in sides], -1)
    if not case.is_cell:
        output = results[0] if not (case.batch_first and case.form != "unbatched") else results[0].transpose(0, 1)
        assert_same(h.reshape(output.shape), output)
    else:
        assert_same(h[0].reshape(results[0].shape), results[0])
    if case.kind == "LSTM" and not case.proj_size:
        for layer in range(case.num_layers):
            i, f, g, o, h, c = (gates[f"rnn.l{layer}.{gate}"] for gate in GATES["LSTM"].split())
            assert_same(h, o * torch.tanh(c))
            assert_same(c[1:], torch.where(f[1:] > 0, f[1:] * c[:-1] + i[1:] * g[1:], 0))


def test_gradients():
    layer, x = nn.GRU(3, 5, 2, bidirectional=True).double(), torch.randn(6, 2, 3, dtype=F64)
    for plan in (Plan(), Plan(recompute=4)):
        model = unroll(nn.Sequential(layer), plan=plan)
        with record(model, ["*.update", "0.l1.h"]) as gates:
            output, _ = model(x)
            output.square().sum().backward()  # which runs blocks anew: they are not recorded again
        assert set(gates) == {f"0.l{n}{side}.update" for n in (0, 1) for side in ("", ".reverse")} | {"0.l1.h"}
        assert set(gates.grad) == set(gates)
        h = gates.grad["0.l1.h"]
        assert_same(h[-1], 2 * output[-1, :, :5])  # nothing follows the last step
        assert all(g.abs().max() > 0 and g.shape == (6, 2, 5) for g in gates.grad.values())
        # a loss may be made of gates
        model.zero_grad()
        with record(model, "*.update") as gates:
            model(x)
        (weight_grad,) = torch.autograd.grad(gates["0.l0.update"].sum(), [layer.weight_ih_l0])
        assert weight_grad.abs().max() > 0
    with torch.no_grad(), record(model) as gates:
        model(x)
    with pytest.raises(UnrollError, match="run the model with gradients"):
        _ = gates.grad["0.l0.h"]


def test_a_gradient_is_that_of_the_step():
    """Of the sum of the last `c`: one in the last step, and before it what goes through `c` and through `h`."""
    model, x = unroll(nn.LSTM(3, 4).double()), torch.randn(5, 1, 3, dtype=F64)
    with record(model, "*.c") as gates:
        output, (_, last) = model(x)
        last.sum().backward()
    pieces = gates["LSTM.l0.c"]
    assert_same(gates.grad["LSTM.l0.c"][-1], torch.ones(1, 4, dtype=F64))
    state = (output[3:4].detach(), pieces[3:4].detach())

    def through_h(c):
        # h of step 3 is o * tanh(c), with the output gate as it was
        o = state[0] / torch.tanh(state[1])
        return model(x[4:], (o * torch.tanh(c), c))[1][1].sum()

    (expected,) = torch.autograd.grad(through_h(c := state[1].clone().requires_grad_()), [c])
    assert_same(gates.grad["LSTM.l0.c"][3:4], expected)


@pytest.mark.parametrize("form", ["packed", "unsorted"])
def test_rows_of_packed_sequences(form):
    case = Case("GRU", form=form, bidirectional=True)
    layer, lengths = unroll(case.layer(F64)), case.lengths()
    packed = case.args(F64)[0]
    with record(layer) as gates:
        output, _ = layer(packed)
    padded, _ = pad_packed_sequence(output)
    h = torch.cat([gates["GRU.l0.h"], gates["GRU.l0.reverse.h"]], -1)
    assert_same(h, padded)
    for row, length in enumerate(lengths):
        assert not gates["GRU.l0.update"][length:, row].any()
        assert (gates["GRU.l0.update"][:length, row] > 0).all()


def test_calls_follow_each_other():
    cell = unroll(nn.Sequential(nn.LSTMCell(3, 5)))
    state = None
    with record(cell, "0.l0.h") as gates:
        states = [state := cell[0](torch.randn(2, 3), state) for _ in range(4)]
    assert_same(gates["0.l0.h"], torch.stack([h for h, _ in states]))
    layer = unroll(nn.GRU(3, 5))
    with record(layer) as gates:
        layer(torch.randn(4, 2, 3))
        layer(torch.randn(4, 3, 3))
    assert "record each call by itself" in problems(lambda: gates["GRU.l0.h"])[0]


def test_only_the_model_is_recorded_and_only_in_this_thread():
    first, second, x = unroll(nn.GRU(3, 5)), unroll(nn.GRU(3, 5)), torch.randn(4, 2, 3)
    with record(first) as outer:
        first(x)
        with record(first) as inner, record(second) as other:
            first(x)
            second(x)
        thread = threading.Thread(target=first, args=(x,))
        thread.start()
        thread.join()
    first(x)
    shapes = [len(gates["GRU.l0.h"]) for gates in (outer, inner, other)]
    assert shapes == [8, 4, 4]


def test_no_run_and_no_name_are_refused():
    model, x = unroll(nn.Sequential(nn.GRU(3, 5))), torch.randn(4, 2, 3)

    def recorded(run, gates=None):
        with record(model, gates):
            run()

    assert "no layer of it was run" in problems(recorded, lambda: None)[0]
    (problem,) = problems(recorded, lambda: model(x), "*.forget")
    assert problem == (
        "gates='*.forget': names no recurrent gate; the recurrent gates are: 0.l0.reset, 0.l0.update, 0.l0.new, 0.l0.h"
    )
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert "no layer of it was run" in problems(recorded, lambda: compiled(x))[0]
    assert "no layer of it was run" in problems(recorded, lambda: torch.export.export(model, (x,)))[0]
    with pytest.raises(ZeroDivisionError):
        recorded(lambda: 1 / 0)


def test_models_that_are_refused():
    def begin(model):
        with record(model):
            pass

    torch.compiler.reset()
    for model, finding in (
        (nn.GRU(3, 5), "has no unrolled layer"),
        (trace(nn.Sequential(nn.GRU(3, 5))), "has no unrolled layer"),
        (torch.compile(unroll(nn.GRU(3, 5))), "is compiled, and graphs record nothing"),
        (unroll(nn.GRU(3, 5, bidirectional=True), plan="directions=stacked"), "several passes in one step"),
        (unroll(nn.GRU(3, 5, 2), plan="layers=wavefront"), "several passes in one step"),
        ("model", "got str"),
    ):
        assert any(finding in problem for problem in problems(begin, model))
    layer, x = unroll(nn.GRU(3, 5)), torch.randn(4, 2, 3)
    weights = {name: p.detach() for name, p in layer.named_parameters()}
    with pytest.raises(UnrollError, match=r"inside of a transform of torch.func"), record(layer):
        grad(lambda w: functional_call(layer, w, (x,))[0].sum())(weights)
    with record(layer) as gates:
        layer(x)
    assert "was not recorded" in problems(lambda: gates["GRU.l1.h"])[0]
    assert "GRU.l1.h" not in gates
