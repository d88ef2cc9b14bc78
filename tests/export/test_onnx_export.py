"""From PyTorch to ONNX files: every kind of layer and model, dynamic sizes, options, and checks that can fail."""

from __future__ import annotations

import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

import unroll
from tests.cases import CHOSEN, FEATURES, HIDDEN, Case, replace
from tests.checks import assert_equal, assert_same, problems
from unroll import Plan, UnrollError, export_onnx
from unroll.core import cells

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
onnx_ir = pytest.importorskip("onnx_ir")
from unroll.export.counting import inspect_module  # noqa: E402

RECURRENT = {"LSTM", "GRU", "RNN"}


def run(path, *tensors):
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {value.name: t.numpy() for value, t in zip(session.get_inputs(), tensors, strict=True)}
    return tuple(torch.from_numpy(array) for array in session.run(None, feed))


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_case(case, tmp_path):
    model, args = case.model(torch.float64).eval(), case.tensors(torch.float64)
    with torch.no_grad():
        expected = model(*args)
    export = export_onnx(model, args, tmp_path / "model.onnx")
    assert_same(run(export.path, *args), expected)
    assert not set(export.operators) & (RECURRENT | {"Scan", "Loop"})
    assert len(export.differences) == len(expected)
    assert_same(model(*args), expected)
    assert os.listdir(tmp_path) == ["model.onnx"]


def shapes_of(input, *rest):
    """Dynamic shapes of a holder's arguments."""
    return {"input": input} | ({"rest": rest} if rest else {})


DYNAMIC = [
    Case("LSTM", num_layers=2, bidirectional=True, proj_size=2, state=True),
    Case("GRU", num_layers=2, bidirectional=True, batch_first=True),
    Case("RNN", nonlinearity="relu", bias=False),
    Case("LSTM", form="unbatched", bidirectional=True),
]


@pytest.mark.parametrize("case", DYNAMIC, ids=str)
def test_any_length_and_batch(case, tmp_path):
    model, args = case.model(torch.float64).eval(), case.tensors(torch.float64)
    dims = {"T": Dim("T", min=1), "B": Dim("B", min=1)}
    time = 1 if case.batch_first else 0
    batched = case.form == "batched"
    input = {time: dims["T"]} | ({1 - time: dims["B"]} if batched else {})
    shapes = shapes_of(input, *[{1: dims["B"]}] * (len(args) - 1))
    export = export_onnx(model, args, tmp_path / "model.onnx", dynamic_shapes=shapes)
    assert export.operators["Scan"] == case.num_layers * (1 + case.bidirectional)
    assert len({row.shape for row in export.report.rows}) > len(export.differences)  # checked at several sizes
    for steps, batch in ((1, 1), (2, 5), (13, 2), (4, 1)):
        other = replace(case, steps=steps, batch=batch).tensors(torch.float64)
        with torch.no_grad():
            assert_same(run(export.path, *other), model(*other))


def test_only_the_batch_is_dynamic(tmp_path):
    case = Case("GRU", bidirectional=True)
    model, args = case.model().eval(), case.tensors()
    export = export_onnx(model, args, tmp_path / "m.onnx", dynamic_shapes={"input": {1: "batch"}})
    assert "Scan" not in export.operators
    input = onnx.load(export.path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in input] == [4, "batch", FEATURES]
    other = replace(case, batch=9).tensors()
    with torch.no_grad():
        assert_same(run(export.path, *other), model(*other), rtol=1e-5)


class Speech(nn.Module):
    """Convolution, layers of several kinds one of which is called twice, a cell in a loop, and control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, FEATURES)
        self.front = nn.Conv1d(FEATURES, FEATURES, 3, padding=1)
        self.encoder = nn.ModuleDict({"rnn": nn.LSTM(FEATURES, HIDDEN, 2, batch_first=True, dropout=0.5)})
        self.twice = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.cell = nn.RNNCell(HIDDEN, 4)

    def forward(self, ids, *, gain):
        x = self.front(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        y, (h, _) = self.encoder["rnn"](x)
        if y.shape[-1] != HIDDEN:  # what symbolic tracing cannot follow
            raise ValueError
        y, last = self.twice(y)
        y, last = self.twice(y * gain, last)
        state = torch.zeros(ids.shape[0], 4)
        for step in range(3):
            state = self.cell(y[:, step], state)
        return {"y": y, "states": [h, last.squeeze(0)], "state": state}


@pytest.fixture
def speech():
    torch.manual_seed(0)
    return Speech().eval(), (torch.randint(11, (2, 6)),), {"gain": torch.tensor(0.7)}


def test_model_that_cannot_be_traced(speech, tmp_path):
    model, args, kwargs = speech
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["y", "h", "last", "state"]
    export = export_onnx(
        model,
        args,
        tmp_path / "model.onnx",
        kwargs=kwargs,
        input_names=["ids", "gain"],
        output_names=names,
        dynamic_shapes={"ids": {0: "batch"}, "gain": None},
    )
    assert list(export.differences) == names and max(export.differences.values()) < 1e-6
    graph = onnx.load(export.path).graph
    assert [value.name for value in graph.input] == ["ids", "gain"]
    assert [value.name for value in graph.output] == names
    matches = [re.match(r"(.*\.l\d)\.t\d", name) for node in graph.node for name in node.output]
    prefixes = {match[1] for match in matches if match}
    cells = {"cell.l0", "cell_2.l0", "cell_3.l0"}
    assert prefixes == {"encoder.rnn.l0", "encoder.rnn.l1", "twice.l0", "twice_2.l0", *cells}
    # Three of an LSTM's four are as large, and of a GRU that is called twice each is stored once.
    counts = Counter(tuple(i.dims) for i in graph.initializer if len(i.dims) == 2)
    assert counts[(HIDDEN, 2 * HIDDEN)] == 2 and counts[(HIDDEN, 3 * HIDDEN)] == 3 and counts[(HIDDEN, 4)] == 1
    assert_equal(dict(model.state_dict()), before)
    assert isinstance(model.twice, nn.GRU)


@pytest.mark.parametrize("kind", ["GraphModule", "ExportedProgram", "unrolled"])
def test_other_kinds_of_model(kind, speech, tmp_path):
    model, args, kwargs = speech
    given = {"kwargs": kwargs}
    if kind == "ExportedProgram":
        source, args, given = torch.export.export(model, args, kwargs, strict=False), None, {}
    elif kind == "unrolled":
        source = unroll.unroll(model)
    else:
        case = Case("LSTM", proj_size=2, bidirectional=True)
        model, args, given = nn.Sequential(case.layer()).eval(), case.tensors(), {}
        source = unroll.trace(model)
    export = export_onnx(source, args, tmp_path / "model.onnx", **given)
    assert not set(export.operators) & RECURRENT
    assert export.report.ok
    names = {name for node in onnx.load(export.path).graph.node for name in node.output}
    layer = "0" if kind == "GraphModule" else "encoder.rnn"
    assert f"{layer}.l0.t3.forget" in names


def test_report(tmp_path):
    case = Case("GRU", num_layers=2)
    export = export_onnx(case.model().eval(), case.tensors(), tmp_path / "model.onnx", output_names=["y", "h"])
    assert export.size == export.path.stat().st_size
    assert export.opset == 20 and export.refused == 0
    assert set(export.seconds) == {"capture", "translate", "unroll", "save", "check"}
    text = str(export)
    assert text.startswith(f"{export.path}: {sum(export.operators.values())} nodes, 0.0 MB, opset 20, in ")
    assert "  y: differs by at most" in text and "  h: differs by at most" in text
    unchecked = export_onnx(case.model().eval(), case.tensors(), tmp_path / "model.onnx", check=False)
    assert unchecked.report is None and str(unchecked).endswith("not checked")


def test_inputs_that_the_model_refuses_are_reported(tmp_path):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(FEATURES, HIDDEN)

        def forward(self, x):
            if not torch.compiler.is_exporting() and x.shape[0] == 5:
                raise ValueError
            return self.rnn(x)[0]

    x = torch.randn(2, 3, FEATURES)
    export = export_onnx(Picky().eval(), x, tmp_path / "m.onnx", dynamic_shapes=({0: Dim("T", min=1)},))
    assert export.refused == 1 and "1 random inputs left out" in str(export)


@pytest.mark.parametrize("opset", [15, 17, 18, 21, 23])
def test_opset(opset, tmp_path):
    case = Case("LSTM")
    for dynamic in (None, {"input": {0: "time", 1: "batch"}}):
        export = export_onnx(
            case.model().eval(),
            case.tensors(),
            tmp_path / "m.onnx",
            opset_version=opset,
            dynamic_shapes=dynamic,
        )
        assert export.opset == opset


@pytest.mark.parametrize("gates", ["merged", "paired", "split"])
def test_plan(gates, tmp_path):
    case = Case("LSTM", steps=5)
    export = export_onnx(case.model().eval(), case.tensors(), tmp_path / "m.onnx", plan=Plan(gates=gates))
    products = {"merged": 1, "paired": 2, "split": 4}[gates]
    assert export.operators["Gemm"] == products * 5  # one with all inputs, four steps with a state


def test_where_and_rules(speech, tmp_path):
    model, args, kwargs = speech
    export = export_onnx(model, args, tmp_path / "m.onnx", kwargs=kwargs, where="encoder.*")
    names = {name for node in onnx.load(export.path).graph.node for name in node.output}
    assert "encoder.rnn.l0.t0.forget" in names
    assert not any(name.startswith(("twice", "cell")) for name in names)

    class Odd(nn.GRU):
        def forward(self, input):
            return torch.ops.aten.mul(super().forward(input)[0], 2)

    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = nn.GRU(FEATURES, HIDDEN)
            self.layer.load_state_dict(layer.state_dict())

        def forward(self, input):
            return self.layer(input)[0] * 2

    odd, x = Odd(FEATURES, HIDDEN).eval(), torch.randn(4, 3, FEATURES)
    export = export_onnx(
        nn.Sequential(odd).eval(), x, tmp_path / "m.onnx", rules={Odd: lambda layer: Twice(layer).eval()}
    )
    assert export.report.ok


class Two(nn.Module):
    """An LSTM after an LSTM, which torch's exporter writes as the standard's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.LSTM(FEATURES, HIDDEN), nn.LSTM(HIDDEN, HIDDEN)

    def forward(self, x, *, shift, scale):
        return self.b(self.a(x)[0])[0] * scale + shift


def test_layers_left_out_stay(tmp_path):
    model, kwargs = Two().eval(), {"scale": torch.tensor(2.0), "shift": torch.tensor(1.0)}
    args = (torch.randn(4, 3, FEATURES),)
    export = export_onnx(model, args, tmp_path / "m.onnx", kwargs=kwargs, where="a")
    assert export.operators["LSTM"] == 1 and export.report.ok
    assert [layer.name for layer in inspect_module(model, args, {"kwargs": kwargs}, where="a").layers] == ["a"]


def test_order_of_keyword_arguments(tmp_path):
    model, x, scale, shift = Two().eval(), torch.randn(4, 3, FEATURES), torch.tensor([2.0]), torch.tensor([[1.0]])
    names = ["x", "shift", "scale"]
    for kwargs in ({"scale": scale, "shift": shift}, {"shift": shift, "scale": scale}):
        export = export_onnx(model, x, tmp_path / "m.onnx", kwargs=kwargs, input_names=names)
        assert [len(value.type.tensor_type.shape.dim) for value in onnx.load(export.path).graph.input] == [3, 2, 1]
        with torch.no_grad():
            assert_same(run(export.path, x, shift, scale), (model(x, **kwargs),), rtol=1e-5)


def test_inspection_takes_a_single_argument_and_named_dimensions():
    model, x = nn.GRU(FEATURES, HIDDEN).eval(), torch.randn(4, 3, FEATURES)
    (layer,) = inspect_module(model, x, {"dynamic_shapes": {"input": {0: "T"}}}).layers
    assert (layer.kind, layer.steps) == ("GRU", None)


def test_inspection_of_any_kind_of_model(tmp_path):
    model, x = nn.Sequential(nn.GRU(FEATURES, HIDDEN)).eval(), torch.randn(4, 3, FEATURES)
    export_onnx(model, x, tmp_path / "m.onnx", where=[])
    read = onnx.load(tmp_path / "m.onnx")
    ways = [
        (model, x),
        (torch.export.export(model, (x,)),),
        (tmp_path / "m.onnx",),
        (read,),
        (onnx_ir.from_proto(read),),
    ]
    found = [unroll.inspect(*way).layers[0] for way in ways]
    told = [replace(layer, name="", size=None) for layer in found]  # names differ, and take bytes
    assert told == told[:1] * len(ways)
    assert unroll.inspect(model, x, plan="gates=split").layers[0].nodes > found[0].nodes
    assert str(unroll.inspect(model, x, where=[])) == "no recurrent layers"
    twice = unroll.inspect(nn.ModuleList([model, nn.GRU(3, 3)]))
    assert str(twice).splitlines()[-1].split() == ["all", f"{found[0].parameters + 72:,}", "?", "?"]
    for arguments, words in {
        (nn.GRU,): "got the class GRU; give a layer",
        (3,): "got int; give an nn.Module",
        (tmp_path / "m.onnx", x): "args=...",
    }.items():
        assert words in problems(unroll.inspect, *arguments)[0]
    assert "was given for a PyTorch model" in problems(unroll.inspect, model, x, steps=3)[0]


def test_inspection_shows_layers_beside_what_stands_in_the_way():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LSTM(FEATURES, HIDDEN), nn.GRU(HIDDEN, HIDDEN)

        def forward(self, x):
            y, _ = self.first(x)
            return self.second(y)[1] if y.sum() > 0 else y

    found = inspect_module(Chooses().eval(), torch.randn(4, 3, FEATURES))
    assert [layer.name for layer in found.layers] == ["first", "second"]
    assert len(found.problems) == 1 and found.layers[0].nodes is None
    assert "or pass capture='trace', which would keep as in the example: " in found.problems[0].fix


def test_what_the_model_itself_refuses_is_told_as_such(tmp_path):
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rnn = nn.Embedding(5, FEATURES), nn.GRU(FEATURES, HIDDEN)

        def forward(self, ids, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(self.table(ids), lengths, enforce_sorted=False)
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0]

    model, ids, lengths = Read().eval(), torch.zeros(4, 2, dtype=torch.int64), torch.tensor([4, 2])
    refused = [
        ((ids, torch.tensor([6, 2])), None, "Read: fails itself on the example arguments"),
        ((ids.float(), lengths), None, "Read: fails itself on the example arguments"),
        ((ids,), None, "args, kwargs: do not fit Read"),
        ((ids, lengths), ({5: "batch"}, {}), "dynamic_shapes: ids: does not fit the arguments"),
        ((ids, lengths), ({1: "batch"},), "dynamic_shapes: does not fit the arguments"),
        ((ids, lengths), ({1: "batch"}, {}), "dynamic_shapes: batch: is open, and the model fixes it to 2"),
    ]
    for args, shapes, said in refused:
        assert said in problems(export_onnx, model, args, tmp_path / "m.onnx", dynamic_shapes=shapes)[0]


def test_inspection_tells_of_state_that_a_file_would_lose():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.last = nn.GRU(FEATURES, HIDDEN), None

        def forward(self, x):
            output, self.last = self.rnn(x, self.last)
            return output

    class Cached(Memory):
        def forward(self, x):
            output, self.last = self.rnn(x)
            return output

    model, x = Memory().eval(), torch.randn(4, 3, FEATURES)
    found = unroll.inspect(model, x)
    assert [str(problem) for problem in found.problems] == [
        "last: keeps a tensor between calls, which a file would lose; make it an argument and a result"
    ]
    assert model.last is None and [layer.name for layer in found.layers] == ["rnn"]
    assert not unroll.inspect(Cached().eval(), x).problems  # kept, and of no consequence


@pytest.mark.parametrize("kind", ["module", "ExportedProgram"])
def test_changed_buffers_are_refused(kind, tmp_path):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(FEATURES, HIDDEN)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.rnn(x)[0] + self.calls

    model, x = Counts().eval(), torch.randn(4, 3, FEATURES)
    given = (model, x) if kind == "module" else (torch.export.export(model, (x,), strict=False), None)
    with pytest.raises(UnrollError, match="calls: is a buffer that the model changes"):
        export_onnx(*given, tmp_path / "m.onnx")
    assert model.calls == 0 and os.listdir(tmp_path) == []


def test_dropout_is_gone_in_evaluation_and_refused_in_training(tmp_path):
    case = Case("LSTM", num_layers=2, dropout=0.5)
    model, args = case.model(), case.tensors()
    assert export_onnx(model.eval(), args, tmp_path / "m.onnx").report.ok
    with pytest.raises(UnrollError, match=r"Holder: is in training mode.*call model\.eval\(\) first"):
        export_onnx(model.train(), args, tmp_path / "m.onnx")
    model.eval().rnn.train()
    with pytest.raises(UnrollError, match="drops out between layers in training mode; call eval"):
        export_onnx(model, args, tmp_path / "m.onnx")


def test_rows_packed_outside_of_the_model_are_refused(tmp_path):
    case = Case("GRU", form="packed")
    model = case.layer().eval()
    (packed,) = case.args()

    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = model

        def forward(self, data):
            return self.rnn(packed._replace(data=data))[0].data

    with pytest.raises(UnrollError, match=r"is called on packed rows|cannot be captured"):
        export_onnx(Takes().eval(), packed.data, tmp_path / "m.onnx")
    with pytest.raises(UnrollError, match="is given a sequence that was packed elsewhere"):
        export_onnx(unroll.unroll(Takes()).eval(), packed.data, tmp_path / "m.onnx")


def test_refusals(tmp_path):
    case = Case("RNN")
    model, args, path = case.model().eval(), case.tensors(), tmp_path / "m.onnx"
    refused = [
        ({"opset_version": 13}, r"opset_version=13: is none that torch's exporter can write; ask for 14 to \d\d"),
        ({"opset_version": 99}, r"opset_version=99: is none that torch's exporter can write; ask for 14 to \d\d"),
        ({"input_names": ["a"], "output_names": ["a"]}, "'a': is the name of two inputs or outputs; give each another"),
        ({"output_names": ["input"]}, "'input': is the name of two inputs or outputs; give each another"),
        ({"output_names": ["y", "y"]}, "'y': is the name of two inputs or outputs; give each another"),
        ({"input_names": ["x", "y"]}, r"input_names=\['x', 'y'\]: does not fit \['x'\]"),
        ({"output_names": ["y", "y2", "y3"]}, r"output_names=.*does not fit"),
        ({"where": "nothing"}, "names no recurrent layer"),
        ({"output_names": "y"}, "output_names='y': is a single string; give a list of names"),
        ({"plan": "split"}, "plan='split': is no plan; give default, .*, or fields and values"),
        ({"kwargs": {"other": 1}}, r"args, kwargs: do not fit Holder \(.*'other'\); give what its forward takes"),
    ]
    for options, message in refused:
        with pytest.raises(UnrollError, match=message):
            export_onnx(model, args, path, **options)
    with pytest.raises(UnrollError, match=r"got a dictionary of tensors; give the model"):
        export_onnx(model.state_dict(), args, path)
    for place in ("", tmp_path):
        with pytest.raises(UnrollError, match="is no name of a file; give the path"):
            export_onnx(model, args, place)
    with pytest.raises(UnrollError, match="directory that does not exist"):
        export_onnx(model, args, tmp_path / "nowhere" / "m.onnx")
    program = torch.export.export(model, args, strict=False)
    with pytest.raises(UnrollError, match=r"export_onnx\(args=\.\.\.\): was given for an ExportedProgram"):
        export_onnx(program, args, path)
    with pytest.raises(UnrollError, match="is called under autocast"), torch.autocast("cpu", torch.bfloat16):
        export_onnx(model, args, path)
    assert os.listdir(tmp_path) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("kwargs", [{}, {"hx": torch.zeros(1, 3, HIDDEN)}], ids=["args", "kwargs"])
def test_scripts_are_refused(kwargs, tmp_path):
    script = torch.jit.script(nn.GRU(FEATURES, HIDDEN).eval())
    with pytest.raises(UnrollError, match=r"cannot be captured by torch\.export"):
        export_onnx(script, torch.randn(4, 3, FEATURES), tmp_path / "m.onnx", kwargs=kwargs)


def test_an_example_of_one_row_does_not_tell_that_there_may_be_more(tmp_path):
    model, path = nn.GRU(FEATURES, HIDDEN).eval(), tmp_path / "m.onnx"
    for shape, names in (((4, 1), ("b",)), ((1, 1), ("t", "b"))):
        with pytest.raises(UnrollError) as caught:
            export_onnx(model, torch.randn(*shape, FEATURES), path, dynamic_shapes={"input": {0: "t", 1: "b"}})
        assert [str(problem) for problem in caught.value.problems] == [
            f"dynamic_shapes: {name}: is open, and 1 in the example, which torch.export fixes; "
            "give an example of 2 or more"
            for name in names
        ]
    with pytest.raises(UnrollError, match="dynamic_shapes: f: is open, and the model fixes it to 6; leave it out"):
        export_onnx(model, torch.randn(4, 2, FEATURES), path, dynamic_shapes={"input": {2: "f"}})


def test_an_example_that_is_a_piece_of_a_tensor(tmp_path):
    """Its strides would be taken for a condition on its sizes."""
    model, whole = nn.GRU(FEATURES, HIDDEN, batch_first=True).eval(), torch.randn(2, 60, FEATURES)
    shapes = {"input": {0: "b", 1: "t"}}
    export = export_onnx(model, whole[:, :10], tmp_path / "m.onnx", dynamic_shapes=shapes)
    with torch.no_grad():
        assert_same(run(export.path, whole), model(whole), rtol=1e-5)


class Squeezes(nn.Module):
    """Squeezes sizes that are not one, which torch leaves, and one that is."""

    def __init__(self, *axes):
        super().__init__()
        self.rnn, self.axes = nn.GRU(FEATURES, HIDDEN), axes

    def forward(self, x):
        for axis in self.axes:
            x = x.squeeze(axis)
        return self.rnn(x)[0].squeeze(self.axes[0])


@pytest.mark.parametrize("axes", [(0,), (-1, 1), ((0, 2),), ((0, 3), -1)])
def test_squeezes_that_leave_out_nothing(tmp_path, axes):
    model = Squeezes(*axes).eval()
    x = torch.randn(4, 3, FEATURES, *[1] * (axes == ((0, 3), -1)))
    if axes == ((0, 3), -1):
        model.forward = lambda x: model.rnn(x.squeeze((0, 3)))[0].squeeze(-1)
    export = export_onnx(model, x, tmp_path / "m.onnx")
    with torch.no_grad():
        assert_same(run(export.path, x), (model(x),), rtol=1e-5)
    assert export.operators["Squeeze"] == (axes == ((0, 3), -1))


@pytest.mark.parametrize("name", ["zeros", "add", "full", "output", "x"])
def test_tensors_called_as_what_a_graph_computes(tmp_path, name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(FEATURES, HIDDEN)
            self.register_buffer(name, torch.randn(HIDDEN))

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], total_length=x.shape[0])[0]
            return output + getattr(self, name) + torch.zeros(HIDDEN), torch.full((2,), 3.0)

    model, inputs = Model().eval(), (torch.randn(6, 3, FEATURES), torch.tensor([2, 6, 4]))
    export_onnx(model, inputs, tmp_path / "m.onnx")
    names = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert name in names or f"{name}.1" in names
    assert not any("unroll_names" in found for found in names)


def test_what_to_do_where_onnx_runtime_refuses_a_file(tmp_path):
    text = "g (float[2, 3] x) => (float[2] y) <int64[1] a = {1}> { y = Squeeze(x, a) }"
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(onnx.parser.parse_graph(text), opset_imports=[opset], ir_version=9)
    onnx.save(model, tmp_path / "squeeze.onnx")
    with pytest.raises(
        UnrollError, match="torch's exporter wrote that node if it is no step of a layer: change the operation"
    ):
        unroll.Stream(tmp_path / "squeeze.onnx")
    graph = onnx.parser.parse_graph("g (float[2] x) => (float[2] y) { y = Tanh(x) }")
    for versions, reason in (
        ((1000, 10), r"1000 is under development.*; ask for an older opset_version, or pass check=False"),
        ((18, 1000), r"IR version: 1000.*; install a newer ONNX Runtime"),
    ):
        opset = onnx.helper.make_opsetid("", versions[0])
        onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=versions[1]), tmp_path / "new.onnx")
        with pytest.raises(UnrollError, match=reason):
            unroll.Stream(tmp_path / "new.onnx")
    with pytest.raises(UnrollError, match=r"missing\.onnx: cannot be read .*; give the path of an ONNX file"):
        unroll.Stream(tmp_path / "missing.onnx")
    (tmp_path / "text.onnx").write_text("no ONNX file")
    with pytest.raises(UnrollError, match=r"text\.onnx: is refused by ONNX Runtime .*; give the path of an ONNX file"):
        unroll.Stream(tmp_path / "text.onnx")


def test_an_lstm_with_a_projection_cannot_be_left_to_torchs_exporter(tmp_path, capfd):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.GRU(FEATURES, HIDDEN), nn.LSTM(HIDDEN, HIDDEN, proj_size=2)

        def forward(self, x):
            return self.b(self.a(x)[0])[0]

    model, x = Two().eval(), torch.randn(4, 3, FEATURES)
    for check in (True, False):
        with pytest.raises(UnrollError, match=r"^b: has proj_size, .*not chosen by where=; let where= choose it too"):
            export_onnx(model, x, tmp_path / "m.onnx", where="a", check=check)
    assert capfd.readouterr() == ("", "")
    assert export_onnx(model, x, tmp_path / "m.onnx", where=["a", "b"]).report.ok


def mistaken_lstm(x, state, weights, label):
    """Its input and forget gates swapped."""
    h, c = state
    if c is None:
        return cells._lstm(x, state, weights, label)
    pre = [torch.addmm(xi, h, w.weight) for xi, w in zip(x, weights.hidden)]
    i, f, o = torch.chunk(torch.sigmoid(pre[0]), 3, 1)
    c = torch.add(torch.mul(i, c), torch.mul(f, torch.tanh(pre[1])))
    return torch.mul(o, torch.tanh(c)), c


@pytest.mark.parametrize("many", [10_000, 0])
def test_failed_check_leaves_nothing_behind(tmp_path, monkeypatch, many):
    monkeypatch.setattr("unroll.onnx.runtime.MANY", many)
    case = Case("LSTM")
    model, args, path = case.model().eval(), case.tensors(), tmp_path / "m.onnx"
    path.write_bytes(b"older")
    good = cells.CELLS["LSTM"]
    monkeypatch.setitem(cells.CELLS, "LSTM", cells.Cell(good.gates, good.sigmoid, good.states, True, mistaken_lstm))
    with pytest.raises(UnrollError, match=r"differs by .* more than"):
        export_onnx(model, args, path)
    assert os.listdir(tmp_path) == ["m.onnx"] and path.read_bytes() == b"older"


def test_operators_outside_the_standard_are_refused(tmp_path):
    class Foreign(nn.Module):
        def forward(self, x):
            return torch.onnx.ops.symbolic("mine::Op", (x,), {}, dtype=x.dtype, shape=x.shape, version=1)

    with pytest.raises(UnrollError, match="mine::Op is not in version 1 of the standard"):
        export_onnx(Foreign().eval(), torch.randn(2), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    from unroll.onnx import files

    monkeypatch.setattr(files.write_then_move.__wrapped__, "__kwdefaults__", {"largest": 100})
    case = Case("GRU")
    model, args = case.model().eval(), case.tensors()
    export = export_onnx(model, args, tmp_path / "m.onnx")
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert export.size == sum((tmp_path / name).stat().st_size for name in os.listdir(tmp_path))
    with torch.no_grad():
        assert_same(run(export.path, *args), model(*args), rtol=1e-5)


def levels(monkeypatch):
    """The levels of optimization at which sessions are made from now on."""
    found, made = [], ort.InferenceSession

    def note(path, options, **others):
        found.append(options.graph_optimization_level)
        return made(path, options, **others)

    monkeypatch.setattr(ort, "InferenceSession", note)
    return found


def test_many_nodes_are_checked_as_they_are_written(tmp_path, monkeypatch):
    found, level = levels(monkeypatch), ort.GraphOptimizationLevel
    case = Case("LSTM")
    model, args = case.model().eval(), case.tensors()
    count = sum(export_onnx(model, args, tmp_path / "m.onnx").operators.values())
    monkeypatch.setattr("unroll.onnx.runtime.MANY", count)
    export_onnx(model, args, tmp_path / "m.onnx")
    monkeypatch.setattr("unroll.onnx.runtime.MANY", count - 1)
    assert export_onnx(model, args, tmp_path / "m.onnx").report.ok
    assert found == [level.ORT_ENABLE_ALL, level.ORT_ENABLE_ALL, level.ORT_DISABLE_ALL]


@pytest.mark.parametrize("many", [10_000, 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, many, tmp_path, monkeypatch):
    monkeypatch.setattr("unroll.onnx.runtime.MANY", many)
    case = Case("LSTM", state=True)
    model, args = case.model(dtype).eval(), case.tensors(dtype)
    if dtype is torch.float16:
        assert export_onnx(model, args, tmp_path / "m.onnx").report.ok
        return
    with pytest.raises(UnrollError, match=r"refused by ONNX Runtime.*pass check=False for another runtime"):
        export_onnx(model, args, tmp_path / "m.onnx")
    export = export_onnx(model, args, tmp_path / "m.onnx", check=False)
    from onnx.reference import ReferenceEvaluator

    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = [value.name for value in onnx.load(export.path).graph.input]
    feed = {name: t.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) for name, t in zip(names, args, strict=True)}
    results = ReferenceEvaluator(str(export.path)).run(None, feed)
    with torch.no_grad():
        for result, expected in zip(results, model(*args), strict=True):
            np.testing.assert_allclose(result.astype(np.float32), expected.float().numpy(), atol=0.02)


def test_time_grows_with_the_steps_alone(tmp_path):
    """What torch's exporter is given does not grow."""
    sizes = []
    for steps in (4, 64):
        case = Case("LSTM", num_layers=2, bidirectional=True, steps=steps)
        seen = []
        export = export_onnx(case.model().eval(), case.tensors(), tmp_path / "m.onnx", progress=seen.append)
        assert seen == ["capture", "translate", "unroll", "save", "check"]
        sizes.append(sum(export.operators.values()))
    per_step = (sizes[1] - sizes[0]) / 60
    assert per_step == 4 * 10  # Gemm, Sigmoid, Split, Gemm, Tanh, Mul, Mul, Add, Tanh, Mul in each of four passes


class Difference(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, x, y, *, z=None):
        x = x - 2 * y if z is None else x - 2 * y + 3 * z
        return self.rnn(x)[0]


def test_one_tensor_for_several_arguments(tmp_path):
    """`torch.export` makes one input of both, and gives other results for others."""
    model, path = Difference().eval(), tmp_path / "model.onnx"
    x, y = torch.randn(2, 5, 2, 3).unbind()
    assert export_onnx(model, (x, x), path).report.ok
    session = ort.InferenceSession(path)
    feed = dict(zip((value.name for value in session.get_inputs()), (x.numpy(), y.numpy()), strict=True))
    torch.testing.assert_close(torch.from_numpy(session.run(None, feed)[0]), model(x, y).detach())
    assert export_onnx(model, (x, y), path, kwargs={"z": x}).report.ok
    program = torch.export.export(model, (x, x))
    (refused,) = problems(export_onnx, program, None, path)
    assert refused.startswith("x: was exported with the tensor of another argument")
    assert export_onnx(torch.export.export(model, (x, y)), None, path).report.ok


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.LSTM(3, 5), ["output", "h_n", "c_n"]),
        (unroll(nn.GRU(3, 5)), ["output", "h_n"]),
        (nn.LSTMCell(3, 5), ["h_1", "c_1"]),
        (nn.RNNCell(3, 5), ["h_1"]),
    ],
    ids=repr,
)
def test_results_of_a_layer_are_called_as_in_its_documentation(layer, names, tmp_path):
    exported = export_onnx(layer.eval(), torch.randn(4, 3), tmp_path / "layer.onnx")
    assert list(exported.differences) == names


class Twice(nn.Module):
    """Returns a dictionary, of a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.GRU(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        output, h = self.rnn(x)
        return {"tags": self.out(self.rnn(output)[0]), "last": h}


def test_results_are_called_as_in_the_files_of_torchs_exporter(tmp_path):
    model, x, path = Twice().eval(), torch.randn(4, 2, 3), tmp_path / "model.onnx"
    names = []
    for options in ({"where": []}, {}, {"output_names": ["tags", "last"]}):
        export_onnx(model, x, path, **options)
        names.append([value.name for value in onnx.load(path).graph.output])
    assert names == [["linear", "getitem_1"], ["linear", "getitem_1"], ["tags", "last"]]


def test_weights_that_are_not_there(tmp_path):
    with torch.device("meta"):
        model = nn.Sequential(nn.GRU(3, 5)).eval()
    with pytest.raises(UnrollError, match=r"has no weights, only their shapes \(device meta\); load them first"):
        export_onnx(model, torch.randn(4, 2, 3), tmp_path / "model.onnx")


def test_arguments_in_another_order(tmp_path):
    with pytest.raises(UnrollError, match="path: is a Tensor; give the arguments before the path"):
        export_onnx(nn.GRU(3, 5).eval(), tmp_path / "model.onnx", torch.randn(4, 2, 3))
    with pytest.raises(UnrollError, match=r"dynamic_axes=\.\.\.\): is no argument; did you mean dynamic_shapes"):
        export_onnx(nn.GRU(3, 5).eval(), torch.randn(4, 2, 3), tmp_path / "model.onnx", dynamic_axes={})


def test_files_of_pytorch_are_called_so(tmp_path):
    torch.save(nn.GRU(3, 5).state_dict(), tmp_path / "model.pt")
    with pytest.raises(UnrollError, match=r"is a file of PyTorch's; read it by torch\.load"):
        unroll(tmp_path / "model.pt")
