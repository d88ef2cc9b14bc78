"""Models that are named on a command line, as `package.module:name`."""

from __future__ import annotations

import importlib
from inspect import Parameter, signature
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from unroll.core.errors import Problem, UnrollError

OPTIONS = ("kwargs", "dynamic_shapes", "input_names", "output_names", "opset_version", "where", "rules")
"""The keyword arguments of `export_onnx` that a factory may give."""


def load_factory(factory: str) -> tuple[Any, tuple[Any, ...] | None, dict[str, Any]]:
    """Return the model, its arguments if there are any, and options, that a `package.module:name` gives.

    Raises:
        UnrollError: if there is no such thing, it fails, or gives something else.
    """
    module, colon, name = factory.partition(":")
    fix = "give package.module:name"
    if not (module and colon and name):
        raise UnrollError(Problem(factory, "is not the name of a function in a module", fix))
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise UnrollError(Problem(factory, f"cannot be found ({error})", fix)) from error
    except Exception as error:
        finding = f"cannot be imported ({type(error).__name__}: {error})"
        raise UnrollError(Problem(factory, finding, f"make import {module} work first")) from error
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
        raise UnrollError(Problem(factory, f"fails ({type(error).__name__}: {error})", fix)) from error


def options_of(factory: str, given: dict[str, Any], **asked: Any) -> dict[str, Any]:
    """Return the options of the factory and of the command line, of which neither may overrule the other."""
    asked = {name: value for name, value in asked.items() if value is not None}
    if both := ", ".join(asked.keys() & given.keys()):
        raise UnrollError(Problem(factory, f"gives {both}, and so does the command line", "give it once"))
    return {**given, **asked}
