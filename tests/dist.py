"""Wheel and sdist, each installed into a fresh environment and used there, away from the checkout.

    python tests/dist.py

`make test-dist` calls it, with a Python that has the package `build`. In each environment it runs a small program, the
command line, and the first program of the README, which is to print what stands there, rounding apart.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import importlib.metadata, pathlib, sys
import torch, unroll
from torch import nn

assert pathlib.Path(unroll.__file__).is_relative_to(sys.prefix), unroll.__file__
assert importlib.metadata.version("torch-unroll") == unroll.__version__
model, x = nn.GRU(3, 5, num_layers=2, bidirectional=True), torch.randn(4, 2, 3)
unroll.compare(model, unroll.unroll(model), x, gradients=True).check()
exported = unroll.export_onnx(nn.Sequential(nn.LSTM(3, 5)).eval(), x, "small.onnx")
assert exported.report.ok and not exported.operators["LSTM"]
unroll.check("small.onnx", target="tensorrt").check()
print(unroll.__version__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command[:4]))} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def build(folder: Path) -> list[Path]:
    """Build the sdist, and of it the wheel; return both."""
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    sdist, wheel = next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    outside = [name for name in names if not re.match(r"unroll/|torch_unroll-[^/]*\.dist-info/", name)]
    assert not outside, f"the wheel holds {outside}"
    for needed in ("unroll/py.typed", "unroll/targets/facts/tensorrt.toml"):
        assert needed in names, f"the wheel lacks {needed}"
    return [wheel, sdist]


def first_program() -> tuple[str, str]:
    """The README's first block of Python, and what it prints."""
    found = re.search(r"```python\n(.*?)```\s*```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, "the README begins with no program"
    return found[1], found[2]


def use(file: Path, folder: Path) -> None:
    """Install a file into a fresh environment, and use it."""
    venv.create(folder / "env", with_pip=True)
    python, work = folder / "env/bin/python", folder / "work"
    work.mkdir()
    wanted = f"torch-unroll[cli] @ {file.as_uri()}"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wanted, cwd=work)
    version = run(python, "-I", "-c", PROGRAM, cwd=work).strip()
    assert version in run(folder / "env/bin/unroll", "--version", cwd=work)
    assert run(folder / "env/bin/unroll", "inspect", "small.onnx", cwd=work) == "no recurrent layers\n"
    code, expected = first_program()
    rounded = [re.sub(r"\d\.\de[-+]\d\d", "#", text) for text in (run(python, "-I", "-c", code, cwd=work), expected)]
    assert rounded[0] == rounded[1], f"the README's first program printed:\n{rounded[0]}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "built"
        built.mkdir()
        for file in build(built):
            began = time.monotonic()
            with tempfile.TemporaryDirectory() as place:
                use(file, Path(place))
            print(f"{file.name}: installed and used in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
