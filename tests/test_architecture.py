"""The shape of the library: imports go down, each thing is known in one place, and one place changes torch."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import unroll

ROOT = Path(unroll.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A file imports from its own folder, and from what stands left of it.
LAYOUT = (
    "core|extras reports roundings packed torchscript onnx|comparison modules targets|graphs|streams unrolling|export"
    "|bench drawing|api cli"
)
FLOORS = [part.split() for part in LAYOUT.split("|")]

# Who may ask `core.patching` to change torch.
PATCHING = {
    ("core.patching", "patched"): {
        "core.alone",
        "packed.contexts",
        "packed.guard",
        "graphs.tracing",
        "export.translate",
    },
    ("core.alone", "alone"): {
        "packed.contexts",
        "export.tracing",
        "packed.guard",
        "graphs.tracing",
        "graphs.dynamo",
        "export.capture",
        "export.translate",
    },
}


def name_of(file):
    """Such as `core.schedule`; empty for the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


NAMES = {name_of(file) for file in FILES}


def imported(file):
    """What a file imports at any depth, also in functions and for type checks: pairs of a module and a name in it."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def own_imports(file):
    """The library's modules that a file imports."""
    found = set()
    for module, name in imported(file):
        if module.partition(".")[0] == "unroll":
            whole = ".".join(filter(None, (*module.split(".")[1:], name)))
            found.add(whole if whole in NAMES else module.removeprefix("unroll").lstrip("."))
    return found


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for file in FILES:
        here = name_of(file).partition(".")[0]
        if not here or here == "__main__":
            continue
        for there in {name.partition(".")[0] for name in own_imports(file)} - {here}:
            assert floor[there] < floor[here], f"{name_of(file)} imports from {there}"


def test_imports_have_no_circle():
    graph = {name_of(file): own_imports(file) for file in FILES if name_of(file)}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys() - {name}]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_a_name_is_imported_from_the_file_that_defines_it():
    for file in FILES:
        for module, name in imported(file):
            source = module.removeprefix("unroll").lstrip(".")
            if module.partition(".")[0] != "unroll" or source not in NAMES or f"{source}.{name}".lstrip(".") in NAMES:
                continue
            assert not name.startswith("_"), f"{name_of(file)} imports the private {module}.{name}"
            if source != "api" and source:  # the package hands on what that takes
                home = ROOT.joinpath(*source.split("."))
                home = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
                assert name in defined(home), f"{name_of(file)} imports {name} from {module}, which only imports it"


def defined(file):
    """Names that are defined at the top of a file."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return found


def test_no_module_is_called_as_a_public_function():
    functions = {name for name in unroll.__all__ if inspect.isfunction(getattr(unroll, name))}
    assert {name.rpartition(".")[2] for name in NAMES} & functions == set()


@pytest.mark.parametrize("context", PATCHING, ids=".".join)
def test_few_files_may_change_torch(context):
    """That nobody else does is seen by what happens, in `core/test_patching.py`."""
    module, name = context
    users = {name_of(file) for file in FILES if (f"unroll.{module}", name) in imported(file)}
    assert users == PATCHING[context]


FOLDERS = sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists())


def test_every_folder_has_a_floor_and_a_line_in_contributing():
    assert {*FOLDERS, "extras", "reports", "roundings", "comparison", "unrolling", "api"} == {
        name for names in FLOORS for name in names
    }
    text = (ROOT.parent / "CONTRIBUTING.md").read_text()
    assert [name for name in FOLDERS if f"| `{name}/` |" not in text] == []
    assert " < ".join(map(" ".join, FLOORS)) in text.replace("`", "").replace(",", "")


@pytest.mark.parametrize("folder", ["graphs", "torchscript", "onnx"])
def test_every_kind_of_graph_has_the_same_rooms(folder):
    assert {f"{folder}.{room}" for room in ("calls", "writer", "lowering", "rewrite")} <= NAMES


def test_importing_needs_torch_alone():
    """In a fresh interpreter, using the library imports none of what is optional, nor Dynamo, which takes a second."""
    code = """
import sys, torch, unroll
print(unroll.unroll(torch.nn.GRU(3, 5)))
optional = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "typer", "matplotlib", "sklearn", "torch._dynamo"}
print(sorted(optional & sys.modules.keys()))
print(dir(unroll) == unroll.__all__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert (done.returncode, done.stdout) == (0, "GRU(3, 5, unrolled)\n[]\nTrue\n"), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nope"], []], ids=str)
def test_telling_of_itself_needs_no_torch(arguments):
    pytest.importorskip("typer")
    code = f"""
import sys, unroll
from unroll.cli.main import main
try:
    main({arguments})
finally:
    print(unroll.__version__, *{{"torch", "numpy"}} & sys.modules.keys())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.splitlines()[-1] == unroll.__version__, done.stderr


def test_names_that_the_package_does_not_have():
    with pytest.raises(AttributeError, match="has no attribute 'require'"):
        _ = unroll.require
    assert unroll.__version__ == unroll.core.version.VERSION
    names = {}
    exec("from unroll import *", names)
    assert names.keys() - {"__builtins__"} == set(unroll.__all__)


def test_the_package_is_a_table_of_contents():
    tree = ast.parse((ROOT / "api.py").read_text())
    taken = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(taken) == sorted(unroll.__all__)
    assert unroll.__all__ == sorted(unroll.__all__)
    assert not any(name.startswith("_") for name in unroll.__all__)


@pytest.mark.parametrize("name", unroll.__all__)
def test_public_names_are_documented(name):
    thing = getattr(unroll, name)
    assert thing.__module__.partition(".")[0] == "unroll"
    doc = inspect.getdoc(thing)
    assert doc and doc.split("\n\n")[0].strip().endswith(".")
    if inspect.isfunction(thing):
        assert ">>>" in doc, f"{name} has no example"
        documented = set(doc.split("Args:")[1].split()) if "Args:" in doc else set()
        assert {f"{p}:" for p in inspect.signature(thing).parameters} <= documented, f"{name} leaves arguments unsaid"


def test_every_public_name_is_in_the_reference():
    text = (ROOT.parent / "docs/reference.md").read_text()
    assert sorted(re.findall(r"^::: unroll\.api\.(\w+)$", text, re.MULTILINE)) == sorted(unroll.__all__)


GATES = {"sigmoid", "tanh", "addmm", "relu"}
DIALECTS = ("core.cells", "core.weights", "graphs.aten", "onnx.", "targets.")


def test_only_the_cells_know_a_gate():
    """No other file calls what gates are made of, from torch or by a graph's operators."""
    for file in FILES:
        if name_of(file).startswith(DIALECTS):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in GATES, f"{name_of(file)}, line {node.lineno}, calls {node.func.attr}"


def test_only_the_reader_knows_the_order_of_parameters():
    names = ("weight_ih_l", "bias_hh_l", "weight_hr_l")
    for file in FILES:
        if name_of(file) != "core.recurrence":
            strings = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
            code = [s for s in strings if isinstance(s, str) and s.startswith(names)]
            assert not code, f"{name_of(file)} spells {code}"


def code_lines(node, source):
    """Lines of a definition that hold code: no docstrings, comments or empty lines."""
    strings = {
        line
        for part in ast.walk(node)
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant) and isinstance(part.value.value, str)
        for line in range(part.lineno, part.end_lineno + 1)
    }
    lines = [n for n in range(node.lineno, node.end_lineno + 1) if n not in strings]
    return len([n for n in lines if source[n - 1].strip() and not source[n - 1].strip().startswith("#")])


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short_and_introduce_themselves(file):
    text = file.read_text()
    lines, tree = text.splitlines(), ast.parse(text)
    assert len(lines) <= 350
    assert file.stem not in ("utils", "util", "helpers", "common", "misc")
    assert ast.get_docstring(tree), f"{name_of(file)} says nothing of itself"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert code_lines(node, lines) <= 200, f"the class {node.name} is long"
        elif isinstance(node, ast.FunctionDef):
            assert code_lines(node, lines) <= 60, f"the function {node.name} is long"


RIDDLES = ("What ", "Whether ", "Why ", "How ", "Which ", "Where ")


def test_docstrings_state_or_tell_to_do():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                doc = ast.get_docstring(node) or ""
                assert not doc.startswith(RIDDLES), f"{name_of(file)}: {node.name}: {doc[:50]}"


def test_every_module_can_be_imported():
    for file in FILES:
        if name_of(file) and name_of(file) != "__main__":
            importlib.import_module(f"unroll.{name_of(file)}")
