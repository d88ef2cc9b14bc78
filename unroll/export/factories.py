"""Models that are named on a command line, as `package.module:name` or `path/to/file.py:name`, and their options."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from unroll.core.arguments import as_args
from unroll.core.errors import Problem, UnrollError

OPTIONS = ("kwargs", "dynamic_shapes", "input_names", "output_names", "opset_version", "where", "rules")
"""The keyword arguments of `export_onnx` that a factory may give."""


def load_factory(factory: str) -> tuple[Any, tuple[Any, ...] | None, dict[str, Any]]:
    """Return the model, its arguments if there are any, and options, that a `package.module:name` gives.

    A module may be told by the path of its file, whose folder is then searched for what it imports.

    Raises:
        UnrollError: if there is no such thing, it fails, or gives something else.
    """
    value = _named(factory)
    made = value if isinstance(value, (nn.Module, ExportedProgram)) else _called(factory, value)
    given: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(given) <= 3:
        finding = f"returns {len(given)} things"
        raise UnrollError(Problem(factory, finding, "let it return the model, its arguments and options"))
    model, args = given[0], given[1] if len(given) > 1 else None
    options = given[2] if len(given) > 2 else {}
    if not isinstance(model, (nn.Module, ExportedProgram)):
        finding = f"returns {type(model).__name__}"
        raise UnrollError(Problem(factory, finding, "let it return an nn.Module or an ExportedProgram"))
    if not isinstance(options, dict):
        finding = f"returns a {type(options).__name__} for options"
        raise UnrollError(Problem(factory, finding, "let it return a dictionary"))
    if unknown := [str(key) for key in options if key not in OPTIONS]:
        finding = f"returns the options {', '.join(unknown)}"
        raise UnrollError(
            Problem(factory, finding, f"it may give {', '.join(OPTIONS)}; the rest is for the command line")
        )
    return model, args, options


def _named(factory: str) -> Any:
    """Return what a name stands for in its module."""
    module, colon, name = factory.rpartition(":")
    fix = "give package.module:name, or path/to/file.py:name"
    if not (module and colon and name):
        raise UnrollError(Problem(factory, "is not the name of a function in a module", fix))
    file = Path(module)
    if is_file := file.suffix == ".py":
        if not file.is_file():
            raise UnrollError(Problem(factory, f"cannot be found (there is no file {module})", fix))
        module = file.stem
        if (folder := str(file.parent.resolve())) not in sys.path:
            sys.path.append(folder)
    try:
        value: Any = _imported(file, module) if is_file else importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise UnrollError(Problem(factory, f"cannot be found ({error})", fix)) from error
    except Exception as error:
        finding = f"cannot be imported ({_told(error)})"
        raise UnrollError(Problem(factory, finding, f"make import {module} work first")) from error
    return value


def _imported(file: Path, name: str) -> Any:
    """Import a file, whatever else is found under its name; once, so that its classes are the same each time."""
    held = sys.modules.get(name)
    if held is not None and getattr(held, "__file__", None) == str(file.resolve()):
        return held
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None  # it ends with .py
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        if before is not None:
            sys.modules[name] = before
    return module


def _told(error: Exception) -> str:
    """Return an error with the file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return f"{type(error).__name__}: {error}" + "".join(f", in {frame.filename}:{frame.lineno}" for frame in last)


def _called(factory: str, function: Any) -> Any:
    """Call the function and return its result."""
    fix = "give a function that returns the model"
    if not callable(function):
        raise UnrollError(Problem(factory, f"is a {type(function).__name__}", fix))
    open_kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    try:
        parameters = signature(function).parameters.values()
        if needed := [p.name for p in parameters if p.default is Parameter.empty and p.kind not in open_kinds]:
            raise UnrollError(Problem(factory, f"needs {', '.join(needed)}", "give a function without arguments"))
        return function()
    except UnrollError:
        raise
    except Exception as error:
        raise UnrollError(Problem(factory, f"fails ({_told(error)})", fix)) from error


def load_example(factory: str) -> tuple[Any, tuple[Any, ...] | None, dict[str, Any]]:
    """Return what `load_factory` does, with arguments unless it is a program, which has its own.

    Raises:
        UnrollError: for a model without arguments, and as `load_factory`.
    """
    model, args, options = load_factory(factory)
    if args is None and not isinstance(model, ExportedProgram):
        raise UnrollError(without_example(factory))
    return model, args, options


def without_example(factory: str) -> Problem:
    return Problem(factory, "returns a model alone", "let it return the model and a tuple of example arguments")


def asked_options(
    factory: str, args: Any, given: dict[str, Any], dynamic: Sequence[str] | None = None, **asked: Any
) -> dict[str, Any]:
    """Return the options of the factory and of the command line, of which neither may overrule the other.

    Args:
        factory: as it was named.
        args: the arguments that it gives.
        given: the options that it gives.
        dynamic: for each tensor among the arguments, the names of its open sizes, such as `batch,time` or `,batch`.
        asked: other options of the command line, those that are None not counted.

    Raises:
        UnrollError: for options that both give, and names that are for no tensor or no size.
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    if dynamic:
        asked["dynamic_shapes"] = _open_sizes(factory, args, given, dynamic)
    if both := ", ".join(asked.keys() & given.keys()):
        raise UnrollError(Problem(factory, f"gives {both}, and so does the command line", "give it once"))
    return {**given, **asked}


def _open_sizes(factory: str, args: Any, given: dict[str, Any], dynamic: Sequence[str]) -> Any:
    """Return the `dynamic_shapes` of the arguments."""
    place = f"--dynamic {' --dynamic '.join(dynamic)}"
    if args is None or given.get("kwargs"):
        finding = "was given for a model without arguments" if args is None else "was given beside keyword arguments"
        raise UnrollError(Problem(place, finding, f"let {factory} give dynamic_shapes"))
    leaves, structure = pytree.tree_flatten(as_args(args))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(dynamic) > len(tensors):
        finding = f"was given {len(dynamic)} times for {len(tensors)} tensors"
        raise UnrollError(Problem(place, finding, "give it once for each tensor among the arguments, in their order"))
    named = iter(dynamic)
    shapes = [_axes(next(named, ""), leaf) if isinstance(leaf, Tensor) else None for leaf in leaves]
    return pytree.tree_unflatten(shapes, structure)


def _axes(names: str, tensor: Tensor) -> dict[int, str] | None:
    """Return the names of a tensor's open sizes by their places."""
    words = [word.strip() for word in names.split(",")]
    if len(words) > tensor.dim() and names:
        finding = f"names {len(words)} sizes of a tensor with {tensor.dim()}"
        raise UnrollError(Problem(f"--dynamic {names}", finding, "give a name, or nothing between commas, for each"))
    return {axis: word for axis, word in enumerate(words) if word} or None
