"""The shape of the library: imports run one way, and each thing is known in one place."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import unroll

ROOT = Path(unroll.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What the recipe is made of, from the bottom up. Everything else is a frontend, and none of these may import one.
ORDER = ["core.cells", "core.recurrence", "core.plan", "core.scan", "core.passes", "core.schedule"]


def name_of(file):
    """Such as `schedule` or `onnx.values`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(file, *, at_import_only=False):
    """Full names of all modules a file imports, and of what it takes from them."""
    tree = ast.parse(file.read_text())
    nodes = tree.body if at_import_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def own_imports(file):
    """Names of the library's modules that a file imports when it is imported."""
    known = {name_of(f) for f in FILES}
    names = {name.removeprefix("unroll.") for name in imports(file, at_import_only=True) if name.startswith("unroll.")}
    return names & known


def test_imports_run_one_way():
    for file in FILES:
        name = name_of(file)
        if name in ORDER:
            below = set(ORDER[: ORDER.index(name)])
            assert own_imports(file) <= below, f"{name} imports {own_imports(file) - below}"


def test_imports_have_no_cycle():
    graph = {name_of(file): own_imports(file) for file in FILES if name_of(file)}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys() - {name}]
        assert free, f"a cycle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_importing_needs_torch_alone():
    """In a fresh interpreter, using the library imports none of what is optional."""
    code = """
import sys, torch, unroll
print(unroll.unroll(torch.nn.GRU(3, 5)))
optional = {"onnx", "onnx_ir", "onnxruntime", "onnxscript", "rich", "typer", "matplotlib", "sklearn"}
print(sorted(optional & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert (done.returncode, done.stdout) == (0, "UnrolledLayer(3, 5)\n[]\n"), done.stderr


def test_the_package_is_a_table_of_contents():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert all(isinstance(node, (ast.ImportFrom, ast.Assign, ast.Expr)) for node in tree.body)
    taken = [
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(taken) == sorted(unroll.__all__)
    assert unroll.__all__ == sorted(unroll.__all__)
    assert not any(name.startswith("_") for name in unroll.__all__)


@pytest.mark.parametrize("name", unroll.__all__)
def test_public_names_are_documented(name):
    thing = getattr(unroll, name)
    assert thing.__module__.startswith("unroll.")
    doc = inspect.getdoc(thing)
    assert doc and doc.split("\n\n")[0].strip().endswith(".")
    if inspect.isfunction(thing):
        assert ">>>" in doc, f"{name} has no example"
        documented = set(doc.split("Args:")[1].split()) if "Args:" in doc else set()
        assert {f"{p}:" for p in inspect.signature(thing).parameters} <= documented, f"{name} leaves arguments unsaid"


GATES = {"sigmoid", "tanh", "addmm", "relu"}
OTHER_RECIPES = {"cells.py"}


def test_only_the_cells_know_a_gate():
    """No other file calls what gates are made of, from torch or by a graph's operators."""
    for file in FILES:
        if file.name in OTHER_RECIPES or "onnx" in file.parts or "targets" in file.parts or file.name == "aten.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in GATES, f"{file.name}, line {node.lineno}, calls {node.func.attr}"


def test_only_the_reader_knows_the_order_of_parameters():
    names = ("weight_ih_l", "bias_hh_l", "weight_hr_l")
    for file in FILES:
        if file.name != "recurrence.py":
            strings = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
            code = [s for s in strings if isinstance(s, str) and s.startswith(names)]
            assert not code, f"{file.name} spells {code}"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short_and_introduce_themselves(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 420
    assert file.stem not in ("utils", "helpers", "common", "misc")
    assert ast.get_docstring(ast.parse(text)), f"{file.name} says nothing of itself"


def test_every_module_can_be_imported():
    for file in FILES:
        if "onnx" not in file.parts and name_of(file):
            importlib.import_module(f"unroll.{name_of(file)}")
