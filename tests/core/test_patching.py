"""Nothing is changed for others: what all threads share is afterwards as it was, and meanwhile they compute right."""

import logging
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch._dynamo.config as dynamo_config
from torch import fx, nn
from torch._dynamo.output_graph import OutputGraph
from torch.export import _trace
from torch.fx import _symbolic_trace
from torch.nn.modules import rnn as layers
from torch.nn.utils import rnn

import unroll as library
from unroll import Stream, Unrolled, UnrollError, compare, export_onnx, packing, streaming, trace, unroll
from unroll.core.alone import alone
from unroll.core.patching import Local, original, patched, seeded, without_gc, without_warnings
from unroll.export.translate import LOGGERS
from unroll.graphs.calls import ModuleCall

KINDS = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell, rnn.PackedSequence, OutputGraph)


def photograph():
    """All that a call could have left changed, by name: objects themselves, and the code of functions."""
    places = {"rnn": rnn, "layers": layers, "_trace": _trace, "nn.Module": nn.Module, "warnings": warnings}
    places |= {"_Patcher": _symbolic_trace._Patcher, "traceback": fx.traceback, "eval_frame": torch._dynamo.eval_frame}
    places |= {kind.__name__: kind for kind in (*KINDS, *subclasses(Unrolled))}
    found = {f"{place}.{name}": value for place, owner in places.items() for name, value in vars(owner).items()}
    found |= {f"{name}.__code__": value.__code__ for name, value in found.items() if hasattr(value, "__code__")}
    caches = ("__abstractmethods__", "_abc_impl", "onceregistry", "_filters_version", "traceback.current_meta")
    return {name: value for name, value in found.items() if not name.endswith(caches)}


def subclasses(kind):
    return [kind, *(below for direct in kind.__subclasses__() for below in subclasses(direct))]


def settings():
    """What is compared by value."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in LOGGERS]
    loggers = [logging.getLogger(name) for name in (None, *names)]
    return {
        "random": torch.get_rng_state().tolist(),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "filters": list(warnings.filters),
        "levels": {logger.name: (logger.level, logger.disabled, list(logger.filters)) for logger in loggers},
        "dynamo": dynamo_config.get_config_copy(),
    }


def differences(before, after):
    """Names of what is another object, or new in a class of a layer.

    Elsewhere new names do not count: torch loads modules when it first needs them.
    """
    kinds = tuple(f"{kind.__name__}." for kind in (*KINDS, *subclasses(Unrolled)))
    new = [name for name in after.keys() - before.keys() if name.startswith(kinds)]
    return [name for name, value in before.items() if after.get(name) is not value] + new


@cache
def a_traced_model():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(a_model(), X)


class Packer(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4, bidirectional=True)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.rnn(packed)[0], total_length=5)[0]


X, LENGTHS = torch.randn(5, 2, 3), torch.tensor([3, 5])


@cache  # making one draws random numbers
def a_model():
    return nn.Sequential(nn.LSTM(3, 4)).eval()


@cache
def a_packer():
    return Packer().eval()


@cache
def a_trained_model():
    return nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5))


def export(folder):
    export_onnx(a_model(), X, folder / "model.onnx")


def export_packed(folder):
    export_onnx(a_packer(), (X, LENGTHS), folder / "packed.onnx")


@cache
def a_program():
    return torch.export.export(a_model(), (X,))


def rewrite_program(folder):
    unroll(a_program())
    unroll(streaming(a_program()))


def export_in_packing(folder):
    with packing():
        torch.export.export(unroll(a_packer()), (X, LENGTHS))


def compile_and_call(folder):
    torch._dynamo.reset()
    library.compile(a_model(), backend="eager")(X)
    library.compile(a_packer(), backend="eager")(X, LENGTHS)


def compile_in_packing(folder):
    torch._dynamo.reset()
    with packing():
        torch.compile(unroll(a_packer()), backend="eager")(X, LENGTHS)


def stream(folder):
    stream = Stream(streaming(a_model(), X))
    stream(X[:2])
    unroll(streaming(trace(a_model()), X), X)


def compare_both(folder):
    model = a_trained_model()
    compare(model, unroll(model), X, gradients=True).check()


def rewrite(folder):
    unroll(a_model(), freeze=True)
    unroll(trace(a_model()), X)
    unroll(trace(a_packer()), (X, LENGTHS))
    unroll(a_traced_model(), X)


WORKS = [
    export,
    export_packed,
    rewrite_program,
    export_in_packing,
    compile_and_call,
    compile_in_packing,
    stream,
    compare_both,
    rewrite,
]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_everything_is_afterwards_as_it_was(work, fails, tmp_path, monkeypatch):
    work(tmp_path)  # torch itself makes some things when they are first needed
    if fails:  # in the middle of it
        for place in ("unroll.core.schedule.run", "unroll.export.translate.translate", "unroll.onnx.rewrite.unroll_ir"):
            monkeypatch.setattr(place, stop)
    objects, values = photograph(), settings()
    if fails:
        with pytest.raises(Exception, match=r"stopped|leaves the model"):
            work(tmp_path)
        monkeypatch.undo()
    else:
        work(tmp_path)
    assert differences(objects, photograph()) == []
    assert settings() == values


def stop(*args, **kwargs):
    raise RuntimeError("stopped")


@contextmanager
def meanwhile(work):
    """Run something again and again in another thread, until it fails."""
    over, errors = threading.Event(), []

    def again():
        while not over.is_set():
            try:
                work()
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield thread
    finally:
        over.set()
        thread.join()
        if errors:
            raise errors[0]


def users(compiled=None):
    """Ways to use a model, each with its right result; what Dynamo compiles of these is listed in `compiled`."""

    def backend(graph, args):
        if compiled is not None:
            compiled.append(graph)
        return graph

    packer = a_packer()
    models = {
        "eager": unroll(nn.GRU(3, 4)).eval(),
        "in a sequence": unroll(a_model()),
        "in blocks": unroll(nn.GRU(3, 4), plan="time=2").eval(),
        "frozen": unroll(a_model(), freeze=True),
        "compiled": torch.compile(unroll(a_model()), backend=backend),
        "compiled as it is": library.compile(a_model(), backend=backend),
    }
    unrolled, states = unroll(packer), Stream(streaming(a_model(), X))

    def streamed():
        states.reset()
        return torch.cat([states(piece)[0] for piece in X.split(2)])

    return {
        **{name: lambda m=model: m(X)[0] for name, model in models.items()},
        "packed by torch": lambda: packer(X, LENGTHS),
        "packed": lambda: unrolled(X, LENGTHS),
        "stream": streamed,
    }


IN_THE_MIDDLE = []  # not an attribute, which `unroll` would copy with all that it holds


class Holding(Packer):
    """Before its layer, runs the last of `IN_THE_MIDDLE` in another thread."""

    def forward(self, x, lengths):
        thread = threading.Thread(target=IN_THE_MIDDLE[-1], daemon=True)
        thread.start()
        thread.join(60)
        return super().forward(x, lengths)


def trace_it(model, folder):
    trace(model)


def export_it(model, folder):
    export_onnx(model, (X, LENGTHS), folder / "model.onnx")


def export_it_in_packing(model, folder):
    with packing():
        torch.export.export(unroll(model), (X, LENGTHS))


def run_others_in_the_middle(work, folder):
    torch._dynamo.reset()
    compiled, found = [], []
    with torch.no_grad():
        uses = users(compiled)
        right = {name: use() for name, use in uses.items()}
    graphs, traced = len(compiled), trace(a_model())
    calls = [ModuleCall(node, traced.get_submodule(node.target)) for node in traced.graph.find_nodes(op="call_module")]

    def use():
        with torch.no_grad():
            try:
                found.append([name for name, use in uses.items() if not torch.allclose(use(), right[name], atol=1e-6)])
                found.append([call for call in calls if call.has_own_forward])
            except Exception as error:
                found.append(error)

    IN_THE_MIDDLE.append(use)
    try:
        work(Holding().eval(), folder)
    finally:
        IN_THE_MIDDLE.pop()
    assert found and not any(found) and len(compiled) == graphs


@pytest.mark.parametrize("work", [trace_it, export_it, export_it_in_packing], ids=lambda work: work.__name__)
def test_in_the_middle_of_a_trace_other_threads_compute_and_compile_nothing(work, tmp_path):
    """In a process of its own, where nothing that other tests leave behind makes Dynamo compile anew."""
    code = f"from tests.core.test_patching import *; run_others_in_the_middle({work.__name__}, Path({str(tmp_path)!r}))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.heavy
@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.__name__)
def test_meanwhile_other_threads_get_what_is_right(work, tmp_path):
    work(tmp_path)  # what is made but once is there
    torch._dynamo.reset()
    compiled = []
    with torch.no_grad():
        uses = users(compiled)
        right = {name: use() for name, use in uses.items()}
        right = {name: use() for name, use in uses.items()}
    graphs = len(compiled)
    our_classes = [f"{kind.__name__}." for kind in subclasses(Unrolled)]
    before, calls = photograph(), []

    def use():
        with torch.no_grad():
            for name, function in uses.items():
                assert torch.allclose(function(), right[name], atol=1e-6), name
            calls.append(name)
        changed = differences(before, photograph())
        assert not [name for name in changed if name.startswith(tuple(our_classes))]

    keep = work not in (compile_and_call, compile_in_packing)  # which forget what was compiled
    if not keep:
        uses = {name: use for name, use in uses.items() if not name.startswith("compiled")}
    with meanwhile(use) as thread:
        while len(calls) < 3 and thread.is_alive():
            work(tmp_path)
    assert len(compiled) == graphs


def test_contexts_may_be_left_in_any_order():
    before, values = photograph(), settings()
    first, second, third = packing(), packing(), packing()
    for context in (first, second, third):
        context.__enter__()
    for context in (first, third, second):
        context.__exit__(None, None, None)
    assert differences(before, photograph()) == [] and settings() == values
    assert rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False).batch_sizes.tolist() == [2, 2, 2, 1, 1]


def test_one_thread_packs_with_padding_and_another_as_ever():
    """Also where the other compiles, or began to pack with padding before and has ended."""
    inside, go, found = threading.Event(), threading.Event(), {}

    def other():
        with packing():
            inside.set()
            go.wait(60)
            with torch.no_grad():
                found["exported"] = torch.export.export(unroll(Packer().eval()), (X, LENGTHS))

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    inside.wait()
    model = Packer().eval()
    eager = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False)
    assert eager.batch_sizes.tolist() == [2, 2, 2, 1, 1]
    with packing():
        pass
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(X, LENGTHS)
        assert torch.allclose(compiled, model(X, LENGTHS))
    go.set()
    thread.join()
    assert found["exported"].module()(X, LENGTHS).shape == (5, 2, 8)


def test_exports_wait_for_each_other(tmp_path):
    errors, models = [], [nn.Sequential(kind(3, 4)).eval() for kind in (nn.LSTM, nn.GRU, nn.RNN)]

    def work(number):
        try:
            export_onnx(models[number], X, tmp_path / f"{number}.onnx")
        except Exception as error:
            errors.append(error)

    before = photograph()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and differences(before, photograph()) == []
    for number, model in enumerate(models):
        session = onnxruntime.InferenceSession(tmp_path / f"{number}.onnx")
        output = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
        assert torch.allclose(torch.from_numpy(output), model(X)[0], atol=1e-5)


class Owner:
    value = 1

    @staticmethod
    def function():
        return "before"


class Inheriting(Owner):
    pass


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_patches_in_any_order(order):
    entry = vars(Owner)["function"]
    contexts = [patched(Owner, value=10 + k, function=lambda k=k: k, new=k) for k in range(3)]
    for context in contexts:
        context.__enter__()
    assert (Inheriting.value, original(Owner, "value"), original(Inheriting, "value")) == (12, 1, 1)
    assert original(Inheriting, "function") is entry
    left = [0, 1, 2]
    for k in order:
        contexts[k].__exit__(None, None, None)
        left.remove(k)
        assert Owner.value == (10 + left[-1] if left else 1)
    assert vars(Owner)["function"] is entry and not hasattr(Owner, "new")


def test_a_patch_of_an_instance_goes_away():
    model = nn.Linear(2, 2)
    with patched(model, forward=lambda x: 0):
        assert model(1) == 0
        with pytest.raises(ZeroDivisionError), patched(model, forward=lambda x: 1 / x):
            model(0)
        assert model(1) == 0
    assert "forward" not in vars(model)


def test_a_local_is_of_one_thread():
    depth, found = Local("depth"), []
    with depth.set(1), depth.set(2):
        thread = threading.Thread(target=lambda: found.append(depth.value))
        thread.start()
        thread.join()
        assert (depth.value, found) == (2, [None])
    first, second = depth.set(1), depth.set(2)
    first.__enter__(), second.__enter__(), first.__exit__(None, None, None)
    assert depth.value == 2
    second.__exit__(None, None, None)
    assert depth.value is None


def test_warnings_and_garbage_in_any_order():
    import gc

    filters = warnings.filters
    for make in (without_gc, lambda: without_warnings("nothing")):
        first, second = make(), make()
        first.__enter__(), second.__enter__(), first.__exit__(None, None, None), second.__exit__(None, None, None)
    assert warnings.filters is filters and gc.isenabled()


def test_random_numbers_go_on_where_they_were_in_any_order():
    before = torch.get_rng_state()
    first, second, third = seeded(0), seeded(), seeded(1)
    for context in (first, second, third):
        context.__enter__()
        torch.rand(2)
    for context in (first, third, second):
        context.__exit__(None, None, None)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded(0):
        torch.rand(1)
        inside = torch.get_rng_state()
        with seeded(2):
            torch.rand(3)
        assert torch.equal(torch.get_rng_state(), inside)


def test_comparisons_that_overlap_keep_the_random_numbers():
    model = nn.Sequential(nn.LSTM(3, 4)).eval()
    ours, x = unroll(model), torch.randn(5, 2, 3)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def one(v):
        first_in.set()
        second_in.wait(10)
        return model(v)

    def two(v):
        second_in.set()
        first_out.wait(10)
        return model(v)

    def run_two():
        first_in.wait(10)
        compare(two, ours, x, reference=False)

    state, thread = torch.get_rng_state(), threading.Thread(target=run_two)
    thread.start()
    compare(one, ours, x, reference=False)
    first_out.set()
    thread.join()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_patch_that_cannot_be_made_leaves_nothing_behind():
    def function():
        pass

    def enclosing(value):
        return lambda: value

    with (
        pytest.raises(ValueError, match="free vars"),
        patched(function, __name__="other", __code__=enclosing(1).__code__),
    ):
        raise AssertionError
    assert function.__name__ == "function"
    with patched(function, __name__="other"):
        assert function.__name__ == "other"
    assert function.__name__ == "function"


def test_packing_is_left_in_the_thread_that_entered_it():
    context, found = packing(), []

    def entering():
        context.__enter__()

    def leaving():
        with pytest.raises(UnrollError, match="another thread"):
            context.__exit__(None, None, None)
        found.append(True)

    before = rnn._VF
    for work in (entering, leaving):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found and rnn._VF is before


def test_a_backend_may_trace_while_another_thread_does():
    inside = threading.Event()

    def backend(graph, inputs):
        inside.set()
        time.sleep(0.2)
        trace(a_model())
        return graph.forward

    def other():
        inside.wait(10)
        trace(a_model())

    torch._dynamo.reset()
    compiled = torch.compile(nn.Linear(3, 3), backend=backend)
    threads = [threading.Thread(target=work, daemon=True) for work in (lambda: compiled(torch.randn(2, 3)), other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_alone():
    order = []
    with alone(), alone():
        thread = threading.Thread(target=lambda: [alone().__enter__(), order.append("other")])
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


@pytest.fixture
def geometric(monkeypatch):
    """PyTorch Geometric has functions of its own for two of torch's, which ask what they get for its dimensions."""

    def asking(function):
        return lambda input, *args, **kwargs: function(input, *args, **kwargs) if input.dim() else None

    for name in ("select", "index_select"):
        monkeypatch.setattr(torch, name, asking(getattr(torch, name)))


@pytest.mark.parametrize("plan", ["layers=wavefront", "directions=stacked"])
def test_functions_that_others_replace(plan, geometric, tmp_path):
    sizes = {"num_layers": 2} if plan == "layers=wavefront" else {"bidirectional": True}
    model, x = nn.Sequential(nn.GRU(3, 4, **sizes)).double().eval(), torch.randn(5, 2, 3, dtype=torch.float64)
    assert compare(model, unroll(model, plan=plan), (x,))
    assert compare(model, unroll(trace(model), (x,), plan=plan), (x,))
    assert compare(model, unroll(torch.export.export(model, (x,)), plan=plan), (x,))
    export_onnx(model, (x,), tmp_path / "m.onnx", plan=plan, check=True)


def test_functions_that_others_replace_for_packed_rows(geometric):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4).double()

        def forward(self, rows, batch_sizes, h):
            return torch.gru(rows, batch_sizes, h, self.gru._flat_weights, True, 1, 0.0, False, False)

    model, packed = Packed(), rnn.pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in (5, 3)])
    args = (packed.data, packed.batch_sizes, torch.zeros(1, 2, 4, dtype=torch.float64))
    assert compare(model, unroll(fx.symbolic_trace(model), args), args)
