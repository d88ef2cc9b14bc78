"""ONNX files: written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from unroll.core.errors import Problem, UnrollError, refusing
from unroll.core.patching import without_gc
from unroll.core.version import VERSION

LARGEST = 1_800_000_000
"""Bytes of weights above which they go into a file of their own: no protocol buffer may pass 2 GB."""


def save(model: ir.Model, path: str | os.PathLike[str], *, largest: int = LARGEST) -> None:
    """Write a model to a file; weights of more than `largest` bytes go beside it, to the same name and `.data`."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    if sum(tensor.nbytes for tensor in tensors if tensor) > largest:
        ir.save(model, path, external_data=f"{os.path.basename(path)}.data")
        return
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):  # from a file that lies elsewhere
        with refusing(os.fspath(path), "its weights cannot be read", "give the model with its data whole"):
            model = ir.external_data.load_to_model(model)
    with without_gc():
        ir.save(model, path)


def check_path(path: str | os.PathLike[str]) -> Path:
    """Return the path, if a file can be written there.

    Raises:
        UnrollError: if its directory does not exist, or it is one.
    """
    if not isinstance(path, (str, os.PathLike)):
        fix = "give the arguments before the path: export_onnx(model, args, path)"
        raise UnrollError(Problem("path", f"is a {type(path).__name__}", fix))
    given, path = os.fspath(path), Path(path)
    if not given or path.is_dir():
        raise UnrollError(Problem(repr(given), "is no name of a file", "give the path of the file to write"))
    if not path.parent.is_dir():
        raise UnrollError(Problem(str(path), "is in a directory that does not exist", "make it first"))
    return path


@contextmanager
def write_then_move(model: ir.Model, path: Path, *, largest: int = LARGEST) -> Iterator[Path]:
    """Write a model to a draft, and move it to `path` when the block that checks it has ended without an error."""
    with ExitStack() as stack:
        with _writing(path):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")))
            draft = folder / path.name
            save(model, draft, largest=largest)
        yield draft
        with _writing(path):
            # The model last: without its weights it is not valid.
            for file in sorted(folder.iterdir(), key=lambda file: file == draft):
                os.replace(file, path.parent / file.name)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a refusal of the system, while this lasts, into an error that names the file."""
    try:
        yield
    except OSError as error:
        finding = f"cannot be written ({error.strerror or error})"
        raise UnrollError(Problem(str(path), finding, "choose a place where you may write")) from error


def size(path: Path) -> int:
    """Return the bytes of a file, with those of the weights beside it."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def sign(model: ir.Model, **facts: Any) -> None:
    """Write into a model's metadata how it was made, each fact as `unroll.name`; what is empty is left out."""
    for name, value in {"version": VERSION, **facts}.items():
        if text := "\n".join(value) if isinstance(value, list) else str(value):
            model.metadata_props[f"unroll.{name}"] = text
