"""Unrolling inside `torch.compile`, for models that stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from unroll.core.alone import alone
from unroll.core.errors import Problem, UnrollError, UnrollWarning
from unroll.core.limits import check_written, limited
from unroll.core.limits import limit as current_limit
from unroll.core.options import FIXED, Where, read_where, unknown_names
from unroll.core.patching import configured, original, without_gc
from unroll.core.plan import Plan, Preset
from unroll.core.recurrence import LAYERS, read_layer
from unroll.core.signatures import told
from unroll.graphs.calls import graph_parts, tensor_metadata
from unroll.graphs.code import recompile_late
from unroll.graphs.rewrite import find_calls, rewrite
from unroll.modules.find import is_recurrent
from unroll.modules.replace import replace
from unroll.modules.running import run_packed
from unroll.packed.contexts import keep_padding
from unroll.packed.functions import PACKS, PADDING, PADS, PaddedFunctions
from unroll.packed.guard import check_graph

HIDDEN = "Dynamo keeps nn.LSTM, nn.GRU and nn.RNN from backends, and would leave them as they are in silence"
SHOWN = "use unroll.compile(model), or set torch._dynamo.config.allow_rnn"

BACKEND_OPTIONS = {"backend", "plan", "where", "limit", "options", "mode"}


def unroll_backend(
    graph: fx.GraphModule, inputs: list[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Unroll recurrent calls and hand the graph on to another backend, as a backend of `torch.compile`.

    Registered as `"unroll"`. Dynamo shows `nn.LSTM`, `nn.GRU` and `nn.RNN` to a backend only while
    `torch._dynamo.config.allow_rnn` is set, which `unroll.compile` does for the calls of its own
    model alone. (Without it, and with `fullgraph=True`, Dynamo raises an error of its own first. Without either,
    Dynamo leaves a module that calls such a layer to Python and calls no backend. So the first look-up of the name in a
    process warns.)

    Args:
        graph: what Dynamo captured.
        inputs: its example inputs.
        options: `backend`, the name of the next backend or a function (`"inductor"`); `options`, for
            that one; `plan`, `where` and `limit`, as for `unroll.unroll`; `mode`, one of Inductor's.

    Raises:
        UnrollError: for unknown options, for calls that cannot be honoured, and while `allow_rnn` is not set.
    """
    from torch._dynamo import config, lookup_backend

    given = dict(options or {})
    if unknown := given.keys() - BACKEND_OPTIONS:
        fix = f"the options are {', '.join(sorted(BACKEND_OPTIONS))}"
        raise UnrollError(Problem("options", f"has {', '.join(sorted(unknown))}, unknown to the backend", fix))
    if not config.allow_rnn:
        raise UnrollError(Problem('torch.compile(backend="unroll")', HIDDEN, SHOWN))
    plan, where = Plan.of(given.get("plan")), read_where(given.get("where"))
    parts = graph_parts(graph)  # checkpoints and branches are graphs of their own
    with limited(given.get("limit")):
        found = [(part, find_calls(part, where, plan, tensor_metadata(part), FIXED)) for part in parts]
    device = "cuda" if _on_cuda(inputs) else "cpu"
    with without_gc():
        for part, calls in found:
            for call in calls:
                call.compile_for(device, in_blocks=part is graph)
            rewrite(part.graph, calls, asserts=False)  # Dynamo guards every shape
            recompile_late(part)
    following: Any = lookup_backend(given.get("backend", "inductor"))
    if given.get("mode"):
        return following(graph, inputs, config_patches=torch._inductor.list_mode_options(given["mode"]))
    if "options" not in given:
        return following(graph, inputs)
    keyword = "config_patches" if given.get("backend", "inductor") == "inductor" else "options"
    return following(graph, inputs, **{keyword: given["options"]})


def __getattr__(name: str) -> Any:
    # By this name torch's registry finds the backend, once in a process, and before Dynamo decides what it shows.
    if name != "backend_by_name":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch._dynamo import config

    if not config.allow_rnn:
        warnings.warn(f'torch.compile(backend="unroll"): {HIDDEN}; {SHOWN} before', UnrollWarning, stacklevel=2)
    return unroll_backend


@told
def compile(
    model: Callable[..., Any],
    *,
    plan: Plan | Preset | None = None,
    where: Where = None,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = None,
    limit: int | None = None,
) -> Callable[..., Any]:
    """Compile a model with recurrent layers by `torch.compile`, without changing the model or any global setting.

    Torch is changed while Dynamo compiles, which one thread does at a time, and not when the result is called. What
    changes in the model later, its weights and `train()` and `eval()`, reaches the result.

    On a CUDA device the steps run in CUDA graphs, as launches take longer than they: results stay until the next call
    of the model, which writes to the same memory; `clone` what is to be kept, and call
    `torch.compiler.cudagraph_mark_step_begin()` before a call that is to be a run of its own. With `mode="default"`
    there are none.

    The first call takes the longer the more steps are written. For inference on a CPU, under `torch.no_grad()`, one
    block of 16 steps is compiled, in a loop, from 96 steps on. Give `plan=Plan(time=16)` for a loop that
    takes any length; training so is refused before PyTorch 2.15.

    Args:
        model: a module or function, for inference or training.
        plan: how the steps are laid out; for Inductor by default that of the preset `inductor`.
        where: which layers are unrolled, as for `unroll.unroll`; the others go to the backend as they are.
        backend: what compiles the unrolled graph.
        mode: of Inductor, as for `torch.compile`; `"reduce-overhead"` on a CUDA device, if there are no `options`.
        options: for that backend, in place of a mode.
        fullgraph: as for `torch.compile`, but on by default.
        dynamic: as for `torch.compile`; the number of time steps is static all the same, unless the plan has blocks.
        limit: the most steps of a layer that are written out, as for `unroll.unroll`.

    Returns:
        The model compiled: a module for a module, that shares everything with it.

    Raises:
        UnrollError: for a mode beside options or another backend, or one that Inductor does not have; at the first
            call, as the cause of Dynamo's error, for what cannot be unrolled.

    Example:
        >>> model = nn.GRU(3, 5)
        >>> compile(model, backend="eager")(torch.zeros(7, 2, 3))[0].shape
        torch.Size([7, 2, 5])
    """
    with_inductor = backend == "inductor"
    if mode is not None:
        _check_mode(mode, alone=with_inductor and options is None)
    plan, where = Plan.of("inductor" if plan is None and with_inductor else plan), read_where(where)
    with limited(limit):
        most = current_limit()
    ours: dict[str, Any] = {"backend": backend, "plan": plan, "where": where, "limit": most}
    if options is not None:
        ours["options"] = dict(options)
    elif with_inductor:
        ours["mode"] = mode
    if isinstance(model, nn.Module):
        names = [name for name, layer in model.named_modules(remove_duplicate=False) if is_recurrent(layer)]
        unknown_names(where, names).check()
        if plan.block or plan.of_modules:  # of a module's own steps; a graph has none of it
            model = replace(model, plan, where, limit=most)
    return _context(ours, fullgraph=fullgraph, dynamic=dynamic)(model)


def _check_mode(mode: str, *, alone: bool) -> None:
    """Refuse a mode that is not Inductor's, and one beside options or another backend."""
    if not alone:
        finding, fix = "is of Inductor, and in place of options", "give backend='inductor' alone, or no mode"
        raise UnrollError(Problem(f"mode={mode!r}", finding, fix))
    if mode not in (known := torch._inductor.list_mode_options()):
        finding, fix = "is no mode of Inductor", f"choose one of {', '.join(known)}"
        raise UnrollError(Problem(f"mode={mode!r}", finding, fix))


def _on_cuda(inputs: Sequence[Any]) -> bool:
    return any(isinstance(input, torch.Tensor) and input.device.type == "cuda" for input in inputs)


def _context(options: Mapping[str, Any], *, fullgraph: bool, dynamic: bool | None) -> Any:
    """Make `torch.compile`'s wrapper of a model, with the changes to torch that are needed while Dynamo compiles."""

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        check_graph(graph)
        best = {"mode": "reduce-overhead"} if "mode" in options and not options["mode"] and _on_cuda(inputs) else {}
        return unroll_backend(graph, inputs, options={**options, **best})

    context: Any = torch._dynamo.optimize(
        backend, nopython=fullgraph, dynamic=dynamic, guard_filter_fn=_holds_when_called
    )
    permission = partial(_permission, options["plan"], options["where"], options["limit"])
    context.callback = _Compiling(context.callback, permission)
    return context


class _Compiling:
    """Dynamo's callback for a frame that is to be compiled, run in a context.

    Attributes:
        _torchdynamo_orig_backend: the callback itself, by the name under which Dynamo looks for the backend in it.
    """

    def __init__(self, callback: Any, context: Callable[[], AbstractContextManager[None]]) -> None:
        self._torchdynamo_orig_backend, self._context = callback, context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo import config, exc

        try:
            with alone(), self._context():
                return self._torchdynamo_orig_backend(*args, **kwargs)
        except exc.FailOnRecompileLimitHit as error:
            limit = config.recompile_limit
            finding = f"has been compiled {limit} times, once for each number of time steps or other size that differed"
            fix = "give plan=Plan(time=16), which takes any number of steps, or pad to fewer lengths"
            raise UnrollError(Problem("unroll.compile", finding, fix)) from error


def _holds_when_called(guards: Sequence[Any]) -> list[bool]:
    """Tell for each guard whether what it is on is there when the compiled model is called.

    What `keep_padding` puts in the place of torch's own, and what is found through that, is there only while Dynamo
    compiles.
    """
    functions = PADDING.value or ()
    passing = [PACKS, PADS, *filter(callable, functions)]
    replaced = [original(kind, "forward") for kind in LAYERS]
    names = {
        guard.name
        for guard in guards
        if isinstance(guard.value, PaddedFunctions)
        or any(guard.value is value for value in passing)
        or ("__closure__" in guard.name and any(guard.value is forward for forward in replaced))
    }
    return [not any(name in guard.name for name in names) for guard in guards]


@contextmanager
def _permission(plan: Plan, where: Where, most: int) -> Iterator[None]:
    """Let Dynamo show recurrent layers to backends, and keep packed rows padded, while this lasts."""

    def on_packed(layer: Any, input: Any, hx: Any) -> Any:
        if where is not None:
            finding = "is given a packed sequence, of which where= cannot choose"
            raise UnrollError(Problem(type(layer).__name__, finding, "compile unroll(model, where=...)"))
        return run_packed(_Original(layer, plan, most), input, hx)

    def on_steps(place: str, steps: int) -> None:
        check_written(place, steps, most=most)

    # Dynamo tells no names: of what `where` chooses, only the graph tells whether it is too long.
    padding = keep_padding(on_packed, dynamo=True, on_steps=on_steps if where is None else None)
    # A float such as dropout is to be a constant of the graph, not an input.
    with configured(allow_rnn=True, specialize_float=True), padding:
        yield


class _Original:
    """A layer of torch's with what `run_packed` asks of a layer."""

    frozen = None

    def __init__(self, layer: Any, plan: Plan, limit: int) -> None:
        self.place, self.plan, self.training = type(layer).__name__, plan, layer.training
        self.limit = limit
        self.recurrence = read_layer(layer)
        layer._update_flat_weights()  # as its own `forward` does
        self.flat_weights = layer._flat_weights
        self.like = self.flat_weights[0]
