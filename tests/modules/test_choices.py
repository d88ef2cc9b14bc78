"""The table of docs/training.md: each choice by each frontend, honoured or refused in words; none is ignored."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.checks import assert_same
from unroll import Plan, UnrollError, compile, export_onnx, packing, record, streaming, trace, unroll

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    # of torch, which reads it of what a loop captures
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

PAGE = Path(__file__).parents[2] / "docs" / "training.md"

STEPS = 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 5)

    def forward(self, x):
        return self.rnn(x)[0]


class Packing(Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("lengths", torch.tensor([STEPS, 2]))
        self.steps = STEPS

    def forward(self, x):
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], total_length=self.steps)[0]


X = torch.linspace(-1, 1, STEPS * 6).reshape(STEPS, 2, 3)

MODEL, PACKING = Model(), Packing()

SCRIPTS = {}
"""Their scripts, which torch makes outside of `packing`"""


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    SCRIPTS.update({model: torch.jit.script(model) for model in (MODEL, PACKING)})


def exported(model, plan, folder):
    import onnx

    path = folder / "ours.onnx"
    export_onnx(model.eval(), X, path, plan=plan)
    return onnx.load(path)


def fused_file():
    """A model with the `GRU` operator, as others write it."""
    from tests.onnx import standard

    return standard.model("GRU", {}, standard.draw("GRU", {}, dtype=np.float32))


def blocks(frontend):
    """The same frontend, with two steps in a block."""
    return lambda model, plan, folder: frontend(model, replace(plan, time=2), folder)


MADE = {
    "`unroll(module)`": lambda model, plan, folder: unroll(model, plan=plan),
    "`torch.compile(unroll(module))`": lambda model, plan, folder: torch.compile(
        unroll(model, plan=plan), backend="aot_eager", fullgraph=True
    ),
    "`unroll.compile(module)`": lambda model, plan, folder: compile(model, plan=plan, backend="aot_eager"),
    "`streaming(module, x)`": lambda model, plan, folder: streaming(model, X, plan=plan, check=False).model,
    "`trace(unroll(module))`": lambda model, plan, folder: trace(unroll(model, plan=plan)),
    "`unroll(trace(module), x)`": lambda model, plan, folder: unroll(trace(model), X, plan=plan),
    "`unroll(program)`": lambda model, plan, folder: unroll(torch.export.export(model, (X,)), plan=plan).module(),
    "`torch.export.export(unroll(module), x)`": lambda model, plan, folder: torch.export.export(
        unroll(model, plan=plan), (X,)
    ).module(),
    "`unroll(torch.jit.script(module))`": lambda model, plan, folder: unroll(SCRIPTS[model], plan=plan),
    "`torch.jit.trace(unroll(module), x)`": lambda model, plan, folder: torch.jit.trace(unroll(model, plan=plan), X),
    "`torch.jit.script(unroll(module))`": lambda model, plan, folder: torch.jit.script(unroll(model, plan=plan)),
    "`export_onnx(module, x, path)`": exported,
    "`unroll(path)`": lambda model, plan, folder: unroll(fused_file(), plan=plan),
}

LOOPS = ("unroll(module)", "torch.export.export(unroll(module), x)", "export_onnx(module, x, path)")

FRONTENDS = MADE | {f"`{name}`, `time=2`": blocks(MADE[f"`{name}`"]) for name in LOOPS}

NOTHING_TO_PACK = ("`unroll(program)`", "`torch.jit.script(unroll(module))`", "`unroll(path)`")
"""Of models that pack: torch exports none, and its scripts give unrolled layers padded input alone"""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def refusal(function):
    """The words of an `UnrollError`, also where Dynamo tells them; None if there is none."""
    try:
        function()
    except UnrollError as error:
        return str(error)
    except Exception as error:
        if "UnrollError" in f"{type(error).__name__}{error}":
            return str(error)
        raise
    return None


def operators(function):
    """Count torch's operators in a call, by whatever runs them."""
    with torch.profiler.profile(acc_events=True) as profile:
        function()
    return Counter(event.name.removeprefix("aten::") for event in profile.events())


def backward(made):
    output = made(X)
    return operators(lambda: output.sum().backward())


def recomputes(made):
    """Steps are computed anew: their tanh are among the operators of the backward pass, and no others are."""
    return backward(made)["tanh"] == STEPS and not backward(unroll(MODEL))["tanh"]


def joins(made):
    """The gradient of the weight is one product at the end, and not one for each step."""
    return backward(unroll(MODEL))["mm"] - backward(made)["mm"] >= STEPS - 2


def is_linear(made):
    """Products are `linear`, with h in each step that has no zeros for it; in a file they are `MatMul`."""
    if isinstance(made, nn.Module):
        with torch.no_grad():
            return operators(lambda: made(X))["linear"] >= STEPS
    found = Counter(node.op_type for node in nodes(made.graph))
    return found["MatMul"] >= 2 and not found["Gemm"]


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)


def records(made):
    with record(made) as gates:
        made(X)
    return [gate.shape for name, gate in gates.items() if name.endswith("rnn.l0.h")] == [(STEPS, 2, 5)]


def planned(plan, is_honoured):
    return lambda frontend, folder: is_honoured(FRONTENDS[frontend](MODEL, plan, folder))


def packs(frontend, folder):
    """It is made and called inside, and gives what the model gives outside."""
    with torch.no_grad():
        expected = PACKING(X)
        with packing(eager=True):
            return torch.allclose(FRONTENDS[frontend](PACKING, Plan(), folder)(X), expected, atol=1e-6)


CHOICES = {
    "`recompute`": planned(Plan(recompute=2), recomputes),
    "`gradients=joined`": planned(Plan(gradients="joined"), joins),
    "`products=linear`": planned(Plan(products="linear"), is_linear),
    "`record`": planned(Plan(), records),
    "`packing(eager=True)`": packs,
}


def found(frontend, choice, folder):
    """An entry of the table."""
    if choice == "`packing(eager=True)`" and frontend in NOTHING_TO_PACK:
        return "–"
    honoured = []
    said = refusal(lambda: honoured.append(CHOICES[choice](frontend, folder)))
    assert said or honoured == [True], f"{frontend} ignores {choice}"
    return "refused" if said else "yes"


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_each_choice_is_honoured_or_refused(frontend, tmp_path):
    entries = [found(frontend, choice, tmp_path) for choice in CHOICES]
    assert f"| {' | '.join([frontend, *entries])} |" in PAGE.read_text()


def test_the_table_has_no_other_lines():
    text = PAGE.read_text()
    assert f"| | {' | '.join(CHOICES)} |" in text
    assert re.findall(r"^\| (.+?) \|(?: (?:yes|refused|–) \|){5}$", text, re.MULTILINE) == list(FRONTENDS)


@pytest.mark.parametrize("plan", [Plan(), Plan(time=2), Plan(recompute=2), Plan(products="linear")], ids=str)
@pytest.mark.parametrize("form", list(FRONTENDS)[:2])
def test_eager_packing_with_other_choices(form, plan):
    with packing(eager=True), torch.set_grad_enabled(plan.block is None):
        made = FRONTENDS[form](PACKING, plan, None)(X)
    assert_same(made, PACKING(X), rtol=1e-5)
