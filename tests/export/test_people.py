"""Models as people write them, by every way: module, compiled, program, and a file by `torch.export` or a trace."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import unroll
from tests.by_version import EXPORTS_ASSIGNED_WEIGHTS
from tests.people import PEOPLE, Memory, Person, WeightDrop
from tests.published import PUBLISHED
from unroll import UnrollError, UnrollWarning, compare, export_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from unroll.onnx.runtime import function_of  # noqa: E402

# of a model that keeps state in an attribute, which torch.export drops
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attribute")


def published(person: Person):
    needed = pytest.mark.skipif(find_spec(person.package) is None, reason=f"needs {person.package}")
    # what packages warn of is their own
    return pytest.param(person, marks=[pytest.mark.heavy, pytest.mark.filterwarnings("ignore"), needed])


EVERYBODY = [*PEOPLE, *map(published, PUBLISHED)]

TABLE = Path(__file__).parents[2] / "docs" / "models.md"


def made(person: Person) -> nn.Module:
    torch.manual_seed(0)
    return person.make().eval()


def row(person: Person) -> list[str]:
    """The cells of a model in the table of docs/models.md: module, compiled, program, file, open batch, streaming."""
    (line,) = (line for line in TABLE.read_text().splitlines() if line.startswith(f"| `{person.name}` "))
    cells = [cell.strip() for cell in line.strip("|").split("|")][2:]
    if person.make is WeightDrop and EXPORTS_ASSIGNED_WEIGHTS:
        cells[1:4] = ["yes", "yes", "`export`"]
    return cells


NO_PROGRAM = {
    "data-dependent expression": "data decides",
    "as parameter 'weight_hh_l0'": "assigns a weight",
}
NO_STREAM = {
    "is bidirectional: ": "both directions",
    "runs on a PackedSequence": "packed rows",
    "calls no recurrent layer without a state": "states of its own",
    r"looks \d+ steps back \(conv1d\)": "convolutions look back",
    "nothing was checked: no dimension of the example is that of time": "lags look back",
}


def reason(error: Exception, reasons: dict[str, str]) -> str:
    """The cell of what is refused, in the words of the table, or else the error's own."""
    said = str(error)
    return "no: " + next((short for words, short in reasons.items() if re.search(words, said)), said)


def metadata(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def exported(person, path, capture):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UnrollWarning)
        export = export_onnx(made(person), person.args(), path, dynamic_shapes=person.shapes, capture=capture)
    return export, "\n".join(str(w.message) for w in told if issubclass(w.category, UnrollWarning))


@pytest.mark.parametrize("person", EVERYBODY, ids=lambda p: p.name)
def test_modules(person):
    model = made(person)
    for args in filter(None, (person.args, person.other)):
        compare(model, unroll.unroll(model), args(), reference=person.double).check()
    assert row(person)[0] == "yes"


@pytest.mark.parametrize("person", EVERYBODY, ids=lambda p: p.name)
def test_compiled(person):
    torch._dynamo.reset()
    model, args = made(person), person.args()
    with torch.no_grad():
        expected = model(*args)
    try:
        with torch.no_grad():
            found = unroll.compile(made(person), backend="eager")(*args)
        torch.testing.assert_close(found, expected)
        result = "yes"
    except Exception:
        try:
            with torch.no_grad():
                found = unroll.compile(made(person), backend="eager", fullgraph=False)(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            words = str(error)
            result = "no: rows stay packed at a graph break" if "packed.data: leaves the model" in words else words
        else:
            torch.testing.assert_close(found, expected)
            result = "`fullgraph=False`"
    assert row(person)[1] == result


@pytest.mark.parametrize("person", EVERYBODY, ids=lambda p: p.name)
def test_programs(person):
    model, args = made(person), person.args()
    try:
        with unroll.packing():
            program = torch.export.export(unroll.unroll(model), args, strict=False)
    except Exception as error:
        result = reason(error, NO_PROGRAM)
    else:
        result = "no: the state is lost" if person.make is Memory else "yes"
    if result == "yes":
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*args), made(person)(*args))
    assert row(person)[2] == result


@pytest.mark.parametrize("person", EVERYBODY, ids=lambda p: p.name)
def test_files(person, tmp_path):
    path = tmp_path / "m.onnx"
    if person.route == "none":
        with pytest.raises(UnrollError, match=person.refused):
            exported(person, path, "auto")
        assert not path.exists()
        assert row(person)[3].startswith("no: ")
        assert not row(person)[4]
        return
    export, told = exported(person, path, "auto")
    assert not {"LSTM", "GRU", "RNN"} & export.operators.keys()
    props = metadata(path)
    assert props["unroll.capture"] == person.route
    assert props["unroll.version"] == unroll.__version__
    assert props["unroll.plan"] == "gates=paired"
    assert props["unroll.opset"] == "default"
    assert bool(told) == (person.route == "trace")
    assert row(person)[3] == ("`export`" if person.route == "export" else "`auto`, traced")
    if person.other is not None:
        args = person.other()
        with torch.no_grad():
            expected = pytree.tree_leaves(made(person)(*args))
        for found, wanted in zip(function_of(path)(*args).values(), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert row(person)[4] == ("yes" if person.other is not None else "")


@pytest.mark.parametrize("person", EVERYBODY, ids=lambda p: p.name)
def test_streams(person):
    """Three pieces, state and all, are the whole; or the model is refused, or warned of as not checked."""
    model, args = made(person), person.args()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnrollWarning)
            streamed = unroll.streaming(model, args)
    except (UnrollError, UnrollWarning) as error:
        result = reason(error, NO_STREAM)
    else:
        result = "yes"
    assert row(person)[5] == result
    assert (person.time is not None) == (result == "yes")
    if person.time is None:
        return
    given, axis = person.time
    state, found = None, []
    with torch.no_grad():
        for piece in args[given].tensor_split((1, 2), axis):
            output, state = streamed(*args[:given], piece, *args[given + 1 :], state=state)
            found.append(pytree.tree_leaves(output))
        expected = pytree.tree_leaves(model(*args))
    for pieces, whole in zip(zip(*found, strict=True), expected, strict=True):
        joined = torch.cat(pieces, axis)
        # states, and results without time, are those after the last piece
        torch.testing.assert_close(joined if joined.shape == whole.shape else pieces[-1], whole)


@pytest.mark.parametrize("person", [p for p in PEOPLE if p.route == "trace"], ids=lambda p: p.name)
def test_what_cannot_be_exported_says_what_a_trace_would_keep(person, tmp_path):
    with pytest.raises(UnrollError) as caught:
        exported(person, tmp_path / "m.onnx", "export")
    (problem,) = caught.value.problems
    assert "cannot be captured by torch.export" in problem.finding
    kept = "was seen to keep nothing" if person.name == "WeightDrop" else "would keep as in the example: "
    assert f"or pass capture='trace', which {kept}" in problem.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("person", [p for p in PEOPLE if p.route != "none"], ids=lambda p: p.name)
def test_traces(person, tmp_path):
    """All that can be exported can be traced too, but for operators that torch's older exporter lacks."""
    if person.name in ("Separator", "Documents"):  # unfold of open sizes, pad_sequence
        with pytest.raises(UnrollError, match="cannot be traced"):
            exported(person, tmp_path / "m.onnx", "trace")
        return
    export, told = exported(person, tmp_path / "m.onnx", "trace")
    assert export.report is not None
    assert export.report.ok
    assert "was traced, and whatever data decides stays as it was in the example" in told


class Branching(nn.Module):
    """Reads a flag, and does what it says, or takes the sign of a sum."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.gru, self.of = nn.GRU(3, 4), of

    def forward(self, x, flags):
        out = self.gru(x)[0]
        if self.of == "none" and x.isnan().any():
            raise ValueError("not a number")
        if self.of == "flags" and flags.any():
            out = out * 2
        if self.of == "signs" and x.sum() > 0:
            out = -out
        if self.of == "count":
            out = out[: int(flags.sum())]
        if self.of == "list":
            out = out + sum(flags.tolist())
        return out


class Padded(nn.Module):
    """Reads a table, and does another thing where one of the numbers marks padding."""

    def __init__(self, mark):
        super().__init__()
        self.table, self.gru, self.mark = nn.Embedding(9, 3), nn.GRU(3, 4), mark

    def forward(self, ids):
        x = self.table(ids)
        if (ids == self.mark).any():
            x = x * (ids != self.mark).unsqueeze(-1)
        return self.gru(x)[0]


@pytest.mark.parametrize("mark", [0, 1])
def test_a_trace_of_an_example_without_padding_is_refused(mark, tmp_path):
    ids = torch.tensor([[3, 5, 7], [4, 6, 8]])
    with pytest.raises(UnrollError, match="was kept by the trace"):
        export_onnx(Padded(mark).eval(), ids, tmp_path / "m.onnx", capture="auto")


@pytest.mark.parametrize("of", ["flags", "signs", "count", "list"])
def test_a_trace_that_is_wrong_elsewhere_is_refused(of, tmp_path):
    x = torch.randn(5, 2, 3).abs()
    flags = torch.tensor([True, True, False])
    with pytest.raises(UnrollError) as caught:
        export_onnx(Branching(of).eval(), (x, flags), tmp_path / "m.onnx", capture="auto")
    found = str(caught.value)
    assert re.search(r"test_people\.py:\d+: was kept by the trace: ", found), found
    assert "differs" in found or "shape" in found
    assert not list(tmp_path.iterdir())


def test_what_a_trace_has_kept_is_told_and_written(tmp_path):
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)

        def forward(self, x, lengths):
            if (lengths < 0).any():
                raise ValueError("negative")
            return self.gru(x)[0] * lengths[None, :, None]

    args = torch.randn(5, 2, 3), torch.tensor([1, 2])
    path = tmp_path / "m.onnx"
    with pytest.warns(UnrollWarning, match=r"Checks: was traced(.|\n)*test_people\.py:\d+: Converting"):
        export_onnx(Checks().eval(), args, path, capture="auto", output_names=["y"], opset_version=17)
    props = metadata(path)
    assert re.fullmatch(r".*test_people\.py:\d+: Converting a tensor to a Python boolean", props["unroll.frozen"])
    assert props["unroll.opset"] == "17"
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["x", "lengths"]
    assert [value.name for value in model.graph.output] == ["y"]
    assert any(node.name.startswith("gru.") for node in model.graph.node)


def test_a_tracer_takes_no_streams_and_no_programs(tmp_path):
    program = torch.export.export(nn.GRU(3, 4).eval(), (torch.zeros(4, 2, 3),))
    streamed = unroll.streaming(nn.GRU(3, 4).eval(), torch.zeros(4, 2, 3))
    for model in (program, streamed):
        with pytest.raises(UnrollError, match=r"keeps its form by torch\.export alone"):
            export_onnx(model, torch.zeros(4, 2, 3), tmp_path / "m.onnx", capture="trace")
    with pytest.raises(UnrollError, match="is no way to capture a model; choose export, trace, auto"):
        export_onnx(nn.GRU(3, 4).eval(), torch.zeros(4, 2, 3), tmp_path / "m.onnx", capture="fx")  # pyright: ignore


def test_wrong_arguments_of_a_trace(tmp_path):
    model, args = nn.GRU(3, 4).eval(), torch.zeros(4, 2, 3)
    refused = [
        ({"opset_version": 21}, "opset_version=21: is none that torch's exporter can write; ask for 14 to 20"),
        ({"input_names": ["a"], "output_names": ["a"]}, "'a': is the name of two inputs or outputs"),
        ({"input_names": ["a", "b"]}, r"input_names=\['a', 'b'\]: does not fit \['a'\]"),
        ({"output_names": ["y", "h", "c"]}, r"output_names=\['y', 'h', 'c'\]: does not fit \['y', 'h'\]"),
        ({"output_names": "y"}, "output_names='y': is a single string"),
        ({"kwargs": {"other": 1}}, "args, kwargs: do not fit GRU"),
    ]
    for options, message in refused:
        with pytest.raises(UnrollError, match=message):
            export_onnx(model, args, tmp_path / "m.onnx", capture="trace", **options)
    with pytest.raises(UnrollError, match=r"call model\.eval\(\) first"):
        export_onnx(nn.GRU(3, 4), args, tmp_path / "m.onnx", capture="trace")


def test_a_buffer_that_a_trace_changes_is_refused(tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.gru(x)[0]

    with pytest.raises(UnrollError, match="calls: is a buffer that the model changes, and an ONNX file keeps none"):
        export_onnx(Counts().eval(), torch.zeros(4, 2, 3), tmp_path / "m.onnx", capture="trace")


class Front(nn.Module):
    """A front end of speech: strided convolutions over time, and layers on what they leave."""

    def __init__(self, two: bool) -> None:
        super().__init__()
        self.two = two
        self.first, self.second = nn.Conv1d(5, 6, 3, stride=2, padding=1), nn.Conv2d(1, 3, 3, stride=2)
        self.lstm = nn.LSTM(6, 4, batch_first=True, bidirectional=True)

    def forward(self, x):
        if not self.two:
            return self.lstm(self.first(x.transpose(1, 2)).relu().transpose(1, 2))[0]
        h = self.second(x.unsqueeze(1))
        batch, channels, time, features = h.shape
        return self.lstm(h.transpose(1, 2).reshape(batch, time, channels * features))[0]


@pytest.mark.parametrize("capture", ["export", "trace"])
@pytest.mark.parametrize("two", [False, True])
@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_an_open_length_behind_a_strided_convolution(two, capture, tmp_path):
    model, path = Front(two).eval(), tmp_path / "m.onnx"
    shapes = ({0: "batch", 1: "time"},)
    export = export_onnx(model, torch.randn(2, 16, 5), path, dynamic_shapes=shapes, capture=capture)
    assert export.operators["Scan"] == 2
    assert [d.dim_param for d in onnx.load(path).graph.input[0].type.tensor_type.shape.dim] == ["batch", "time", ""]
    for steps in (9, 16, 31):
        x = torch.randn(3, steps, 5)
        with torch.no_grad():
            (found,) = function_of(path)(x).values()
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


def shapes_of(values):
    return [[d.dim_param or d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in values]


class Counted(nn.Module):
    """Takes a number that is no size of another input: as a slice, the length of a loop, or in a branch."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self.gru, self.cell, self.of = nn.GRU(3, 3), nn.GRUCell(3, 3), of

    def forward(self, x, n):
        if self.of == "slice":
            return self.gru(x[: n.item()])[0]
        if self.of == "branch":
            return self.gru(x)[0] * (1 if n.item() == 3 else 2)
        h = None
        for t in range(int(n)):
            h = self.cell(x[t], h)
        return h


@pytest.mark.parametrize("of", ["slice", "branch", "loop"])
def test_a_trace_that_keeps_a_number_is_refused(of, tmp_path):
    args = torch.randn(5, 2, 3), torch.tensor(3)
    with pytest.raises(UnrollError, match=r"test_people\.py:\d+: was kept by the trace: Converting"):
        export_onnx(Counted(of).eval(), args, tmp_path / "m.onnx", capture="trace")


def test_a_trace_is_tried_on_masks_of_both_kinds(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)

        def forward(self, x, mask):
            if not mask.any():
                raise ValueError("nothing is left")
            out = self.gru(x)[0]
            return out if mask.all() else out * mask[..., None] + 1

    args = torch.randn(5, 2, 3), torch.ones(5, 2, dtype=torch.bool)
    with pytest.raises(UnrollError, match="was kept by the trace: Converting a tensor to a Python boolean"):
        export_onnx(Masked().eval(), args, tmp_path / "m.onnx", capture="trace")


@dataclass
class Pair:
    """A class that pytree does not know."""

    x: torch.Tensor
    h: torch.Tensor


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4)

    def forward(self, x, pair=None):
        y, h = self.gru(x if pair is None else pair.x)
        return (y, Pair(y, h)) if pair is None else y


def test_no_tensor_is_lost_in_a_class_that_pytree_does_not_know(tmp_path):
    x, model, path = torch.randn(5, 2, 3), Pairs().eval(), tmp_path / "m.onnx"
    with pytest.raises(UnrollError, match="pair: is a Pair, whose tensors a trace would keep; give its tensors as"):
        export_onnx(model, (x, Pair(x, x)), path, capture="trace")
    for capture in ("trace", "auto"):
        with pytest.raises(UnrollError, match="Pairs: returns a Pair, whose tensors a trace would lose; return"):
            export_onnx(model, x, path, capture=capture)
    assert not list(tmp_path.iterdir())


class Results(nn.Module):
    """Returns more than tensors."""

    def __init__(self, *more):
        super().__init__()
        self.gru, self.more = nn.GRU(3, 4), more

    def forward(self, x):
        y = self.gru(x)[0]
        return {"y": y, "again": y, "none": None, "text": "a", "steps": x.shape[0], "more": self.more}


@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_outputs_of_a_trace_are_tensors_and_numbers_each_with_a_name(tmp_path):
    x, path = torch.randn(5, 2, 3), tmp_path / "m.onnx"
    shapes = ({0: "time", 1: "batch"},)
    export_onnx(Results(3, True).eval(), x, path, dynamic_shapes=shapes, capture="trace")
    assert [value.name for value in onnx.load(path).graph.output] == [f"output_{k}" for k in range(5)]
    y, again, *numbers = function_of(path)(torch.randn(7, 3, 3)).values()
    assert torch.equal(y, again)
    assert y.shape == (7, 3, 4)
    assert [n.item() for n in numbers] == [7, 3, True]


@pytest.mark.parametrize("more", [(), (3, 2.5)])
def test_numbers_among_the_results_of_a_program(more, tmp_path):
    class Numbers(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)

        def forward(self, x):
            y = self.gru(x)[0]
            return y, y.argmax().item(), None, *more

    x, path = torch.randn(5, 2, 3), tmp_path / "m.onnx"
    if more:
        with pytest.raises(UnrollError, match=r"model: returns 3, 2\.5, which torch's exporter cannot write; return"):
            export_onnx(Numbers().eval(), x, path)
        return
    model = Numbers().eval()
    export_onnx(model, x, path)
    other = torch.randn(5, 2, 3)
    y, place = function_of(path)(other).values()
    assert place.item() == model(other)[1] == y.argmax().item()


@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_an_input_keeps_its_name_where_an_output_would_have_it(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)

        def forward(self, output):
            return self.gru(output)[0]

    path = tmp_path / "m.onnx"
    export_onnx(Named().eval(), torch.randn(5, 2, 3), path, capture="trace")
    graph = onnx.load(path).graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["output", "output.out"]


@pytest.mark.parametrize("plan", ["default", "onnxruntime", "directions=stacked"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_frozen_layers_are_traced(kind, plan, tmp_path):
    torch.manual_seed(0)
    layer, path = kind(3, 4, 2, bidirectional=True).eval(), tmp_path / "m.onnx"
    x = torch.randn(5, 2, 3)
    export_onnx(unroll.unroll(layer, plan=plan, freeze=True), x, path, capture="trace")
    other = torch.randn(5, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(next(iter(function_of(path)(other).values())), layer(other)[0])


class Ends(nn.Module):
    """Leaves as many steps as the longest row has, or all; and drops an axis of one."""

    def __init__(self, squeeze: bool) -> None:
        super().__init__()
        self.gru, self.squeeze = nn.GRU(3, 4), squeeze

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        out, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], total_length=x.shape[0])
        return out[..., :1].squeeze() if self.squeeze else out


def test_the_shapes_of_outputs_of_a_trace_are_open_where_they_vary(tmp_path):
    path = tmp_path / "m.onnx"
    args = torch.randn(5, 2, 3), torch.tensor([5, 2])
    shapes = ({1: "batch"}, {0: "batch"})
    with pytest.warns(UnrollWarning) as told:
        export_onnx(Ends(False).eval(), args, path, dynamic_shapes=shapes, capture="trace", output_names=["y"])
    assert "y: " not in str(told[0].message)
    (((steps, batch, features),)) = shapes_of(onnx.load(path).graph.output)
    assert (steps, features) == (5, 4)
    assert not isinstance(batch, int)
    with pytest.warns(UnrollWarning, match="y: 2 axes, which are 1 on other inputs"):
        export_onnx(Ends(True).eval(), args, path, dynamic_shapes=shapes, capture="trace", output_names=["y"])


@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_inputs_of_one_name_get_a_number(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)

        def forward(self, x, d):
            return self.gru(x, d["a"]["b_c"])[0] + d["a_b"]["c"]

    path = tmp_path / "m.onnx"
    given = {"a": {"b_c": torch.randn(1, 2, 4)}, "a_b": {"c": torch.randn(1, 2, 4)}}
    export_onnx(Nested().eval(), (torch.randn(5, 2, 3), given), path, capture="trace")
    assert [value.name for value in onnx.load(path).graph.input] == ["x", "d_a_b_c", "d_a_b_c_1"]


@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_a_trace_leaves_the_example_as_it_is(tmp_path):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(3, 4)

        def forward(self, x):
            x += 1
            return self.gru(x)[0]

    x, path, model = torch.randn(5, 2, 3), tmp_path / "m.onnx", Writes().eval()
    before = x.clone()
    export_onnx(model, x, path, capture="trace")
    assert torch.equal(x, before)
    with torch.no_grad():
        torch.testing.assert_close(next(iter(function_of(path)(before).values())), model(before.clone()))


@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_open_sizes_of_a_trace_fit_the_arguments(tmp_path):
    model, x, path = nn.GRU(3, 4).eval(), torch.randn(5, 2, 3), tmp_path / "m.onnx"
    refused = [
        ({"y": {1: "b"}}, "dynamic_shapes: does not fit the arguments .'y'.; name what is given, input"),
        (({1: "b"}, None), "dynamic_shapes: does not fit the arguments .*; give one entry for each of input"),
        (
            {"input": {3: "b"}},
            "dynamic_shapes: input: does not fit .*; give an entry for each of its 3 axes",
        ),
        ({"input": (None, "b")}, "dynamic_shapes: input: does not fit the arguments"),
        ({"input": "b"}, "dynamic_shapes: input: does not fit the arguments"),
        ({"input": {1: 2.5}}, "dynamic_shapes: does not fit the arguments .2.5.; give a name or a Dim"),
        ({"input": {1: "two words"}}, "dynamic_shapes: 'two words': is no name of a size"),
    ]
    for shapes, message in refused:
        with pytest.raises(UnrollError, match=message):
            export_onnx(model, x, path, dynamic_shapes=shapes, capture="trace")
    with pytest.raises(UnrollError, match="is no name of a size"):
        export_onnx(model, x, path, dynamic_shapes={"input": {1: "two words"}})
    for shapes in ({"input": {-2: "b"}}, [(None, "b", None)]):
        export_onnx(model, x, path, dynamic_shapes=shapes, capture="trace")
        assert shapes_of(onnx.load(path).graph.input) == [[5, "b", 3]]


@pytest.mark.filterwarnings("ignore::unroll.UnrollWarning")
def test_exports_in_several_threads_print_nothing(tmp_path, capfd):
    def export(k):
        export_onnx(Branching("none").eval(), args, tmp_path / f"{k}.onnx", capture="auto")

    args = torch.randn(5, 2, 3), torch.tensor([True, False])
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(export, range(3)))
    assert capfd.readouterr().out == ""


class Picks(nn.Module):
    """Takes of each sequence the step that an index of its own says, and some features of it."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x, at):
        y = self.gru(x)[0]
        return y[torch.arange(y.shape[0]), at], y[:, None][..., at, [0, -1]]


@pytest.mark.parametrize("capture", ["export", "trace"])
def test_negative_indices_count_from_the_end(tmp_path, capture):
    model, x, path = Picks().eval(), torch.randn(2, 5, 3), tmp_path / "m.onnx"
    shapes = {"x": {1: "time"}, "at": None}
    with nullcontext() if capture == "export" else pytest.warns(UnrollWarning, match="was traced"):
        export_onnx(model, (x, torch.tensor([1, 3])), path, dynamic_shapes=shapes, capture=capture)
    run = function_of(path)
    for steps, at in ((5, [-1, 2]), (8, [-8, -3])):
        args = torch.randn(2, steps, 3), torch.tensor(at)
        compare(model, lambda *args: tuple(run(*args).values()), args, reference=False, rtol=1e-5).check()


class Bounded(nn.Module):
    """Takes from three steps to seven, and twice as many of the second input."""

    def __init__(self, seen):
        super().__init__()
        self.gru, self.seen = nn.GRU(3, 4), seen

    def forward(self, x, twice):
        self.seen.append((x.shape[0], twice.shape[0]))
        return self.gru(x)[0] + twice.unflatten(0, (-1, 2)).sum(1)[..., None]


def test_a_trace_is_checked_within_the_bounds_of_its_sizes(tmp_path):
    time, seen = torch.export.Dim("time", min=3, max=7), []
    model, path = Bounded(seen).eval(), tmp_path / "m.onnx"
    shapes, options = ({0: time}, {0: 2 * time}), {"capture": "trace"}
    with pytest.warns(UnrollWarning, match="was traced"):
        export_onnx(model, (torch.randn(5, 2, 3), torch.randn(10, 2)), path, dynamic_shapes=shapes, **options)
    assert {steps for steps, _ in seen} == {3, 4, 5, 7} and all(two == 2 * steps for steps, two in seen)
    with pytest.raises(UnrollError, match=r"dynamic_shapes: x: does not fit .*time.*for 9.*; give an example within"):
        export_onnx(model, (torch.randn(9, 2, 3), torch.randn(18, 2)), path, dynamic_shapes=shapes, **options)
