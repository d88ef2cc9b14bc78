"""The benchmark: what it measures, what it says of that, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import unroll
from unroll import Plan, UnrollError
from unroll.bench import options
from unroll.bench.contenders import CONTENDERS, obstacle, onnxruntime_run
from unroll.bench.engines import engine_type
from unroll.bench.measuring import Expected, _expected, error_of
from unroll.bench.processes import Process
from unroll.bench.results import COLUMNS, Measurements, Row, advice, as_text, is_wrong
from unroll.bench.run import benchmark
from unroll.bench.subjects import Subject, Task, subjects
from unroll.cli.bench import as_tables

pytest.importorskip("onnx")
pytest.importorskip("typer")
from unroll.cli.printing import console, print_whole

QUICK = {"rounds": 2, "seconds": 0.01, "hidden_size": 6, "input_size": 5, "steps": 4}


class Two(nn.Module):
    """A model with a keyword argument and results in a dictionary."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6), nn.Linear(6, 2)

    def forward(self, x, scale):
        y, h = self.rnn(x)
        return {"y": self.head(y) * scale, "h": h}


def make():
    return Two().eval(), (torch.randn(4, 3, 5),), {"kwargs": {"scale": torch.tensor(2.0)}}


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.drop = nn.GRU(5, 6), nn.Dropout()

    def forward(self, x):
        return self.drop(self.rnn(x)[0])


def make_dropping():
    return Drops(), (torch.randn(4, 3, 5),)


def make_unlike():
    """Other numbers in each process."""
    print("noise")
    torch.manual_seed(os.getpid())
    return make()


def make_with_shapes():
    return (*make()[:2], {"dynamic_shapes": None})


def make_program():
    return torch.export.export(nn.GRU(5, 6).eval(), (torch.randn(4, 3, 5),))


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6)

    def forward(self, x):
        time.sleep(60 if sys.argv[0].endswith("worker.py") else 0)  # not for the reference
        return self.rnn(x)


def make_slow():
    return Slow(), (torch.randn(4, 3, 5),)


class Labels(nn.Module):
    """Integers, and floating numbers of which some are infinite, from a layer in bfloat16."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6, dtype=torch.bfloat16)

    def forward(self, x):
        y = self.rnn(x)[0].float()
        return y.masked_fill(torch.arange(6) > 4, -math.inf), (y > 2).long()


def make_labels():
    return Labels(), (torch.randn(4, 3, 5, dtype=torch.bfloat16),)


def make_still():
    return nn.GRU(5, 6).requires_grad_(False), (torch.randn(4, 3, 5),)


def make_without_arguments():
    return nn.GRU(5, 6), ()


class OwnState(nn.Module):
    """Runs in float32 alone."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6)

    def forward(self, x):
        return self.rnn(x, torch.ones(1, 3, 6))


def make_float32():
    return OwnState(), (torch.randn(4, 3, 5),)


class Keeps(nn.Module):
    """Two calls differ, by a buffer."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 6)
        self.register_buffer("h", torch.zeros(1, 3, 6))

    def forward(self, x):
        y, self.h = self.rnn(x, self.h)
        return y


def make_keeping():
    return Keeps(), (torch.randn(4, 3, 5),)


@pytest.fixture(scope="module")
def seen():
    return []


@pytest.fixture(scope="module")
def measured(seen):
    contenders = ["eager", "eager-unrolled", "onnx", "tensorrt", "unrolled-cudagraphs"]
    return benchmark(
        "lstm",
        contenders=contenders,
        plans=["gates=paired", Plan()],
        progress=lambda *step: seen.append(step),
        **QUICK,
    )


def test_a_layer(measured):
    rows = {row.name: row for row in measured.rows}
    assert list(rows) == [
        *("eager", "eager-unrolled gates=paired", "eager-unrolled", "unrolled-cudagraphs gates=paired"),
        *("unrolled-cudagraphs", "onnx", "tensorrt gates=paired", "tensorrt"),
    ]
    assert rows["tensorrt"].failure and rows["unrolled-cudagraphs"].failure == "is for a GPU alone"
    ran = [row for row in measured.rows if not row.failure]
    assert len(ran) == 4
    for row in ran:
        assert 0 < row.p10 <= row.median < row.first_call < 60 and row.calls >= 4
        assert row.throughput == pytest.approx(1 / row.median)
        assert 5e7 < row.memory < 5e9 and 0 <= row.error < 1e-5
    assert rows["eager"].nodes is None and rows["eager"].size is None
    assert rows["onnx"].nodes > 3 and 1000 < rows["onnx"].size < 100_000


def test_a_round_trip(measured, tmp_path):
    measured.save(tmp_path / "found.json")
    assert Measurements.load(tmp_path / "found.json") == measured
    plain = json.loads((tmp_path / "found.json").read_text())
    assert set(plain) == {"command", "machine", "rows", "advice"}
    assert plain["machine"]["versions"]["torch"] == torch.__version__ and plain["machine"]["cores"] >= 1
    assert str(os.getcwd()) not in plain["command"]
    assert plain["rows"][0]["throughput"] > 0 and plain["rows"][0]["subject"]["steps"] == 4


def test_progress(measured, seen):
    done = [step[0] for step in seen]
    assert done == sorted(done) and done[0] == 0 and {step[1] for step in seen} == {done[-1]}
    assert seen[0][2] == "eager: build" and seen[-1][2] == "tensorrt default: round 2 of 2"


def test_training_and_a_sweep():
    found = benchmark("RNN", contenders=["eager-unrolled", "onnx"], backward=True, **QUICK | {"steps": [2, 5]})
    assert [row.subject.steps for row in found.rows] == [2, 2, 5, 5]
    for row in found.rows:
        assert row.failure == ("has no gradients" if row.contender == "onnx" else "")
        assert row.failure or row.error < 1e-5
    assert len(found.advice) == 2


def test_a_model_of_ones_own():
    """Arguments of all kinds reach every form; each has the same parameters, whatever the function draws."""
    (row,) = benchmark(f"{__name__}:make_unlike", contenders=["eager-unrolled"], rounds=1, seconds=0.01).rows
    assert not row.failure and row.error < 1e-5 and row.subject.steps is None


def test_no_error_is_told_of_random_results():
    (row,) = benchmark(f"{__name__}:make_dropping", contenders=["eager"], backward=True, rounds=1).rows
    assert row.median > 0 and row.error is None


@pytest.mark.parametrize("target", [torch.float64, torch.bfloat16, "cpu"], ids=str)
def test_packed_arguments_that_require_gradients_are_leaves(target):
    packed = pack_sequence([torch.randn(3, 8).requires_grad_(), torch.randn(2, 8)])
    packed = packed._replace(data=packed.data.detach().requires_grad_())
    subject = Subject("GRU", input_size=8, hidden_size=4, backward=True)
    task = Task(subject, nn.GRU(8, 4), (packed, torch.zeros(1, 2, 4)), {"given": packed})
    moved = task._moved(target)
    for each in (moved.args[0], moved.kwargs["given"]):
        assert each.data.requires_grad and each.data.is_leaf and each.batch_sizes.tolist() == [2, 2, 1]
    results = Task(subject, moved.model, moved.args, {}).runner(moved.model)()
    assert results[-5].shape == packed.data.shape and results[-5].abs().sum() > 0


def test_the_error_is_held_against_the_types_of_the_model():
    """A bfloat16 model is not wrong for being one; what is infinite, and integers, are compared."""
    found = benchmark(f"{__name__}:make_labels", contenders=["eager"], rounds=1, seconds=0.01)
    (row,) = found.rows
    assert row.dtype == "bfloat16" and 1e-3 < row.error < 4e-2 and not is_wrong(row)
    assert is_wrong(replace(row, dtype="float32")) and "use the fused layer as it is" in found.advice[0]
    json.dumps(found.as_dict(), allow_nan=False)


def expected_of(name):
    (subject,) = subjects(f"{__name__}:{name}", device="cpu", threads=1, backward=False)
    with tempfile.TemporaryDirectory() as folder:
        return Task.of(subject), _expected(subject, Path(folder) / "saved.pt")


def test_what_is_expected_of_a_model():
    task, expected = expected_of("make_labels")
    assert expected.dtype == "bfloat16" and expected.results[1].dtype == torch.int64
    task, expected = expected_of("make_float32")  # in float64 it fails
    assert expected.dtype == "float32" and torch.equal(expected.results[0], task.model(*task.args)[0])
    assert expected_of("make_keeping")[1] == Expected(None, "float32")


def test_the_limit():
    (row,) = benchmark(f"{__name__}:make_slow", contenders=["eager"], limit=1.0, rounds=1).rows
    assert row.failure == "took more than 1 s to build" and row.median is None


def test_more_steps_are_not_tried(monkeypatch):
    """Where the limit was too short for fewer."""
    reasons = []

    def measured(work, method, skip, progress):
        ((subject, (entry,)),) = work.items()
        reasons.append(skip(subject, entry))
        return [], [(subject, entry)] if subject.steps == 8 and subject.batch == 1 else []

    monkeypatch.setattr(sys.modules["unroll.bench.run"], "measure", measured)
    benchmark(contenders=["compile"], steps=[4, 8, 16], batch=[1, 2], limit=9)
    assert reasons == [None, None, None, None, "took more than 9 s at T=8", None]


def test_a_process_that_dies(tmp_path):
    process = Process(tmp_path, 1)
    process.process.kill()
    with pytest.raises(Exception, match="ended with exit code -9"):
        process.ask(10, "run")
    process.close()
    process.close()
    assert process.process.poll() is not None


def test_a_contender_that_fails_says_why():
    (row,) = benchmark(contenders=["onnx"], **QUICK | {"dtype": "bfloat16"}).rows
    assert "bfloat16" in row.failure and "load model from model.onnx" in row.failure.lower() and row.median is None


REFUSED = [
    ({"model": "gru", "contenders": ["eagre"]}, "contender 'eagre': is unknown; choose among eager, "),
    ({"model": "gru", "contenders": []}, "names none"),
    ({"model": "mlp"}, "is no recurrent layer; give lstm, gru or rnn"),
    ({"model": "gru", "plans": ["fast"]}, "plan='fast': is no plan; give default"),
    ({"model": "gru", "plans": ["gates=all"]}, "got 'all'"),
    ({"model": "gru", "plans": []}, "plans: names none"),
    ({"model": "gru", "plans": ["default"], "contenders": ["eager"]}, "unroll nothing"),
    ({"model": "gru", "plans": [3]}, "is a int"),
    ({"model": "gru", "proj_size": 3}, "cannot be made"),
    ({"model": "lstm", "nonlinearity": "relu"}, "cannot be made"),
    ({"model": "gru", "dropout": 0.5}, "dropout=...: is not an option here; the options are input_size"),
    ({"model": "gru", "steps": 0}, "steps=0: is no size"),
    ({"model": "gru", "batch": [1, "2"]}, "is no size"),
    ({"model": "gru", "hidden_size": []}, "is no size"),
    ({"model": "gru", "dtype": "int8"}, "give float64, float32"),
    ({"model": "gru", "device": "tpu9"}, "is no device"),
    ({"model": "gru", "device": "meta"}, "give cpu or cuda"),
    ({"model": "gru", "threads": 0}, "is no number of threads"),
    ({"model": "gru", "rounds": 0}, "rounds=0"),
    ({"model": "gru", "limit": 0}, "limit=0"),
    ({"model": "gru", "jobs": 0, "seconds": -1}, "2 problems"),
    ({"model": "gru", "seconds": math.inf}, "seconds=inf: is no time"),
    ({"model": "gru", "save": 3}, "save=3: is a int; give the path of a JSON file"),
    ({"model": "gru", "save": "."}, "is a directory; give the path of a JSON file"),
    ({"model": "gru", "bidirectional": "no"}, "bidirectional='no': is a str; give one bool"),
    ({"model": "gru", "num_layers": [1, 2]}, "num_layers=[1, 2]: is a list; give one int; steps, batch and"),
    ({"model": "gru", "backward": "no"}, "backward='no': is a str; give True or False"),
    ({"model": "gru", "device": 0}, "device=0: is no device"),
    ({"model": nn.LSTM(2, 2)}, "model=...: is a LSTM; give package.module:name of a function that returns it"),
    (
        {"model": f"{__name__}:make_still", "backward": True},
        "make_still: has no result to differentiate; give",
    ),
    (
        {"model": f"{__name__}:make_without_arguments"},
        "cannot run (TypeError: GRU.forward() missing 1 required",
    ),
    (
        {"model": f"{__name__}:make", "steps": 3},
        f"was given for {__name__}:make, which has its own",
    ),
    ({"model": f"{__name__}:nothing"}, "cannot be found"),
    ({"model": f"{__name__}:make_program"}, "returns ExportedProgram"),
    ({"model": f"{__name__}:Two"}, "returns a model alone"),
    ({"model": f"{__name__}:make_with_shapes"}, "returns the options dynamic_shapes"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=str)
def test_refusals(asked, message):
    with pytest.raises(UnrollError) as caught:
        benchmark(**asked)
    assert message in str(caught.value)


def test_cuda_where_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UnrollError, match="is not on this machine"):
        benchmark(device="cuda")


def test_plans_by_name():
    assert Plan.of("default") == Plan() and Plan.of("gates=split") == Plan(gates="split")
    for plan in (Plan(), Plan(gates="paired"), Plan(gates="split")):
        assert Plan.of(str(plan)) == plan


def test_obstacles():
    on_cpu, training = Subject("LSTM"), Subject("LSTM", backward=True)
    for contender in CONTENDERS.values():
        assert contender.title
        for plan in contender.plans:
            assert isinstance(Plan.of(plan), Plan)
        if contender.device != "cuda":
            assert obstacle(contender, on_cpu) is None
    assert obstacle(CONTENDERS["unrolled-cpp"], replace(on_cpu, device="cuda")) == "is for a CPU alone"
    assert obstacle(CONTENDERS["onnx-unrolled"], training) == "has no gradients"
    assert obstacle(replace(CONTENDERS["eager"], needs=("nowhere",)), on_cpu) == "needs nowhere, not installed here"


def test_every_option_of_a_subject_is_heeded():
    """Each changes the model or its arguments."""
    settings = {
        "input_size": 3, "hidden_size": 7, "num_layers": 2, "bidirectional": True, "bias": False, "proj_size": 2,
        "steps": 3, "batch": 2, "dtype": "float64",
    }  # fmt: skip
    conditions = {"device": "cpu", "threads": 1, "backward": False}

    def described(model, **given):
        (subject,) = subjects(model, **conditions, **given)
        task = Task.of(subject)
        return str(task.model), task.args[0].shape, task.args[0].dtype, str(subject)

    plain = described("lstm")
    for name, value in settings.items():
        changed = described("lstm", **{name: value})
        assert changed[:3] != plain[:3] and changed[3] != plain[3], name
    (relu,) = subjects("rnn", **conditions, nonlinearity="relu")
    assert Task.of(relu).model.nonlinearity == "relu" and "relu" in str(relu)


def test_errors_are_of_the_largest_value():
    exact = [torch.tensor([1.0, -4.0], dtype=torch.float64), torch.tensor([3])]
    assert error_of(exact, [torch.tensor([1.0, -4.4]), torch.tensor([3])]) == pytest.approx(0.1)
    assert error_of(exact, [torch.tensor([1.0, math.nan]), torch.tensor([3])]) == math.inf
    assert error_of(exact, [torch.tensor([1.0])]) == math.inf
    assert error_of(None, []) is None


def test_errors_of_integers_are_the_share_that_differs():
    exact = [torch.tensor([1, 2, 3, 4]), torch.tensor([True, False])]
    assert error_of(exact, [torch.tensor([1, 2, 3, 5], dtype=torch.int32), torch.tensor([True, False])]) == 0.25
    assert error_of(exact, [torch.tensor([1, 2, 3, 4]), torch.tensor([True, True])]) == 0.5
    assert error_of(exact, [torch.tensor([1.0, 2, 3, 4]), torch.tensor([True, False])]) == math.inf
    assert error_of([torch.ones(2).double()], [torch.ones(2, dtype=torch.int64)]) == math.inf
    assert error_of([], []) is None and error_of([torch.zeros(0, 3)], [torch.zeros(0, 3)]) is None
    assert error_of([torch.tensor([3 + 4j])], [torch.tensor([3 + 5j])]) == 0.25


def test_what_is_not_finite_must_be_the_same():
    inf, nan = math.inf, math.nan

    def error(exact, found):
        return error_of([torch.tensor(exact, dtype=torch.float64)], [torch.tensor(found)])

    assert error([-inf, 4.0, nan], [-inf, 5.0, nan]) == 0.25
    assert error([inf], [inf]) == 0.0
    for exact, found in ((inf, 3.0), (inf, -inf), (nan, 0.0), (nan, inf), (3.0, inf), (3.0, nan)):
        assert error([exact, 1.0], [found, 1.0]) == inf
        assert error([exact, 5.0], [found, 1.0]) == inf


SUBJECT = Subject("GRU", 64, 128, 1, False, True, 0, "tanh", 32, 1, "float32")
EAGER = Row(SUBJECT, "eager", first_call=0.01, median=1e-3, p10=9e-4, calls=10, error=1e-7)


def other(contender, median, plan="", **changes):
    return replace(EAGER, contender=contender, median=median, plan=plan, first_call=2.0, **changes)


def failed(contender, why="took more than 60 s to build"):
    return Row(SUBJECT, contender, failure=why)


def test_advice_for_what_is_fastest():
    said = advice([EAGER, other("onnx-unrolled", 4e-4, "gates=paired"), other("unrolled-compile", 5e-4, "default")])
    assert said == (
        "For GRU 64 → 128, T=32, B=1, float32, cpu, 1 thread on this machine: use onnx-unrolled gates=paired, 400 µs a "
        "call, 2.50 times as fast as the fused layer, after 2 s to build it."
    )


def test_advice_for_the_fused_layer():
    said = advice([other("unrolled-compile", 2e-3, "default"), EAGER])
    assert "use the fused layer as it is, 1 ms a call; the nearest, unrolled-compile, takes 2.00 times as long." in said
    said = advice([EAGER, other("compile", 1.5e-3), other("onnx-unrolled", 2e-3, "default")])
    assert "the nearest, compile, takes 1.50 times as long; where recurrent operators cannot go, onnx-unrolled" in said
    assert advice([EAGER, failed("compile")]).endswith("use the fused layer as it is, 1 ms a call.")


def test_advice_for_a_layer_kept_in_another_runtime():
    said = advice([EAGER, other("onnx", 2e-4), other("onnx-unrolled", 4e-4, "default")])
    assert "use onnx, 200 µs a call, 5.00 times as fast as the fused layer, after 2 s to build it" in said
    assert said.endswith("where recurrent operators cannot go, onnx-unrolled takes 2.00 times as long.")


def test_advice_for_what_others_decompose():
    said = advice([EAGER, other("onnx-decomposed", 2e-4), other("onnx-unrolled", 4e-4, "default")])
    assert said.endswith(
        "use onnx-decomposed, 200 µs a call, 5.00 times as fast as the fused layer, after 2 s to build it."
    )


def test_advice_in_a_tie_keeps_the_layer():
    assert "use the fused layer" in advice([other("unrolled-compile", 0.97e-3, "default"), EAGER])
    assert "use onnx," in advice([EAGER, other("onnx-unrolled", 4e-4, "default"), other("onnx", 4.1e-4)])
    quick = other("onnx-unrolled", 4.1e-4, "default")
    assert "use onnx-unrolled" in advice([EAGER, replace(quick, first_call=1.0), other("unrolled-compile", 4e-4)])


def test_names_are_printed_in_full_however_narrow_the_terminal(capsys):
    plan = "gates=paired,directions=stacked"
    subject = Subject("fac:boom:", device="cpu")
    rows = [replace(row, subject=subject) for row in (EAGER, other("unrolled-compile", 2e-3, plan), failed("onnx"))]
    print_whole(console(width=40), *as_tables(Measurements(tuple(rows))))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "fac:boom:," and lines[3].startswith(f"unrolled-compile {plan} ")
    assert lines[1].split() == " ".join(COLUMNS).split() and lines[3].endswith(" 1.0e-07")
    assert "onnx: took more than 60 s to build" in lines


def test_advice_without_figures():
    assert advice([failed("eager"), failed("onnx")]).endswith("nothing ran, so there is nothing to advise.")
    assert advice([replace(EAGER, error=0.3), failed("onnx")]).endswith(
        "on this machine: no form that ran gives right results, so there is nothing to advise."
    )
    said = advice([failed("eager"), other("onnx", 2e-4)])
    assert said.endswith("use onnx, 200 µs a call, after 2 s to build it.")


def test_wrong_results_are_not_advised():
    fast_and_wrong = other("onnx", 1e-5, error=0.3)
    assert is_wrong(fast_and_wrong) and not is_wrong(EAGER) and not is_wrong(replace(EAGER, error=None))
    assert is_wrong(replace(EAGER, error=math.nan))
    assert "use the fused layer" in advice([EAGER, fast_and_wrong])
    assert "3.0e-01 wrong" in as_text(Measurements((EAGER, fast_and_wrong)))


def test_tables_leave_nobody_out():
    text = as_text(Measurements((EAGER, other("onnx", 2e-4), failed("compile", "has no gradients"))))
    lines = text.splitlines()
    assert lines[1].split()[:3] == ["form", "first", "call"]
    assert lines[2].split()[0] == "onnx" and lines[3].split()[0] == "eager"  # the fastest first
    assert lines[4] == "compile: has no gradients" and lines[5] == advice([EAGER, other("onnx", 2e-4)])


def test_names_of_options_are_those_that_there_are():
    assert tuple(CONTENDERS) == options.FORMS
    assert options.LayerOptions.__annotations__.keys() == options.LAYER.keys()


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


@pytest.mark.parametrize("axis", ["steps", "batch", "hidden_size"])
def test_plots(axis, tmp_path):
    from unroll.bench.plots import axis_of, draw, panels

    rows = []
    for value in (8, 32, 128):
        subject = replace(SUBJECT, **{axis: value})
        for device in ("cpu", "cuda"):
            rows += [
                replace(row, subject=replace(subject, device=device))
                for row in (EAGER, other("onnx-unrolled", 2e-4 * value, "default"), failed("onnx"))
            ]
    assert axis_of(rows) == axis
    found = panels(rows, axis)
    assert len(found) == 2 and all(set(lines) == {"eager", "onnx-unrolled"} for lines in found.values())
    assert all([x for x, _ in points] == [8, 32, 128] for lines in found.values() for points in lines.values())
    Measurements(tuple(rows[:9])).save(tmp_path / "a.json")
    Measurements(tuple(rows[9:])).save(tmp_path / "b.json")
    files = draw([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "plots")
    assert [file.name for file in files] == ["latency.png", "build.png", "ratio.png"]
    for file in files:
        width, height = png_size(file)
        assert 800 < width < 2500 and 300 < height < 1500


def test_one_shape_and_models_of_ones_own_have_bars(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    from matplotlib.colors import to_rgb

    from unroll.bench.plots import draw

    mine = Subject("package.module:make")
    for subject in (mine, SUBJECT):
        rows = [replace(row, subject=subject) for row in (EAGER, other("compile", 2e-3), other("onnx", 1e-3))]
        latency = image.imread(draw(Measurements(tuple(rows)), tmp_path)[0])[..., :3]
        first, second = (np.isclose(latency, to_rgb(colour), atol=0.01).all(-1).sum() for colour in ("C0", "C1"))
        assert first > 1000 and abs(first / second - 2) < 0.05


def test_plots_of_nothing(tmp_path):
    from unroll.bench.plots import draw

    with pytest.raises(UnrollError, match="no contender ran"):
        draw(Measurements((failed("eager"),)), tmp_path)
    with pytest.raises(UnrollError, match="cannot be read"):
        draw([tmp_path / "none.json"], tmp_path)
    (tmp_path / "odd.json").write_text('{"rows": [{"subject": 3}]}')
    with pytest.raises(UnrollError, match="is not a file of measurements"):
        draw([tmp_path / "odd.json"], tmp_path)
    with pytest.raises(UnrollError, match="cannot be written"):
        Measurements((EAGER,)).save(tmp_path / "no" / "found.json")
    with pytest.raises(UnrollError, match="in a directory that does not exist"):
        benchmark(contenders=["eager"], save=tmp_path / "no" / "found.json")
    with pytest.raises(UnrollError, match="cannot be written to"):
        draw(Measurements((EAGER,)), tmp_path / "odd.json")


def test_plots_by_command(tmp_path, run):
    for name, kind in (("a", "LSTM"), ("b", "GRU")):
        row = replace(EAGER, subject=replace(SUBJECT, model=kind))
        Measurements((row,)).save(tmp_path / f"{name}.json")
    files, plots = [str(tmp_path / f"{name}.json") for name in "ab"], ["--plots", str(tmp_path / "plots")]
    code, out, _ = run("bench", *files, *plots)
    assert (code, out.split()) == (0, [str(tmp_path / "plots" / f"{n}.png") for n in ("latency", "build", "ratio")])
    for arguments, reason in {
        (str(tmp_path / "c.json"), *plots): "cannot be read",
        (*files,): "is a file of measurements say where its pictures go",
        (*files, *plots, "--rounds", "3"): "--rounds: was given for",
        (files[0], "package:model", *plots): "package:model: is no file of measurements",
    }.items():
        code, _, errors = run("bench", *arguments)
        assert code == 1 and reason in " ".join(errors.split()), errors


def test_on_the_command_line(run):
    options = ("--rounds", "1", "--seconds", "0.01", "--hidden-size", "6", "--contenders", "eager,tensorrt")
    code, out, err = run("bench", "--kind", "gru", "--steps", "2,3", *options, "--save", "a.json", "--plots", "drawn")
    assert code == 0, err
    assert "GRU 64 → 6, T=2, B=1, float32, cpu, 1 thread" in out and "T=3" in out and "tensorrt" in out
    assert out.count("on this machine: use") == 2
    assert len(Measurements.load("a.json").rows) == 4 and sorted(os.listdir("drawn")) == [
        *("build.png", "latency.png", "ratio.png")
    ]
    code, out, _ = run("bench", f"{__name__}:make_unlike", *options[:4], "--contenders", "eager", "--json")
    found = json.loads(out)
    assert code == 0 and [row["contender"] for row in found["rows"]] == ["eager"] and found["advice"]


def test_refusals_on_the_command_line(run):
    for arguments, message in {
        ("--steps", "few"): "--steps few: is no list of sizes",
        (f"{__name__}:make", "--kind", "gru"): f"was given beside {__name__}:make",
        ("--contenders", "eagre"): "contender 'eagre': is unknown",
        ("--kind", "gru", "--no-bias", "--proj-size", "3"): "cannot be made",
        (f"{__name__}:make", "--no-bias"): "bias=False: was given for",
    }.items():
        code, out, err = run("bench", *arguments)
        assert code == 1 and out == "" and message in err, err
    code, out, _ = run("bench", "--help")
    assert code == 0 and all(name in out for name in ("--bidirectional", "--plan", "--backward", "--save", "--plots"))


def test_the_public_name():
    assert unroll.benchmark is benchmark and "benchmark" in unroll.__all__


@pytest.mark.heavy
def test_a_model_of_ones_own_in_onnx():
    names = ["onnx", "onnx-unrolled", "onnx-decomposed", "unrolled-aoti"]
    for row in benchmark(f"{__name__}:make", contenders=names, limit=300.0, rounds=1).rows:
        assert not row.failure and row.error < 1e-5, row


def test_repeated_sizes_are_measured_once():
    found = subjects("gru", device="cpu", threads=1, backward=False, steps=(3, 2, 3), batch=[1, 1])
    assert [(subject.steps, subject.batch) for subject in found] == [(3, 1), (2, 1)]


def test_onnx_runtime_on_a_gpu_without_tf32(monkeypatch, tmp_path):
    import onnxruntime

    asked = []

    def session(path, options, providers):
        asked.extend(providers)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    task = Task(Subject("GRU", device="cuda"), nn.GRU(5, 6), (), {})
    with pytest.raises(RuntimeError, match="no GPU"):
        onnxruntime_run(task, tmp_path / "model.onnx")
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0"})]


def test_results_of_engines_have_room():
    """TensorRT writes as many bytes as the elements of its type have, wherever it is told to."""
    sizes = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "INT8": 1, "UINT8": 1, "BOOL": 1}
    assert {name: engine_type(name).itemsize for name in sizes} == sizes
    assert engine_type("INT64") == torch.int64 and engine_type("BF16") == torch.bfloat16
    with pytest.raises(UnrollError, match="TensorRT: gives a result of the type FP8; let the model return FLOAT"):
        engine_type("FP8")


def test_ahead_of_time_the_weights_are_laid_out_once(monkeypatch, tmp_path):
    """What is compiled is frozen, as in the other compiled forms."""
    programs = []

    def package(program, package_path):
        programs.append(program)
        return package_path

    (subject,) = subjects("gru", device="cpu", threads=1, backward=False, hidden_size=6, steps=2)
    task = Task.of(subject)
    monkeypatch.setattr(sys.modules["unroll.bench.contenders"], "counted_graphs", list)
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", package)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: programs[0].module())
    with torch.no_grad():
        built = CONTENDERS["unrolled-aoti"].build(task, Plan(), tmp_path)
        assert error_of(task.runner(task.model)(), built.results(built.run())) < 1e-6
    assert not programs[0].graph_signature.parameters and programs[0].graph_signature.buffers


@pytest.mark.heavy
def test_builds_at_the_same_time():
    """Rows come in the same order, whoever is ready first."""
    names = ["eager", "onnx-unrolled"]
    found = benchmark(contenders=names, plans=["default"], jobs=4, limit=300.0, **QUICK | {"steps": [2, 3, 4]})
    assert [(row.subject.steps, row.contender) for row in found.rows] == [
        (T, name) for T in (2, 3, 4) for name in names
    ]
    assert not any(row.failure for row in found.rows)


@pytest.mark.heavy
def test_every_contender_that_this_machine_has():
    names = [name for name, form in CONTENDERS.items() if name != "compile-allow-rnn" and form.device != "cuda"]
    found = benchmark("GRU", contenders=names, plans=["default"], limit=300.0, **QUICK)
    for row in found.rows:
        assert not row.failure and row.error < 1e-5, row
    nodes = {row.contender: row.nodes for row in found.rows}
    assert nodes["compile"] == 0 < nodes["unrolled-compile"] == nodes["unrolled-cpp"]
    assert nodes["onnx"] < nodes["onnx-unrolled"]
    assert next(row.size for row in found.rows if row.contender == "unrolled-aoti") > 10_000


@pytest.mark.gpu
@pytest.mark.heavy
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    names = ["eager", "eager-unrolled", "unrolled-compile", "unrolled-cudagraphs"]
    for row in benchmark("LSTM", contenders=names, device="cuda", limit=300.0, **QUICK).rows:
        assert not row.failure and row.error < 1e-4 and row.memory > 0, row
