"""Changes, for as long as something runs, of what all threads share: torch's attributes and random numbers, warnings,
the garbage collector.

Nothing else in this library may do so. What a thread alone must know, it keeps in a `Local`.
"""

from __future__ import annotations

import gc
import inspect
import re
import sys
import threading
import traceback as stack
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from unroll.core.errors import Problem, UnrollError

T = TypeVar("T")

ABSENT = object()
"""The value of an attribute that its owner does not have itself"""

_LOCK = threading.RLock()
"""The lock held while an attribute is exchanged, and never while waiting for anything"""

_STACKS: dict[tuple[int, str], tuple[Any, list[list[Any]]]] = {}
"""For an owner and attribute: the owner, and what its attribute was before and has been made since, the last on top"""


@contextmanager
def patched(owner: Any, **attributes: Any) -> Iterator[None]:
    """Give a module, class, function or instance other attributes while this lasts, for all threads.

    Contexts may be left in any order, also by an error and in another thread: what was made last of those that last
    still is what is found, and when all have been left, the very object that was there before.

    Args:
        owner: of the attributes.
        attributes: their values.

    Example:
        >>> class Torch:
        ...     version = 1
        >>> first, second = patched(Torch, version=2), patched(Torch, version=3)
        >>> first.__enter__(), second.__enter__(), Torch.version
        (None, None, 3)
        >>> first.__exit__(None, None, None), Torch.version
        (False, 3)
        >>> second.__exit__(None, None, None), Torch.version
        (False, 1)
    """
    with ExitStack() as leaving:
        with _LOCK:
            for name, value in attributes.items():
                leaving.callback(_leave, owner, name, _enter(owner, name, value))
                _write(owner, name, value)
        yield


def _enter(owner: Any, name: str, value: Any) -> list[Any]:
    """Put a value on the stack of an attribute, and return its layer: a list, which is itself alone."""
    # stack[0] is what was there before any context, and the last entry is what is found
    _, stack = _STACKS.setdefault((id(owner), name), (owner, [[_own(owner, name)]]))
    stack.append([value])
    return stack[-1]


def _leave(owner: Any, name: str, layer: list[Any]) -> None:
    with _LOCK:
        _, stack = _STACKS[id(owner), name]
        stack[:] = [other for other in stack if other is not layer]
        if len(stack) == 1:
            del _STACKS[id(owner), name]
        _write(owner, name, stack[-1][0])


def original(owner: Any, name: str) -> Any:
    """Return an attribute as it is without any `patched`, also where a class inherits it from one that is patched.

    Of a class it is returned as in its namespace.
    """
    with _LOCK:
        for holder in owner.__mro__ if isinstance(owner, type) else (owner,):
            _, stack = _STACKS.get((id(holder), name), (holder, [[getattr(holder, "__dict__", {}).get(name, ABSENT)]]))
            if (value := stack[0][0]) is not ABSENT:
                return value
        return getattr(owner, name)


def _own(owner: Any, name: str) -> Any:
    """Return the attribute as its owner holds it, with a `staticmethod` around it where there is one."""
    if name in vars(owner):
        return vars(owner)[name]
    slot = inspect.getattr_static(type(owner), name, None)  # such as a function's `__code__`
    return getattr(owner, name) if hasattr(slot, "__set__") else ABSENT


def _write(owner: Any, name: str, value: Any) -> None:
    if _own(owner, name) is value:
        return
    kind = type if isinstance(owner, type) else object  # past what a class of the user's makes of assignments
    if value is ABSENT:
        kind.__delattr__(owner, name)
    else:
        kind.__setattr__(owner, name, value)


class Local(Generic[T]):
    """A value that a thread, or a chain of asynchronous calls, has while a context of it lasts.

    Example:
        >>> depth = Local("depth")
        >>> with depth.set(1):
        ...     depth.value
        1
        >>> depth.value is None
        True
    """

    def __init__(self, name: str) -> None:
        self._entries: ContextVar[tuple[list[T], ...]] = ContextVar(name, default=())

    @property
    def value(self) -> T | None:
        """The value that the last of the contexts that last has set; None outside of any."""
        entries = self._entries.get()
        return entries[-1][0] if entries else None

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        """Have the value while this lasts; such contexts may be left in any order."""
        entry = [value]
        self._entries.set((*self._entries.get(), entry))
        try:
            yield
        finally:
            self._entries.set(tuple(other for other in self._entries.get() if other is not entry))


_SETTINGS: ContextVar[dict[str, list[list[Any]]]] = ContextVar("settings", default={})  # noqa: B039 (never changed in place)


@contextmanager
def configured(**settings: Any) -> Iterator[None]:
    """Give Dynamo other settings while this lasts; unlike `config.patch`, such contexts may be left in any order.

    Raises:
        UnrollError: where it is left in another thread: each has settings of its own.
    """
    from torch._dynamo import config

    layers = {name: [value] for name, value in settings.items()}
    stacks = dict(_SETTINGS.get())
    for name, layer in layers.items():
        stacks[name] = [*stacks.get(name, [[getattr(config, name)]]), layer]
        setattr(config, name, layer[0])
    _SETTINGS.set(stacks)
    try:
        yield
    finally:
        stacks = dict(_SETTINGS.get())
        if not layers.keys() <= stacks.keys():
            finding = "is left in another thread than that which entered it, and whose settings of Dynamo stay changed"
            raise UnrollError(Problem("context", finding, "leave it where it was entered"))
        for name, layer in layers.items():
            rest = [other for other in stacks.pop(name) if other is not layer]
            setattr(config, name, rest[-1][0])
            if len(rest) > 1:
                stacks[name] = rest
        _SETTINGS.set(stacks)


@contextmanager
def without_warnings(*messages: str, category: type[Warning] = Warning) -> Iterator[None]:
    """Ignore warnings whose text begins as one of these patterns while this lasts.

    Unlike `warnings.catch_warnings`, two threads may leave this in any order.
    """
    ignored = [("ignore", re.compile(message, re.IGNORECASE), category, None, 0) for message in messages]
    with patched(warnings, filters=[*ignored, *warnings.filters]):
        yield


class Told(NamedTuple):
    """A warning, and where it was given: file, line and function of each frame, the innermost first."""

    text: str
    frames: list[tuple[str, int, str]]


@contextmanager
def collected_warnings(category: type[Warning]) -> Iterator[list[Told]]:
    """Collect the warnings of a category that this thread is given while this lasts, in place of showing them."""
    here, found = threading.get_ident(), list[Told]()

    def show(message: Any, kind: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if issubclass(kind, category) and threading.get_ident() == here:
            frames = stack.walk_stack(sys._getframe(1))
            found.append(Told(str(message), [(f.f_code.co_filename, n, f.f_code.co_name) for f, n in frames]))
        else:
            told = warnings.WarningMessage(message, kind, filename, lineno, file, line)
            warnings._showwarnmsg_impl(told)  # pyright: ignore[reportAttributeAccessIssue]

    always = ("always", None, category, None, 0)
    with patched(warnings, showwarning=show, filters=[always, *warnings.filters]):
        yield found


_DRAWING: list[list[Any]] = []
"""The states of the random numbers that the contexts of `seeded` which last have found, the last on top"""


@contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """Draw torch's random numbers from this seed while this lasts; afterwards they go on as if nothing had been drawn.

    Without a seed they are drawn as ever meanwhile. All threads draw from the same numbers. Such contexts may be left
    in any order: when all have been left, the numbers go on where they were before the first.
    """
    with _LOCK:
        found = [_random_state()]
        _DRAWING.append(found)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        with _LOCK:
            number = next(k for k, other in enumerate(_DRAWING) if other is found)
            del _DRAWING[number]
            if number == len(_DRAWING):
                _set_random_state(found[0])
            else:  # for the one above to restore
                _DRAWING[number][:] = found


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the states of the generators of the CPU and of all CUDA devices, if these are in use."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


# contexts of `without_gc` that last, in all threads
_growing = 0

# whether the collector was on before the first of them
_collects = True


@contextmanager
def without_gc() -> Iterator[None]:
    """Hold back the garbage collector while a graph is read, grows or is saved: there is no garbage, and looking for it
    is a fifth of the time, or half.
    """
    global _growing, _collects
    with _LOCK:
        _growing += 1
        if _growing == 1:
            _collects = gc.isenabled()
            gc.disable()
    try:
        yield
    finally:
        with _LOCK:
            _growing -= 1
            if _growing == 0 and _collects:
                gc.enable()
