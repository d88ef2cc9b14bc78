"""The code of unrolled graphs is made when it is asked for, and then is that of the graph."""

import copy
import inspect
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn

from tests.checks import assert_equal, assert_same
from unroll import trace, unroll


class Encoder(nn.Module):
    """A layer whose results are two, with an input of a name of its own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.GRU(3, 5, dtype=torch.float64)

    def forward(self, series):
        output, last = self.layer(series)
        return output, last.sum()


def made(module):
    return "_code" in vars(module)


@pytest.fixture
def series():
    return torch.randn(4, 2, 3, dtype=torch.float64)


@pytest.fixture
def model():
    return Encoder()


@pytest.fixture
def ours(model):
    graph = unroll(trace(model), steps=4)
    assert not made(graph)
    return graph


def test_rewriting_writes_no_code_of_what_it_makes(model, series, monkeypatch):
    counted = []
    compiled = fx.GraphModule.recompile
    monkeypatch.setattr(
        fx.GraphModule, "recompile", lambda self: (counted.append(len(self.graph.nodes)), compiled(self))[1]
    )
    graph, program = trace(model), torch.export.export(model, (series,))
    longest = max(counted)
    counted.clear()
    found = unroll(graph, steps=4), unroll(program).graph_module
    assert min(len(part.graph.nodes) for part in found) > 2 * longest
    assert max(counted) <= longest


READ = {
    "run": lambda m: m(torch.zeros(4, 2, 3, dtype=torch.float64)),
    "code": lambda m: m.code,
    "str": str,
    "forward": lambda m: m.forward,
    "of the class": lambda m: type(m).forward,
    "signature": lambda m: inspect.signature(m.forward),
    "recompile": lambda m: m.recompile(),
    "pickle": lambda m: pickle.dumps(m),
    "trace": fx.symbolic_trace,
}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_is_made_when_asked_for(ours, model, series, read):
    read(ours)
    assert made(ours)
    assert "addmm" in ours.code
    assert list(inspect.signature(ours.forward).parameters) == ["series"]
    assert_same(ours(series), model(series))


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": lambda m: torch.load(io.BytesIO(saved(m)), weights_only=False),
    "interpreter": fx.Interpreter,
    "transformer": lambda m: fx.Transformer(m).transform(),
    "export": lambda m: torch.export.export(m, (torch.zeros(4, 2, 3, dtype=torch.float64),)).module(),
    "compile": lambda m: torch.compile(m, fullgraph=True, backend="eager"),
    "compile inside": lambda m: torch.compile(nn.Sequential(m), fullgraph=True, backend="eager"),
}


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


@pytest.mark.parametrize("again", COPIES.values(), ids=COPIES)
def test_the_first_to_ask_may_be_a_copy(ours, model, series, again):
    other = again(ours)
    assert_same((other.run if isinstance(other, fx.Interpreter) else other)(series), model(series))
    assert_same(ours(series), model(series))


def test_printing_needs_none(ours):
    assert "addmm" in ours.print_readable(print_output=False)
    assert not made(ours)


def test_follows_what_the_graph_has_become(ours, series):
    last = ours.graph.output_node()
    last.args = (last.args[0][0],)
    assert_equal(ours(series).shape, torch.Size([4, 2, 5]))
    last.args = ((last.args[0], last.args[0]),)
    ours.recompile()
    assert len(ours(series)) == 2


def test_threads_may_be_first_together(ours, model, series):
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(ours, [series] * 8):
            assert_same(found, model(series))
