"""Threads that share unrolled models, and what stays in memory after calls."""

import copy
import gc
import pickle
from collections import Counter
from threading import Barrier, Thread

import pytest
import torch
from torch import fx, nn

from unroll import Plan, Stream, export_onnx, streaming, trace, unroll

THREADS, CALLS = 8, 1000

pytestmark = pytest.mark.heavy


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4)

    def forward(self, x):
        return self.rnn(x)[0]


def in_threads(work):
    """Run `work(number)` in several threads at once, and raise the first error of any."""
    errors, barrier = [], Barrier(THREADS)

    def run(number):
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("plan", [Plan(), Plan(gates="split", products="sums")], ids=str)
def test_threads_that_share_a_model(plan, freeze):
    model = Model().eval()
    ours = unroll(model, plan=plan, freeze=freeze)
    inputs = [torch.randn(1 + number % 3, 1 + number % 2, 3) for number in range(THREADS)]
    expected = [model(x).detach() for x in inputs]
    if not freeze:
        ours.rnn._flat_weights  # noqa: B018 (has a list from now on)

    def work(number):
        with torch.no_grad():
            for _ in range(CALLS):
                assert torch.allclose(ours(inputs[number]), expected[number], atol=1e-6)

    in_threads(work)


@pytest.mark.parametrize("freeze", [False, True])
def test_streams_in_threads(freeze):
    streamed = streaming(unroll(Model().eval(), freeze=freeze), torch.randn(4, 2, 3))
    inputs = [torch.randn(CALLS, 2, 3) for _ in range(THREADS)]
    with torch.no_grad():
        expected = [streamed(x)[0] for x in inputs]
    for shared in (streamed, copy.deepcopy(streamed), pickle.loads(pickle.dumps(streamed))):
        streams = [Stream(shared) for _ in range(THREADS)]
        count = CALLS if shared is streamed else 10

        def work(number, streams=streams, count=count):
            stream = streams[number]
            for piece, wanted in zip(inputs[number][:count], expected[number]):
                assert torch.allclose(stream(piece[None])[0], wanted, atol=1e-5)

        in_threads(work)


def living():
    """Count what is alive of graphs and of this package's objects."""
    gc.collect()
    graphs, packages = (fx.Graph, fx.Node, nn.Module), ("unroll", "onnx_ir")
    found: Counter[str] = Counter()
    for kind, count in Counter(map(type, gc.get_objects())).items():
        if issubclass(kind, graphs) or str(kind.__module__).partition(".")[0] in packages:
            found[kind.__qualname__] += count  # each graph module has a class of its own
    return found


def test_calls_leave_nothing_alive(tmp_path):
    model, x = Model().eval(), torch.randn(3, 2, 3)
    program, graph, path = torch.export.export(model, (x,)), trace(model), tmp_path / "m.onnx"
    export_onnx(model, (x,), path)
    for act in (
        lambda: unroll(model),
        lambda: unroll(program),
        lambda: unroll(path),
        lambda: unroll(graph, x),
        lambda: unroll(graph, x, freeze=True),
        lambda: export_onnx(model, (x,), path),
        lambda: streaming(model, x),
    ):
        act()
        before = living()
        for _ in range(2):
            act()
        assert living() == before
