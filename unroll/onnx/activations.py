"""The activation functions of the ONNX standard's recurrent operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isnan, nan
from typing import NamedTuple

import torch
from torch.nn import functional

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.weights import Tensorlike


class Activation(NamedTuple):
    """A function of `x`, `alpha` and `beta`, with the standard's defaults for the two parameters.

    A parameter is None if the function takes none, and NaN if it must be given.
    """

    function: Callable[[Tensorlike, float, float], Tensorlike]
    alpha: float | None = None
    beta: float | None = None


def _single(value: float) -> float:
    """Round a value to float32, in which an attribute of a node holds it."""
    return torch.tensor(value, dtype=torch.float32).item()


ACTIVATIONS = {
    "relu": Activation(lambda x, alpha, beta: torch.relu(x)),
    "tanh": Activation(lambda x, alpha, beta: torch.tanh(x)),
    "sigmoid": Activation(lambda x, alpha, beta: torch.sigmoid(x)),
    "affine": Activation(lambda x, alpha, beta: torch.add(torch.mul(x, alpha), beta), nan, nan),
    "leakyrelu": Activation(lambda x, alpha, beta: functional.leaky_relu(x, alpha), _single(0.01)),
    "thresholdedrelu": Activation(lambda x, alpha, beta: torch.where(torch.ge(x, alpha), x, 0.0), 1.0),
    "scaledtanh": Activation(lambda x, alpha, beta: torch.mul(torch.tanh(torch.mul(x, beta)), alpha), nan, nan),
    "hardsigmoid": Activation(
        lambda x, alpha, beta: torch.clamp(torch.add(torch.mul(x, alpha), beta), 0.0, 1.0), _single(0.2), 0.5
    ),
    "elu": Activation(lambda x, alpha, beta: functional.elu(x, alpha), 1.0),
    "softsign": Activation(lambda x, alpha, beta: functional.softsign(x)),
    "softplus": Activation(lambda x, alpha, beta: functional.softplus(x)),
}
"""The functions by the standard's names, in lower case: their case does not matter."""


def read_activations(
    place: str, names: Sequence[str], alphas: Sequence[float], betas: Sequence[float]
) -> list[Callable[[Tensorlike], Tensorlike]]:
    """Return the functions that a node's attributes name.

    Functions that take an alpha take the next of `alphas`, or their default when none is left; betas likewise.

    Raises:
        UnrollError: for a name that is not in the standard, or more parameters than the functions take.

    Example:
        >>> [leaky] = read_activations("rnn", ["LeakyRelu"], [0.5], [])
        >>> leaky(torch.tensor([-2.0]))
        tensor([-1.])
    """
    known = ", ".join(ACTIVATIONS)
    unknown = [name for name in names if name.lower() not in ACTIVATIONS]
    if unknown:
        raise UnrollError(*(Problem(place, f"the activation {name!r} is unknown", f"use {known}") for name in unknown))
    # Taken from in the order of the names; what is left at the end, no function takes.
    given = {"alpha": iter(alphas), "beta": iter(betas)}
    functions, problems = [], Problems()
    for name in names:
        function, *defaults = ACTIVATIONS[name.lower()]
        parameters = [d if d is None else next(given[kind], d) for kind, d in zip(given, defaults)]
        problems += [
            Problem(place, f"{name} has no {kind}", f"give activation_{kind} a value for it: the standard has none")
            for kind, value in zip(given, parameters)
            if value is not None and isnan(value)
        ]
        functions.append(lambda x, f=function, parameters=parameters: f(x, *parameters))
    for kind, rest in given.items():
        if left := len(list(rest)):
            finding = f"activation_{kind} has {left} more values than {', '.join(names)} take"
            problems.add(place, finding, f"give one for each activation that takes {kind}")
    problems.check()
    return functions
