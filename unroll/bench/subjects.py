"""The subjects of measurements: a layer given by its options, or a model of the user's own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from unroll.bench.options import DTYPES, LAYER, SWEPT
from unroll.core.errors import Problem, Problems, UnrollError
from unroll.export.factories import load_factory


@dataclass(frozen=True)
class Subject:
    """A layer or a model, and the conditions of a measurement: plain data, for files and other processes.

    `model` is `LSTM`, `GRU` or `RNN`, or `package.module:name` of a function that returns the user's own model, for
    which all that describes a layer is None.
    """

    model: str
    input_size: int | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    bidirectional: bool | None = None
    bias: bool | None = None
    proj_size: int | None = None
    nonlinearity: str | None = None
    steps: int | None = None
    batch: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    threads: int = 1
    backward: bool = False

    def __str__(self) -> str:
        """Return a line such as `LSTM 64 → 128, T=32, B=1, float32, cpu, 1 thread`."""
        parts = [self.model]
        if self.is_layer:
            layers = "" if self.num_layers == 1 else f" x {self.num_layers}"
            parts[0] += f" {self.input_size} → {self.hidden_size or 'H'}{layers}"
            parts += ["bidirectional"] * bool(self.bidirectional) + ["no bias"] * (not self.bias)
            parts += [f"projected to {self.proj_size}"] if self.proj_size else []
            parts += [self.nonlinearity] if self.nonlinearity not in (None, "tanh") else []
            parts += [f"{letter}={size}" for letter, size in (("T", self.steps), ("B", self.batch)) if size]
            parts += [str(self.dtype)]
        parts += [self.device]
        if self.device == "cpu":
            parts += [f"{self.threads} thread" + "s" * (self.threads > 1)]
        return ", ".join(parts + ["forward and backward"] * self.backward)

    @property
    def is_layer(self) -> bool:
        return ":" not in self.model


def subjects(model: str, *, device: str, threads: int, backward: bool, **layer: Any) -> list[Subject]:
    """Return the subjects that arguments of `benchmark` ask for: one for each combination of what is swept.

    Raises:
        UnrollError: for unknown options, and for values that no layer takes.

    Example:
        >>> [str(s) for s in subjects("gru", device="cpu", threads=1, backward=False, steps=[8, 32], batch=2)]
        ['GRU 64 → 128, T=8, B=2, float32, cpu, 1 thread', 'GRU 64 → 128, T=32, B=2, float32, cpu, 1 thread']
    """
    if not isinstance(model, str):
        fix = "give package.module:name of a function that returns it: each form has a process of its own"
        raise UnrollError(Problem("model=...", f"is a {type(model).__name__}", fix))
    problems = Problems()
    kind = "cpu"
    try:
        kind = torch.device(device if isinstance(device, str) else repr(device)).type
    except RuntimeError:
        problems.add(f"device={device!r}", "is no device", "give cpu or cuda")
    if kind not in ("cpu", "cuda"):
        problems.add(f"device={device!r}", "is not measured here", "give cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        problems.add(f"device={device!r}", "is not on this machine", "give device='cpu'")
    if type(threads) is not int or threads < 1:
        problems.add(f"threads={threads!r}", "is no number of threads", "give a whole number from 1 upwards")
    if type(backward) is not bool:
        problems.add(f"backward={backward!r}", f"is a {type(backward).__name__}", "give True or False")
    given = {name: value for name, value in layer.items() if value is not None}
    if ":" in model:
        problems += [
            Problem(f"{name}={value!r}", f"was given for {model}, which has its own", f"leave {name} out")
            for name, value in given.items()
        ]
    else:
        problems += list(_problems(model.upper(), given))
    problems.check()
    conditions: dict[str, Any] = {"device": device, "threads": threads, "backward": backward}
    if ":" in model:
        return [Subject(model, **conditions)]
    chosen = LAYER | given
    # The values of each swept option, each once and in the order given: the last option runs fastest.
    values = [dict.fromkeys(v) if isinstance(v := chosen[name], Sequence) else [v] for name in SWEPT]
    return [
        Subject(model.upper(), **chosen | dict(zip(SWEPT, combination, strict=True)), **conditions)
        for combination in itertools.product(*values)
    ]


def _problems(kind: str, given: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield what is wrong with the options of a layer, apart from what its own constructor says."""
    if kind not in ("LSTM", "GRU", "RNN"):
        fix = "give lstm, gru or rnn, or package.module:name of a function that returns a model"
        yield Problem(f"model={kind!r}", "is no recurrent layer", fix)
    for name in given.keys() - LAYER.keys():
        yield Problem(f"{name}=...", "is not an option here", f"the options are {', '.join(LAYER)}")
    for name, standard in LAYER.items():
        value = given.get(name, standard)
        if name not in (*SWEPT, "dtype") and type(value) is not type(standard):
            fix = f"give one {type(standard).__name__}; {', '.join(SWEPT[:-1])} and {SWEPT[-1]} may be several"
            yield Problem(f"{name}={value!r}", f"is a {type(value).__name__}", fix)
    for name in SWEPT:
        value = given.get(name, 1)
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not values or not all(type(size) is int and size > 0 for size in values):
            yield Problem(f"{name}={value!r}", "is no size", "give a whole number from 1 upwards, or several")
    if given.get("dtype", "float32") not in DTYPES:
        yield Problem(f"dtype={given['dtype']!r}", "is not measured here", f"give {', '.join(DTYPES)}")


@dataclass(frozen=True)
class Task:
    """A subject as it runs: the model in its mode, and its arguments.

    Inference is a call without gradients; with `subject.backward` a task is a call in training mode and the gradients
    of all parameters, and of a layer's input, for one random direction of all outputs.
    """

    subject: Subject
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @staticmethod
    def of(subject: Subject) -> Task:
        """Make the task on the CPU, its numbers drawn from a fixed seed.

        Raises:
            UnrollError: if the layer cannot be made, or the function that makes the model cannot be used.
        """
        torch.manual_seed(0)
        if subject.is_layer:
            model, args, kwargs = _layer(subject), (_input(subject),), {}
        else:
            model, args, kwargs = _own(subject.model)
        return Task(subject, model.train(subject.backward), args, kwargs)

    def save(self, path: str) -> None:
        """Write parameters, buffers and arguments to a file."""
        torch.save({"state": self.model.state_dict(), "args": self.args, "kwargs": self.kwargs}, path)

    @staticmethod
    def load(subject: Subject, path: str) -> Task:
        """Return the task with the numbers of a file, on the subject's device."""
        task, saved = Task.of(subject), torch.load(path, weights_only=False)
        task.model.load_state_dict(saved["state"])
        return Task(subject, task.model, saved["args"], saved["kwargs"])._moved(subject.device)

    def double(self) -> Task:
        """Return the same in float64."""
        # with a copy of the model, as `_moved` changes it in place
        return Task(self.subject, copy.deepcopy(self.model), self.args, self.kwargs)._moved(torch.float64)

    def runner(self, function: Callable[..., Any]) -> Callable[[], list[Tensor]]:
        """Return a call of `function` in place of the model: its tensors, and the gradients in training."""
        if not self.subject.backward:
            return lambda: tensors(function(*self.args, **self.kwargs))
        leaves = [*tensors((self.args, self.kwargs)), *self.model.parameters()]
        wanted = [tensor for tensor in leaves if tensor.requires_grad and tensor.is_leaf]
        directions: list[Tensor] = []

        def run() -> list[Tensor]:
            for tensor in wanted:
                tensor.grad = None
            results = tensors(function(*self.args, **self.kwargs))
            found = [result for result in results if result.requires_grad]
            if not found:
                fix = "give a model with parameters, or an argument, that require gradients, or leave backward out"
                raise UnrollError(Problem(self.subject.model, "has no result to differentiate", fix))
            # drawn once, in float64 and from a fixed seed: the same numbers for every form, device and dtype
            if not directions:
                generator = torch.Generator().manual_seed(0)
                directions.extend(torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in found)
            torch.autograd.backward(found, directions)
            return results + [torch.zeros_like(t) if t.grad is None else t.grad for t in wanted]

        return run

    def _moved(self, target: Any) -> Task:
        """Return the task with model and floating numbers of this dtype, or all on this device."""
        self.model.to(target)

        def moved(value: Any) -> Any:
            if isinstance(value, PackedSequence):
                return value.to(target)._replace(data=moved(value.data))  # gradients are asked of data itself
            if not isinstance(value, Tensor) or (isinstance(target, torch.dtype) and not value.is_floating_point()):
                return value
            return value.detach().to(target).requires_grad_(value.requires_grad)

        args, kwargs = pytree.tree_map(
            moved, (tuple(self.args), dict(self.kwargs)), is_leaf=lambda value: isinstance(value, PackedSequence)
        )
        return Task(self.subject, self.model, args, kwargs)


def tensors(tree: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists and dictionaries, those of packed sequences too."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _layer(subject: Subject) -> nn.Module:
    options: dict[str, Any] = {
        "num_layers": subject.num_layers,
        "bidirectional": subject.bidirectional,
        "bias": subject.bias,
        "dtype": getattr(torch, str(subject.dtype)),
    }
    options |= {"proj_size": subject.proj_size} if subject.proj_size else {}
    options |= {"nonlinearity": subject.nonlinearity} if subject.nonlinearity != "tanh" else {}
    try:
        return getattr(nn, subject.model)(subject.input_size, subject.hidden_size, **options)
    except Exception as error:
        finding = f"cannot be made ({type(error).__name__}: {error})"
        raise UnrollError(Problem(str(subject), finding, f"give options that nn.{subject.model} takes")) from error


def _input(subject: Subject) -> Tensor:
    shape = int(subject.steps or 0), int(subject.batch or 0), int(subject.input_size or 0)  # [T, B, I]
    return torch.randn(shape).to(getattr(torch, str(subject.dtype))).requires_grad_(subject.backward)


def _own(factory: str) -> tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]:
    model, args, options = load_factory(factory)
    if not isinstance(model, nn.Module):
        fix = "let it return an nn.Module: a program cannot run as PyTorch itself would run the model"
        raise UnrollError(Problem(factory, f"returns {type(model).__name__}", fix))
    if args is None:
        fix = "let it return the model and a tuple of example arguments"
        raise UnrollError(Problem(factory, "returns a model alone", fix))
    if others := [name for name in options if name != "kwargs"]:
        fix = "the benchmark takes kwargs alone, and runs at the sizes of the example: leave the rest out"
        raise UnrollError(Problem(factory, f"returns the options {', '.join(others)}", fix))
    return model, tuple(args) if isinstance(args, (tuple, list)) else (args,), options.get("kwargs") or {}
