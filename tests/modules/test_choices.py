"""Each choice of training by each frontend: honoured, or refused in words; none is ignored."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.checks import assert_same
from unroll import Plan, UnrollError, compile, export_onnx, packing, record, streaming, trace, unroll

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5)

    def forward(self, x):
        return self.rnn(x)[0]


class Packing(Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("lengths", torch.tensor([4, 2]))

    def forward(self, x):
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], total_length=4)[0]


def compiled(model, plan):
    torch.compiler.reset()
    return torch.compile(unroll(model, plan=plan), backend="aot_eager")


def by_unroll_compile(model, plan):
    torch.compiler.reset()
    return compile(model, plan=plan, backend="aot_eager")


FRONTENDS = {
    "module": lambda model, plan, x: unroll(model, plan=plan),
    "compiled module": lambda model, plan, x: compiled(model, plan),
    "unroll.compile": lambda model, plan, x: by_unroll_compile(model, plan),
    "streaming": lambda model, plan, x: streaming(unroll(model, plan=plan), x, check=False).model,
    "graph": lambda model, plan, x: unroll(trace(model), x, plan=plan),
    "program": lambda model, plan, x: unroll(torch.export.export(model, (x,)), plan=plan).module(),
    "exported module": lambda model, plan, x: torch.export.export(unroll(model, plan=plan), (x,)).module(),
    "script": lambda model, plan, x: unroll(torch.jit.trace(model, (x,)), plan=plan),
    "traced module": lambda model, plan, x: torch.jit.trace(unroll(model, plan=plan), (x,)),
}


def refusal(function):
    """The words of an `UnrollError`, also where Dynamo tells them; None if there is none."""
    try:
        function()
    except UnrollError as error:
        return str(error)
    except Exception as error:
        if "UnrollError" in f"{type(error).__name__}{error}" or isinstance(error.__cause__, UnrollError):
            return str(error)
        raise
    return None


@pytest.mark.parametrize("plan", [Plan(recompute=2), Plan(gradients="joined")], ids=str)
@pytest.mark.parametrize("frontend", FRONTENDS)
def test_choices_about_the_backward_pass(frontend, plan):
    model, x = Model(), torch.randn(4, 2, 3)
    honoured = frontend in ("module", "compiled module", "unroll.compile", "streaming")
    said = refusal(lambda: FRONTENDS[frontend](model, plan, x)(x))
    assert (said is None) == honoured, said
    if not honoured:
        assert "of the backward pass of a module" in said


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_record(frontend):
    model, x = Model(), torch.randn(4, 2, 3)
    made = FRONTENDS[frontend](model, Plan(), x)

    def recorded():
        with record(made) as gates:
            made(x)
        assert gates["rnn.l0.h"].shape == (4, 2, 5)

    said = refusal(recorded)
    assert (said is None) == (frontend in ("module", "streaming")), said
    assert said is None or any(words in said for words in ("is compiled", "has no unrolled layer", "no layer of it"))


def test_record_of_blocks():
    model, x = unroll(Model(), plan=Plan(time=3)), torch.randn(7, 2, 3)
    with record(model) as gates:
        output = model(x)
    assert_same(gates["rnn.l0.h"], output, rtol=1e-6)


@pytest.mark.parametrize("plan", ["recompute=2", "gradients=joined"])
def test_files_refuse_them(plan, tmp_path):
    said = refusal(lambda: export_onnx(Model().eval(), torch.randn(4, 2, 3), tmp_path / "m.onnx", plan=plan))
    assert "of the backward pass of a module" in said


@pytest.mark.parametrize("plan", [Plan(), Plan(time=2), Plan(recompute=2), Plan(products="linear")], ids=str)
@pytest.mark.parametrize("form", ["module", "compiled module"])
def test_eager_packing(form, plan):
    model, x = Packing(), torch.randn(4, 2, 3)
    with packing(eager=True), torch.set_grad_enabled(plan.block is None):
        found = FRONTENDS[form](model, plan, x)(x)
    assert_same(found, model(x), rtol=1e-5)
