"""The command line, as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

import unroll
from tests.cases import Case
from tests.onnx import standard

onnx = pytest.importorskip("onnx")
pytest.importorskip("typer")
from unroll.cli.main import main  # noqa: E402
from unroll.export import judging  # noqa: E402

CASE = Case("LSTM", num_layers=2, bidirectional=True)


def make():
    return CASE.model().eval(), CASE.tensors()


def make_dynamic():
    return (*make(), {"dynamic_shapes": {"input": {0: Dim("T", min=1)}}, "output_names": ["y", "h", "c"]})


def make_for_opset():
    return (*make(), {"opset_version": 18})


def make_alone():
    return CASE.model().eval()


def make_exported():
    return torch.export.export(*make())


def make_nothing():
    return 3


def make_noisily():
    print("noise")
    return make()


def make_named():
    return (*make(), {"where": "r*"})


def make_with_plan():
    return (*make(), {"plan": None, "nonsense": 1})


def make_with_list():
    return (*make(), [1])


def make_of(size):
    return size


def make_none():
    raise RuntimeError("no weights in [/red]")


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 5)

    def forward(self, x):
        y, h = self.rnn(x)
        return h if y.sum() > 0 else y


def make_choosing():
    return Chooses().eval(), CASE.tensors()[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.GRU(6, 6), nn.GRU(6, 5)

    def forward(self, x):
        return self.b(self.a(x)[0])[0]


def make_pair():
    return Pair().eval(), CASE.tensors()[0]


NOTHING = None
CELLS = nn.Sequential(nn.GRUCell(3, 5))


@pytest.fixture
def source(tmp_path):
    inputs = standard.draw("GRU", {}, dtype=np.float32)
    onnx.save(standard.model("GRU", {}, inputs, dynamic=("steps",)), tmp_path / "in.onnx")
    return tmp_path / "in.onnx"


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for word in ("onnx", "export", "inspect", "Exit codes: 0 done"):
        assert word in out
    for command, words in {
        "onnx": ("SOURCE  An ONNX file.", "TARGET  Where", "--where", "--steps", "--plan", "--json", "Scan"),
        "export": ("FACTORY  package.module:name", "TARGET   The", "--no-check", "--opset"),
        "inspect": ("MODEL  An ONNX file", "what unrolling makes of each", "--json"),
        "bench": ("FACTORY  package.module:name", "--contenders FORMS"),
    }.items():
        code, out, _ = run(command, "--help")
        assert code == 0
        assert all(word in out for word in words) and "<" not in out, out


def test_onnx(run, source):
    code, out, _ = run("onnx", source, "out.onnx")
    assert code == 0 and out.startswith("out.onnx: ") and " nodes, 0.0 MB" in out
    assert "Scan" in operators("out.onnx") and "GRU" not in operators("out.onnx")
    code, again, _ = run("onnx", "out.onnx", "out.onnx", "--force")
    assert (code, again) == (0, out.rstrip() + "; no recurrent node was replaced\n")
    code, out, _ = run("onnx", source, "out.onnx", "--steps", "4", "--plan", "npu", "--json")
    found = json.loads(out)
    assert code == 0 and found["path"] == "out.onnx" and found["size"] == os.path.getsize("out.onnx")
    assert found["operators"]["MatMul"] == 3 + 3 * 3  # the first step has no state, and there is no bias
    assert "Scan" not in operators("out.onnx")
    code, out, _ = run("onnx", source, "out.onnx", "--steps", "4", "--plan", "gates=split,time=2", "--json")
    found = json.loads(out)
    assert code == 0 and found["operators"]["Scan"] == 1 and found["operators"]["Gemm"] == 3 * 2


def test_errors_name_the_mend(run, source):
    cases = [
        (("onnx", "nothing.onnx", "out.onnx"), "nothing.onnx: cannot be read", "give the path of an ONNX file"),
        (("onnx", source, "no/out.onnx"), "directory that does not exist", "make it first"),
        (("onnx", source, "out.onnx", "--where", "x"), "names no recurrent node", "the recurrent nodes are: rnn"),
        (("onnx", source, "out.onnx", "--plan", "gates=all"), "got 'all'", "choose one of 'merged', 'paired', 'split'"),
        (("inspect", source, "--plan", "fast"), "plan='fast': is no plan", "give default, onnxruntime"),
        (("export", "nomodule:make", "out.onnx"), "No module named 'nomodule'", "give package.module:name"),
        (
            ("export", f"{__name__}:nothing", "out.onnx"),
            "has no attribute 'nothing'",
            "give package.module:name",
        ),
        (("export", "tests", "out.onnx"), "is not the name of a function", "give package.module:name"),
        (("export", f"{__name__}:make_nothing", "out.onnx"), "returns int", "let it return an nn.Module"),
        (
            ("export", f"{__name__}:make_alone", "out.onnx"),
            "returns a model alone",
            "a tuple of example arguments",
        ),
        (
            ("export", f"{__name__}:make_for_opset", "out.onnx", "--opset", "19"),
            "gives opset_version, and so does the command line",
            "give it once",
        ),
        (("export", f"{__name__}:NOTHING", "out.onnx"), "is a NoneType", "give a function"),
        (
            ("export", f"{__name__}:make_none", "out.onnx"),
            "RuntimeError: no weights in [/red]",
            "give a function",
        ),
        (("export", f"{__name__}:make_of", "out.onnx"), "needs size", "give a function without arguments"),
        (
            ("export", f"{__name__}:make_with_list", "out.onnx"),
            "returns a list for options",
            "return a dictionary",
        ),
        (
            ("export", f"{__name__}:make_with_plan", "out.onnx"),
            "the options plan, nonsense",
            "it may give kwargs, ",
        ),
        (("onnx", source, "."), "is no name of a file", "give the path of the file to write"),
        (("onnx", "[/red].onnx", "out.onnx"), "[/red].onnx: cannot be read", "give the path of an ONNX file"),
        (("export", f"{__name__}:make_choosing", "out.onnx"), "cannot be captured", "make torch.export"),
    ]
    for arguments, finding, fix in cases:
        code, out, err = run(*arguments)
        assert code == 1 and out == ""
        assert finding in err and fix in err and "Traceback" not in err, err
        assert not os.path.exists("out.onnx")


def test_usage_errors(run):
    for arguments in (
        ("onnx",),
        ("export", "a:b"),
        ("fly",),
        ("inspect", "--loud"),
        ("onnx", "a", "b", "--steps", "0"),
    ):
        assert run(*arguments)[0] == 2


def test_export(run):
    code, out, _ = run("export", f"{__name__}:make", "out.onnx", "--opset", "18")
    assert code == 0 and "opset 18" in out and "differs by at most" in out
    assert not operators("out.onnx") & {"LSTM", "Scan"}
    code, out, _ = run("export", f"{__name__}:make_dynamic", "out.onnx", "--json")
    found = json.loads(out)
    assert code == 0 and set(found["differences"]) == {"y", "h", "c"}
    assert found["operators"]["Scan"] == 4 and found["seconds"]["check"] > 0
    code, out, _ = run("export", f"{__name__}:make", "out.onnx", "--no-check", "--json")
    assert json.loads(out)["differences"] is None


def test_inspect(run, source):
    code, out, _ = run("inspect", f"{__name__}:make", "--json")
    (layer,) = json.loads(out)["layers"]
    parameters = sum(p.numel() for p in make_alone().parameters())
    sizes = {"input_size": 6, "hidden_size": 5, "layers": 2, "directions": 2, "steps": 4, "parameters": parameters}
    assert code == 0 and layer == {
        "name": "rnn",
        "kind": "LSTM",
        **sizes,
        "nodes": layer["nodes"],
        "size": layer["size"],
    }
    run("export", f"{__name__}:make", "out.onnx", "--no-check")
    written = [node for node in onnx.load("out.onnx").graph.node if node.name.startswith("rnn.")]
    assert layer["nodes"] == len(written)
    assert abs(layer["size"] - sum(node.ByteSize() for node in written)) < 0.05 * layer["size"]

    code, out, _ = run("inspect", f"{__name__}:make")
    assert code == 0
    header, row = out.splitlines()
    assert header.split()[:6] == ["layer", "kind", "sizes", "layers", "directions", "steps"]
    assert header.endswith("added kB") and row.split()[:8] == ["rnn", "LSTM", "6", "→", "5", "2", "2", "4"]

    (layer,) = json.loads(run("inspect", source, "--json")[1])["layers"]
    assert (layer["name"], layer["kind"], layer["steps"], layer["parameters"]) == ("rnn", "GRU", None, 45)
    (alone,) = json.loads(run("inspect", f"{__name__}:make_alone", "--json")[1])["layers"]
    assert alone["nodes"] is None and alone["parameters"] == parameters
    (cell,) = json.loads(run("inspect", f"{__name__}:CELLS", "--json")[1])["layers"]
    assert (cell["name"], cell["kind"], cell["steps"]) == ("0", "GRU cell", 1)

    run("onnx", source, "out.onnx")
    assert run("inspect", "out.onnx")[:2] == (0, "no recurrent layers\n")


def test_a_picture_of_the_steps(run, source):
    pytest.importorskip("matplotlib")
    for model, steps in ((f"{__name__}:make_pair", 4), (source, None)):
        code, _, err = run("inspect", model, "--draw", "steps.svg", "--plan", "gates=split")
        assert code == 0 and not err
        assert f"{steps or 'any number of'} steps" in Path("steps.svg").read_text()
    code, _, err = run("inspect", f"{__name__}:make_exported", "--draw", "no.svg")
    assert code == 1 and "draw(model): got ExportedProgram" in err
    assert run("inspect", source, "--draw", "no/steps.svg")[0] == 1


def test_inspect_says_what_stands_in_the_way(run, source):
    model = onnx.load(source)
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("activations", ["Sigmoid", "Swish"]))
    onnx.save(model, "odd.onnx")
    code, out, _ = run("inspect", "odd.onnx", "--json")
    (problem,) = json.loads(out)["problems"]
    assert code == 1 and problem["place"] == "rnn" and "'Swish' is unknown" in problem["finding"]
    code, out, err = run("inspect", "odd.onnx")
    assert (code, out) == (1, "") and "error: rnn: the activation 'Swish' is unknown" in err
    source.write_bytes(source.read_bytes()[:100])
    assert run("inspect", source)[0] == 1


def test_inspection_of_what_cannot_be_exported(run):
    code, out, err = run("inspect", f"{__name__}:make_choosing")
    assert code == 1 and out.splitlines()[1].split()[:2] == ["rnn", "GRU"] and "error: Chooses: cannot be " in err
    code, out, err = run("inspect", f"{__name__}:make", "--steps", "9")
    assert (code, out) == (1, "") and "steps=9: was given for a PyTorch model" in err
    code, out, err = run("inspect", f"{__name__}:make_named", "--where", "rnn")
    assert (code, out) == (1, "") and "gives where, and so does the command line" in err


def test_inspection_for_a_target(run, source):
    code, out, _ = run("inspect", source, "--target", "npu")
    assert code == 1 and "GRU" in out and "is recurrent, and not offered: rnn" in out
    assert run("onnx", source, "out.onnx", "--steps", "5")[0] == 0
    code, out, _ = run("inspect", "out.onnx", "--target", "tensorrt")
    assert code == 0 and "all offered" in out
    code, out, _ = run("inspect", f"{__name__}:make_exported", "--target", "xnnpack", "--json")
    assert code == 1 and "aten.lstm.input" in [row["operator"] for row in json.loads(out)["rows"]]


@pytest.fixture
def few_plans(monkeypatch):
    """Fewer plans are tried; the example of `try_plans` tries all."""
    monkeypatch.setattr(judging, "TRIED", ("npu", "quantize", "gates=split"))


@pytest.mark.usefixtures("few_plans")
@pytest.mark.parametrize("target", ["npu", "tensorrt", "torch_tensorrt", "webnn", "xnnpack"])
def test_a_model_and_its_arguments_are_unrolled_for_a_target(run, target):
    code, out, _ = run("inspect", f"{__name__}:make", "--target", target, "--json")
    found = json.loads(out)
    assert code == (not found["ok"]) and found["nodes"] > 50
    assert not [row for row in found["rows"] if "recurrent" in row["finding"]]
    if target != "xnnpack":  # what docs/contracts.md promises
        assert found["ok"]
    assert found["ok"] != ("plans" in found)
    if target == "webnn":
        default = ("inspect", f"{__name__}:make", "--target", target, "--plan", "gates=merged")
        assert {"npu", "quantize"} <= set(json.loads(run(*default, "--json")[1])["plans"])
        assert "What keeps to webnn: --plan npu or " in run(*default)[1]
        assert run("inspect", f"{__name__}:make", "--target", target, "--plan", "products=linear")[0] == 0
    if target == "xnnpack":  # which takes parts
        assert found["plans"] == [] and found["most"]["plan"] == "quantize" and found["most"]["products_left"] == 0
        assert (
            "most with --plan quantize: all products, and" in run("inspect", f"{__name__}:make", "--target", target)[1]
        )


@pytest.mark.usefixtures("few_plans")
def test_what_is_unrolled_for_a_target_can_be_told(run):
    def nodes(*options):
        return json.loads(run("inspect", f"{__name__}:make", "--target", "npu", "--json", *options)[1])["nodes"]

    assert nodes() == nodes("--plan", "npu") > nodes("--plan", "tensorrt")
    code, out, _ = run("inspect", f"{__name__}:make_pair", "--target", "torch_tensorrt", "--where", "a")
    assert code == 1 and "aten.gru.input" in out and "1 finding" in out  # b, which is left as it is
    code, out, _ = run("inspect", f"{__name__}:make_dynamic", "--target", "npu")
    assert code == 1 and "Scan" in out  # the lengths are open
    code, _, err = run("inspect", f"{__name__}:make_named", "--target", "npu", "--where", "rnn")
    assert code == 1 and "gives where, and so does the command line" in err
    code, _, err = run("inspect", f"{__name__}:make_choosing", "--target", "xnnpack")
    assert code == 1 and "Chooses: cannot be exported" in err


def make_products():
    return make_fx(lambda x, w: x @ w)(torch.randn(2, 3), torch.randn(3, 4)), (torch.randn(2, 3), torch.randn(3, 4))


def make_products_alone():
    return make_products()[0]


def test_products_that_a_quantizer_left_are_told(run, source):
    for factory in ("make_products", "make_products_alone"):
        code, out, _ = run("inspect", f"{__name__}:{factory}", "--target", "pt2e")
        assert code == 1 and "pt2e: 1 of 1 products are float" in out
    for model in (source, f"{__name__}:make", f"{__name__}:make_alone"):
        code, _, err = run("inspect", model, "--target", "pt2e")
        assert code == 1 and "give an ExportedProgram or a GraphModule" in " ".join(err.split()), err
    code, _, err = run("inspect", f"{__name__}:make_products", "--target", "pt2e", "--plan", "npu")
    assert code == 1 and "--plan: was given with --target" in err


def test_what_cannot_be_inspected_for_a_target(run, source):
    run("export", f"{__name__}:make", "made.onnx", "--no-check")
    for option, value in (("--steps", "5"), ("--plan", "npu"), ("--where", "rnn")):
        for model in ("made.onnx", f"{__name__}:make_exported"):
            code, _, err = run("inspect", model, "--target", "npu", option, value)
            assert code == 1 and f"{option}: was given with --target" in err and "judged as it is" in err
    code, _, err = run("inspect", f"{__name__}:make", "--target", "npu", "--steps", "5")
    assert code == 1 and "--steps: was given with --target" in err
    code, _, err = run("inspect", f"{__name__}:make_alone", "--target", "xnnpack")
    assert code == 1 and "returns a model alone" in err and "a tuple of example arguments" in err
    code, _, err = run("inspect", source, "--target", "xnnpack")
    assert code == 1 and "got an ONNX model" in err
    code, _, err = run("inspect", source, "--target", "nowhere")
    assert code == 1 and "choose one of npu" in err


@pytest.mark.parametrize("command", [("inspect",), ("export", "out.onnx")], ids=lambda c: c[0])
def test_json_alone_is_printed(command, run):
    code, out, err = run(command[0], f"{__name__}:make_noisily", *command[1:], "--json")
    assert code == 0 and json.loads(out) and "noise" in err


def test_a_source_that_is_not_valid(run, source):
    model = onnx.load(source)
    model.graph.node.append(onnx.helper.make_node("Relu", ["X"], ["Z"], alpha=1.0))
    onnx.save(model, "odd.onnx")
    code, _, err = run("onnx", "odd.onnx", "out.onnx")
    assert code == 1 and "odd.onnx: is itself not valid ONNX" in err and not os.path.exists("out.onnx")


def test_names_with_brackets(run, source):
    model = onnx.load(source)
    model.graph.node[0].name = "[/red]"
    onnx.save(model, source)
    assert "[/red]" in run("inspect", source)[1]
    code, out, _ = run("onnx", source, "[bold].onnx")
    assert code == 0 and out.startswith("[bold].onnx: ")


def test_names_are_printed_in_full(run, source, monkeypatch):
    """However narrow the terminal, so that they can be given to --where."""
    monkeypatch.setenv("COLUMNS", "40")
    names = ["If_0_else_branch__" + 80 * "a" + end for end in ("first", ":boom:")]
    model = onnx.load(source)
    model.graph.node[0].name = names[0]
    model.graph.node.add().CopyFrom(model.graph.node[0])
    model.graph.node[1].name = names[1]
    model.graph.node[1].output[:] = [f"{name}2" if name else "" for name in model.graph.node[0].output]
    onnx.save(model, source)
    lines = run("inspect", source)[1].splitlines()
    assert [line.split()[0] for line in lines] == ["layer", *names, "all"] and lines[1].split()[1:4] == [
        "GRU",
        "2",
        "→",
    ]
    code, _, err = run("inspect", "fac:boom:")
    assert code == 1 and "fac:boom:: is not the name of a function" in err
    code, out, _ = run("onnx", source, ":boom:.onnx")
    assert code == 0 and out.startswith(":boom:.onnx: ")


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "unroll", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Exit codes" in done.stdout


def test_version(run):
    assert run("--version") == (0, f"unroll {unroll.__version__}\n", "")


def test_missing_extra_is_named(monkeypatch):
    code = "import sys; sys.modules['rich'] = None\nimport unroll.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install 'torch-unroll[cli]'" in done.stderr
    code = "import sys; sys.modules['onnx'] = None; import unroll; unroll.unroll('model.onnx')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'torch-unroll[onnx]'" in done.stderr


def test_the_script_has_its_name():
    project = tomllib.loads((Path(unroll.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"unroll": f"{main.__module__}:{main.__name__}"}


def rnn_file(path):
    onnx.save(standard.model("RNN", {}, standard.draw("RNN", {}, dtype=np.float32)), path)


def test_a_file_is_not_written_over_itself(run, tmp_path):
    rnn_file("m.onnx")
    before = Path("m.onnx").read_bytes()
    Path("link.onnx").symlink_to("m.onnx")
    for target in ("m.onnx", "./m.onnx", "link.onnx", tmp_path / "m.onnx"):
        code, _, err = run("onnx", "m.onnx", target)
        assert (code, "is the file to be read" in err, Path("m.onnx").read_bytes() == before) == (1, True, True)
    code, _, _ = run("onnx", "m.onnx", "m.onnx", "--force")
    assert code == 0
    assert {node.op_type for node in onnx.load("m.onnx").graph.node} & {"RNN", "Tanh"} == {"Tanh"}


def test_both_files_are_compared(run, monkeypatch):
    pytest.importorskip("onnxruntime")
    for kind in ("LSTM", "GRU", "RNN"):
        inputs = standard.draw(kind, {}, optional=("B", "sequence_lens", "initial_h"), dtype=np.float32)
        onnx.save(standard.model(kind, {}, inputs, dynamic=("steps", "batch")), "m.onnx")
        for options in ([], ["--steps", "4"], ["--plan", "time=3"]):
            code, out, _ = run("onnx", "m.onnx", "n.onnx", "--check", "--force", *options)
            assert (code, "on random numbers: differs by at most" in out) == (0, True)
    from unroll.core import cells

    monkeypatch.setitem(cells.CELLS, "RNN_TANH", cells.CELLS["RNN_RELU"])
    Path("n.onnx").unlink()
    code, _, err = run("onnx", "m.onnx", "n.onnx", "--check")
    assert (code, "differs by" in err, Path("n.onnx").exists()) == (1, True, False)


def test_the_limit_of_steps(run):
    rnn_file("m.onnx")
    code, _, err = run("onnx", "m.onnx", "n.onnx", "--limit", "3")
    assert (code, "4 steps written out, more than the limit of 3" in " ".join(err.split())) == (1, True)
    code, out, _ = run("inspect", "m.onnx", "--limit", "3", "--json")
    assert (code, "limit of 3" in out) == (1, True)
    assert run("onnx", "m.onnx", "n.onnx", "--limit", "4")[0] == 0


@pytest.mark.parametrize("command", [["-m", "unroll"], ["-c", "from unroll.cli.main import main; main()"]])
def test_what_lies_beside_a_file_is_not_run(tmp_path, command):
    rnn_file(tmp_path / "m.onnx")
    for name in ("onnx_ir", "onnx", "google", "onnxruntime"):
        (tmp_path / f"{name}.py").write_text(f"print('RAN {name}')\nraise SystemExit(9)\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(unroll.__file__).parents[1])}
    if command[0] == "-c":
        environment["PYTHONSAFEPATH"] = "1"  # as a script that was installed: the folder of a -c is the current one
    for arguments in (["inspect", "m.onnx"], ["onnx", "m.onnx", "n.onnx"]):
        done = subprocess.run(
            [sys.executable, *command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, "RAN" in done.stdout + done.stderr) == (0, False), done.stderr


FILE = """
import torch
from parts_beside import SIZE

def make():
    return torch.nn.GRU(SIZE, 3).eval(), torch.zeros(4, 2, SIZE)

def fails():
    raise ValueError("no weights")
"""


def test_a_factory_may_be_in_a_file(run, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/parts_beside.py").write_text("SIZE = 2\n")
    (tmp_path / "models/json.py").write_text(FILE)  # whatever else has its name
    code, out, _ = run("inspect", "models/json.py:make")
    assert code == 0 and "2 → 3" in out and sys.modules["json"] is json
    assert run("export", tmp_path / "models/json.py:make", "out.onnx", "--no-check")[0] == 0
    code, _, err = run("inspect", "models/json.py:fails")
    assert code == 1 and f"(ValueError: no weights, in {tmp_path}/models/json.py:9)" in err and "Traceback" not in err
    code, _, err = run("inspect", "models/json.py:fails", "--debug")
    assert code == 1 and "Traceback" in err and "return function()" in err
    code, _, err = run("inspect", "models/nothing.py:make")
    assert code == 1 and "there is no file models/nothing.py" in err


def dims(path):
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(path).graph.input]


def make_with_state():
    return nn.GRU(6, 5).eval(), (torch.zeros(4, 3, 6), torch.zeros(1, 3, 5))


def test_open_sizes_and_names(run):
    code, _, err = run("export", f"{__name__}:make_pair", "out.onnx", "--dynamic", ",batch", "--no-check")
    assert code == 0 and dims("out.onnx") == [[4, "batch", 6]], err
    names = ("--dynamic", "time,batch", "--dynamic", ",batch", "--input-names", "x, h", "--output-names", "y,h_n")
    code, _, err = run("export", f"{__name__}:make_with_state", "out.onnx", *names)
    assert code == 0 and dims("out.onnx") == [["time", "batch", 6], [1, "batch", 5]], err
    graph = onnx.load("out.onnx").graph
    assert [v.name for v in (*graph.input, *graph.output)] == ["x", "h", "y", "h_n"]
    (layer,) = json.loads(run("inspect", f"{__name__}:make_with_state", "--dynamic", "time", "--json")[1])["layers"]
    assert layer["steps"] is None
    for names, words in {
        ("a,b,c,d",): "names 4 sizes of a tensor with 3",
        ("a", "b", "c"): "was given 3 times for 2 tensors",
    }.items():
        asked = [part for name in names for part in ("--dynamic", name)]
        code, _, err = run("export", f"{__name__}:make_with_state", "no.onnx", *asked)
        assert code == 1 and words in err
    code, _, err = run("export", f"{__name__}:make_dynamic", "no.onnx", "--dynamic", "time")
    assert code == 1 and "gives dynamic_shapes, and so does the command line" in err


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(6, 5)

    def forward(self, x):
        return self.rnn(x)[0] if x.sum() < 1e6 else x


def make_reading():
    return Reads().eval(), CASE.tensors()[0]


def test_as_much_is_told_as_asked(run, source):
    code, out, err = run("onnx", source, "out.onnx")
    assert code == 0 and err == ""
    code, again, err = run("onnx", source, "out.onnx", "-v")
    assert (code, again) == (0, out) and [line.split()[2] for line in err.splitlines()] == [
        "read",
        "unroll",
        "save",
        "check",
    ]
    traced = ("export", f"{__name__}:make_reading", "out.onnx", "--capture", "trace")
    assert run(*traced, "--quiet")[::2] == (0, "")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = run(*traced)
    assert code == 0 and err.startswith("warning: Reads: ")


@pytest.mark.parametrize("command", ["onnx", "export", "inspect", "bench"])
def test_help_does_not_wait_for_torch(command):
    code = f"import sys; sys.argv[1:] = ['{command}', '--help']\nfrom unroll.cli.main import main\n"
    code += "try:\n    main()\nexcept SystemExit as done:\n    print(done.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert f"Example: unroll {command} " in done.stdout


def test_a_factory_of_the_current_folder_comes_last(run, tmp_path):
    (tmp_path / "mine_of_here.py").write_text("import torch\ndef make():\n    return torch.nn.GRU(2, 3).eval()\n")
    (tmp_path / "json.py").write_text("raise SystemExit(9)\n")
    assert run("inspect", "mine_of_here:make")[0] == 0
    assert sys.path[-1] == str(tmp_path)
