"""Every notebook runs from top to bottom; each holds its results against what they are to be."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
NOTEBOOKS = sorted((HERE / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["onnx_files", "streaming", "tagger"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_results(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.heavy
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel", reason="needs ipykernel: make test-heavy")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: make test-heavy")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat: make test-heavy")

    # Beside the examples, as in a checkout, and with `unroll` among the commands.
    (tmp_path / "examples").symlink_to(HERE / "examples")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "notebooks")}}
    ).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", ()))
    assert "Error" not in printed and "Traceback" not in printed and "not found" not in printed
