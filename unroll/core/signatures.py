"""Tells in words what a public function takes, where it is given something else."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from unroll.core.errors import Problem, UnrollError

P = ParamSpec("P")
T = TypeVar("T")


def told(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, which then raises an `UnrollError` for arguments that do not fit its signature.

    Example:
        >>> @told
        ... def export(model, *, dynamic_shapes=None): ...
        >>> export(1, dynamic_axes={})
        Traceback (most recent call last):
        unroll.UnrollError: export(dynamic_axes=...): is no argument; did you mean dynamic_shapes?
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UnrollError(_problem(function.__name__, list(signature.parameters), kwargs, error)) from None
        return function(*args, **kwargs)

    return call


def _problem(function: str, known: list[str], given: dict[str, Any], error: TypeError) -> Problem:
    if unknown := [name for name in given if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, 1, cutoff=0.65)
        fix = f"did you mean {close[0]}?" if close else f"the arguments are {', '.join(known)}"
        return Problem(f"{function}({unknown[0]}=...)", "is no argument", fix)
    return Problem(f"{function}(...)", str(error), f"the arguments are {', '.join(known)}")


def takes(function: Any, *args: Any) -> bool:
    """Tell whether a function can be called so, as far as it tells."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:  # some built-in functions do not tell
        return True
    return True


def no_model(place: str, model: Any, kinds: str) -> Problem:
    """Return the problem of something that is none of these kinds of model, with what was meant if it can be guessed.

    Example:
        >>> print(no_model("unroll(model)", nn.GRU, "an nn.Module"))
        unroll(model): got the class GRU; give a layer or model of it: GRU(...)
    """
    if isinstance(model, type):
        return Problem(place, f"got the class {model.__name__}", f"give a layer or model of it: {model.__name__}(...)")
    if isinstance(owner := getattr(model, "__self__", None), nn.Module):
        return Problem(place, f"got the method {model.__name__} of a {type(owner).__name__}", "give the module itself")
    if isinstance(model, Mapping) and any(isinstance(value, torch.Tensor) for value in model.values()):
        return Problem(place, "got a dictionary of tensors", "give the model that loads it by load_state_dict")
    return Problem(place, f"got {type(model).__name__}", f"give {kinds}")
