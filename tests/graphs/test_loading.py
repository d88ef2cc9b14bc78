"""Files of what `unroll` returned, loaded in a process that has no `unroll`; docs/training.md has the table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.cases import flat
from unroll import Plan, Unrolled, packing, trace, unroll

pytestmark = [
    # of torch, which reads it of what a loop captures
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

LOAD = """
import importlib.abc, json, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "unroll":
            raise ImportError(f"no {name}")

sys.meta_path.insert(0, Without())
import torch

LOADERS = {
    "pickle": lambda file: torch.load(file, weights_only=False),
    "program": lambda file: torch.export.load(file).module(),
    "script": torch.jit.load,
}
said = {}
for name, kind, file, file_of_results in json.load(sys.stdin):
    args, expected = torch.load(file_of_results)
    try:
        with torch.no_grad():
            results = torch.utils._pytree.tree_leaves(LOADERS[kind](file)(*args))
        assert all(map(torch.equal, results, expected)) and len(results) == len(expected)
        said[name] = "runs"
    except ImportError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


class Model(nn.Module):
    """An LSTM of two layers, and a cell that is called twice."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True, dropout=0.5)
        self.cell = nn.GRUCell(8, 4)

    def forward(self, x):
        y, (h, _) = self.rnn(x)
        return self.cell(y[1], self.cell(y[0])), h


class Packing(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=4)[0]


def normed():
    model = Model()
    parametrizations.spectral_norm(model.rnn, "weight_hh_l0")
    return model


X = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
ROWS, LENGTHS = X.transpose(0, 1).contiguous(), torch.tensor([4, 2])
PLANS = ["default", "gates=split", "directions=stacked", "products=sums", "products=linear", "inductor", "tensorrt"]


def graph(**options):
    return unroll(trace(Model().eval()), X, **options)


def packed_program(module, **options):
    with packing():
        return torch.export.export(module, (ROWS, LENGTHS), **options)


# by name: what is saved, the kind of file, the example, and whether it needs `unroll`
FILES = {
    **{f"graph, {plan}": (lambda plan=plan: graph(plan=plan), "pickle", (X,), False) for plan in PLANS},
    "graph, frozen": (lambda: graph(freeze=True), "pickle", (X,), False),
    "graph of unrolled layers": (lambda: unroll(trace(unroll(Model().eval())), X), "pickle", (X,), False),
    "graph of parametrized layers": (lambda: unroll(trace(normed().eval()), X), "pickle", (X,), False),
    "graph, some layers": (lambda: graph(where="cell"), "pickle", (X,), False),
    "graph of functions": (lambda: unroll(make_fx(Model().eval())(X)), "pickle", (X,), False),
    "graph that packs": (lambda: unroll(trace(Packing()), steps=4), "pickle", (ROWS, LENGTHS), True),
    "trace of unrolled layers": (lambda: trace(unroll(Model().eval())), "pickle", (X,), True),
    "module": (lambda: unroll(Model().eval()), "pickle", (X,), True),
    "module, frozen": (lambda: unroll(Model().eval(), freeze=True), "pickle", (X,), True),
    "program": (lambda: unroll(torch.export.export(Model().eval(), (X,))), "program", (X,), False),
    "program of modules": (lambda: torch.export.export(unroll(Model().eval()), (X,)), "program", (X,), False),
    "program, frozen": (
        lambda: torch.export.export(unroll(Model().eval(), freeze=True), (X,)),
        "program",
        (X,),
        False,
    ),
    "program in blocks": (
        torch.no_grad()(lambda: torch.export.export(unroll(Model().eval(), plan=Plan(time=2)), (X,))),
        "program",
        (X,),
        False,
    ),
    "program of modules that pack": (lambda: packed_program(unroll(Packing())), "program", (ROWS, LENGTHS), False),
    "script": (lambda: unroll(torch.jit.trace(Model().eval(), (X,))), "script", (X,), False),
    "trace by TorchScript": (lambda: torch.jit.trace(unroll(Model().eval()), (X,)), "script", (X,), False),
}
SAVERS = {"pickle": torch.save, "program": torch.export.save, "script": torch.jit.save}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a process without `unroll` says of each file."""
    folder, files = tmp_path_factory.mktemp("files"), []
    for k, (name, (make, kind, args, _)) in enumerate(FILES.items()):
        made, file, results = make(), str(folder / f"{k}.pt2"), str(folder / f"{k}.results")
        SAVERS[kind](made, file)
        run = made.module() if kind == "program" else made
        with torch.no_grad():
            torch.save((args, [*flat(run(*args))]), results)
        files.append((name, kind, file, results))
    command = [sys.executable, "-W", "ignore", "-c", LOAD]
    done = subprocess.run(command, input=json.dumps(files), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", FILES)
def test_what_needs_unroll_where_it_is_loaded(name, said):
    assert (said[name] == "runs") is not FILES[name][3], said[name]
    assert said[name] == "runs" or said[name].startswith("no unroll")


class Twice(nn.Module):
    """A layer under two names, of which one is called."""

    def __init__(self):
        super().__init__()
        self.rnn = self.same = nn.GRU(3, 3)
        self.other = nn.GRU(3, 3)

    def forward(self, x):
        return self.other(self.same(self.rnn(x)[0])[0])[0]


@pytest.mark.parametrize("plan", ["default", "products=linear"])
def test_weights_stand_in_plain_modules_under_torchs_names(plan):
    model = Twice()
    traced = trace(model)
    ours = unroll(traced, X, plan=plan)
    assert not any(isinstance(module, Unrolled) for module in ours.modules())
    assert list(ours.state_dict()) == list(traced.state_dict())
    assert [id(p) for p in ours.parameters()] == [id(p) for p in traced.parameters()]
    assert torch.allclose(ours(X), model(X), atol=1e-6)


def test_layers_that_are_still_called_stay_layers():
    model = Twice()
    traced = trace(unroll(model))
    ours = unroll(traced, X, where="rnn")
    kinds = {name: isinstance(module, Unrolled) for name, module in ours.named_children()}
    assert kinds == {"rnn": False, "other": True}
    assert torch.allclose(ours(X), model(X), atol=1e-6)
