"""Lets one thread at a time do what torch cannot do in two, and hides from the others what torch changes for it."""

from __future__ import annotations

import builtins
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch._C._dynamo import eval_frame
from torch.fx import _symbolic_trace, traceback

from unroll.core.patching import original, patched
from unroll.core.torch_version import TELLS_TRACING_BY_THREAD

_ALONE = threading.RLock()


@contextmanager
def alone(*, exports: bool = False) -> Iterator[None]:
    """Wait until no other thread is in here or inside of Dynamo, and keep them out while this lasts.

    For what torch itself cannot do in two threads at once: to trace, to export and to compile. Models that run in
    other threads meanwhile are not traced.

    Args:
        exports: `torch.export` is to run. Compiled models of other threads then annotate nothing, as they would do in
            metadata that all threads share.
    """
    with ExitStack() as stack:
        if exports:  # which loads it anyway; it must see `annotate` as it is
            importlib.import_module("torch._dynamo.convert_frame")
        # Dynamo's lock first, as a backend that it calls may come here
        if dynamo := sys.modules.get("torch._dynamo.convert_frame"):
            stack.enter_context(dynamo.compile_lock)
        stack.enter_context(_ALONE)
        stack.enter_context(patched(_symbolic_trace._Patcher, patch=_patch, patch_method=_patch_method))
        # code is exchanged, and not the function: what is compiled holds that itself
        if not TELLS_TRACING_BY_THREAD:
            stack.enter_context(patched(_symbolic_trace.is_fx_symbolic_tracing, __code__=_is_tracing_here.__code__))
        stack.enter_context(patched(_Alone, thread=threading.get_ident()))
        if exports:
            stack.enter_context(patched(traceback, annotate=_annotate_in(threading.get_ident())))
        yield


class _Alone:
    thread = 0
    """The identity of the thread that is in `alone`"""


def _is_tracing_here() -> bool:
    """Stand in for `torch.fx`'s function of that name, by which compiled models refuse to be traced, in all threads.

    Only its code is used, with the names of torch's module.
    """
    import sys
    import threading

    here = sys.modules["unroll.core.alone"]._Alone.thread == threading.get_ident()  # pyright: ignore[reportAttributeAccessIssue]
    return here and _is_fx_tracing_flag and not torch.compiler.is_compiling()  # pyright: ignore  # noqa: F821


def _annotate_in(thread: int) -> Callable[[Any], AbstractContextManager[Any]]:
    """Return a stand-in for `torch.fx.traceback.annotate` that does nothing in other threads."""
    annotate = original(traceback, "annotate")

    @functools.wraps(annotate)
    def stand_in(data: Any) -> AbstractContextManager[Any]:
        return annotate(data) if threading.get_ident() == thread else nullcontext()

    return stand_in


def _patch(self: Any, names: dict[str, Any], name: str, new: Callable[..., Any], deduplicate: bool = True) -> None:
    """Stand in for the method by which `torch.fx` wraps functions in the globals of modules, for all threads."""
    here, before = threading.get_ident(), names[name] if name in names else getattr(builtins, name)

    @functools.wraps(new)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (new if threading.get_ident() == here else before)(*args, **kwargs)

    original(_symbolic_trace._Patcher, "patch")(self, names, name, called, deduplicate)


def _patch_method(self: Any, kind: type, name: str, new: Callable[..., Any], deduplicate: bool = True) -> None:
    """Stand in for the method by which `torch.fx` replaces `nn.Module.__call__` and others, for all threads."""
    stand_in = _OfThread(new, inspect.getattr_static(kind, name))
    original(_symbolic_trace._Patcher, "patch_method")(self, kind, name, stand_in, deduplicate)


class _OfThread:
    """A method that a class has in the thread that makes this, in the place of another that all others find.

    They find that itself, which the guards of compiled models compare.
    """

    def __init__(self, method: Any, others: Any) -> None:
        self._method, self._others, self._thread = method, others, threading.get_ident()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        here = torch.compiler.is_dynamo_compiling() or threading.get_ident() == self._thread
        return (self._method if here else self._others).__get__(instance, owner)


# Dynamo is to compile neither it nor what it calls: guards come here too.
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
eval_frame.set_code_exec_strategy(_OfThread.__get__.__code__, _SKIP)
