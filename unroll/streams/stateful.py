"""The public function: recurrent states as named inputs and outputs of a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from unroll.core.arguments import as_args
from unroll.core.errors import Problem, UnrollError
from unroll.core.options import Rules, Where, read_where
from unroll.core.plan import Plan
from unroll.streams.graphs import stream_graph, stream_program
from unroll.streams.modules import Streaming, stream_module
from unroll.streams.states import ARGUMENT


def streaming(
    model: Any,
    args: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    where: Where = None,
    rules: Rules | None = None,
    plan: Plan | str | None = None,
) -> Any:
    """Make the states of a model's recurrent layers inputs and outputs of the whole model, by name.

    `output, state = streamed(piece, state=state)` for one piece of a sequence after the other gives what the model
    gives for the whole sequence. The states are those of layers to which the model passes none: `lstm.h` and `lstm.c`
    for a layer `lstm`, `encoder.rnn.h` inside of another module, and `lstm.1.h` for the second of several calls. A
    state that the model itself passes is left alone, also one that it keeps in an attribute.

    Args:
        model: an `nn.Module`, a `torch.fx.GraphModule` or a `torch.export.ExportedProgram`.
        args: example inputs, a tuple or a single tensor, of any length that the model takes; a module is run on
            them twice, to see which layers are called how often. Needless for an ExportedProgram.
        kwargs: example keyword arguments of a module.
        where: which layers, as for `unroll.unroll`. Leave out those that run over something else than time, such
            as the frequencies of one step. Layers of a module that are left out stay as they are.
        rules: for a module's layers of classes of your own, as for `unroll.unroll`.
        plan: how the steps of a module's layers are laid out. Graphs and programs get their states alone; their
            steps are written out by `unroll.unroll`, afterwards.

    Returns:
        A `Streaming` module for a module. A graph or program of the same kind for those, which takes a
        dictionary `state` after all other arguments and returns a pair of output and state.

    Raises:
        UnrollError: with every layer that cannot be streamed, why, and what to do: in two directions, on packed rows,
            and called both with states of the model's own and without.

    Example:
        >>> streamed = streaming(nn.Sequential(nn.LSTM(3, 5)), torch.zeros(7, 1, 3))
        >>> {name: tuple(h.shape) for name, h in streamed.initial_state(batch=2).items()}
        {'0.h': (1, 2, 5), '0.c': (1, 2, 5)}
    """
    where = read_where(where)
    args = as_args(args)
    if isinstance(model, (fx.GraphModule, ExportedProgram)):
        given = {"kwargs": kwargs, "rules": rules, "plan": plan}
        if isinstance(model, ExportedProgram):
            given["args"] = args or None
        fix = "leave it out; unroll(streaming(...), ...) writes out the steps"
        wrong = [
            Problem(f"streaming({k}=...)", "was given for a graph", fix) for k, v in given.items() if v is not None
        ]
        if wrong:
            raise UnrollError(*wrong)
        if isinstance(model, ExportedProgram):
            return stream_program(model, where)
        return stream_graph(model, args, where)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        fix = "give an nn.Module, a GraphModule or an ExportedProgram; export_onnx takes the result"
        raise UnrollError(Problem("streaming(model)", f"got {type(model).__name__}", fix))
    if ARGUMENT in (kwargs or {}):
        fix = "rename it in the model: streaming models take their states by this name"
        raise UnrollError(Problem(f"kwargs[{ARGUMENT!r}]", "is an argument of the model already", fix))
    if any(isinstance(part, Streaming) for part in model.modules()):
        raise UnrollError(
            Problem("streaming(model)", "has states for inputs already", "give the model that it was made of")
        )
    return stream_module(model, args, dict(kwargs or {}), where, rules, None if plan is None else Plan.of(plan))
