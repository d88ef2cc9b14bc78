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
from unroll.core.plan import Plan, Preset
from unroll.core.signatures import no_model, takes, told
from unroll.streams.checking import check_pieces
from unroll.streams.graphs import initial_state, stream_graph, stream_program
from unroll.streams.modules import Streaming, stream_module
from unroll.streams.states import ARGUMENT
from unroll.streams.subjects import GraphSubject, ModuleSubject


@told
def streaming(
    model: Any,
    args: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    where: Where = None,
    rules: Rules | None = None,
    plan: Plan | Preset | None = None,
    check: bool = True,
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
        check: whether the example is run once as a whole and once in two unequal pieces, in evaluation mode, and
            what differs is refused: a padded convolution, attention, a mean over time. An example of one or two
            steps is repeated first. Where that cannot be, as for graphs and programs that take one length only, or
            where the model draws random numbers, an `UnrollWarning` says that nothing was checked. Batch norm in
            training, which has the statistics of the piece, is not seen.

    Returns:
        A `Streaming` module for a module. A graph or program of the same kind for those, which takes a
        dictionary `state` after all other arguments and returns a pair of output and state.

    Raises:
        UnrollError: with every layer that cannot be streamed, why, and what to do: in two directions, on packed rows,
            and called both with states of the model's own and without; and with everything that gives another
            result in pieces than for the whole.

    Example:
        >>> streamed = streaming(nn.Sequential(nn.LSTM(3, 5)), torch.zeros(7, 1, 3))
        >>> {name: tuple(h.shape) for name, h in streamed.initial_state(batch=2).items()}
        {'0.h': (1, 2, 5), '0.c': (1, 2, 5)}
    """
    where = read_where(where)
    args = as_args(args)
    if not isinstance(check, bool):
        raise UnrollError(Problem(f"streaming(check={check!r})", "is neither True nor False", "give one of them"))
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
        program = isinstance(model, ExportedProgram)
        streamed, chains = stream_program(model, where) if program else stream_graph(model, args, where)
        if check:
            given = model.example_inputs if program else (args, {}) if args else None
            check_pieces(GraphSubject(streamed, chains, initial_state(streamed)), given)
        return streamed
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        kinds = "an nn.Module, a GraphModule or an ExportedProgram; export_onnx takes the result"
        raise UnrollError(no_model("streaming(model)", model, kinds))
    if ARGUMENT in (kwargs or {}):
        fix = "rename it in the model: streaming models take their states by this name"
        raise UnrollError(Problem(f"kwargs[{ARGUMENT!r}]", "is an argument of the model already", fix))
    if any(isinstance(part, Streaming) for part in model.modules()):
        raise UnrollError(
            Problem("streaming(model)", "has states for inputs already", "give the model that it was made of")
        )
    kwargs = dict(kwargs or {})
    if not args and not kwargs and not takes(model.forward):
        fix = "give example inputs, streaming(model, args), on which a module is run"
        raise UnrollError(Problem("streaming(args)", "is missing", fix))
    make = stream_module(model, args, kwargs, where, rules, None if plan is None else Plan.of(plan))
    if check:
        check_pieces(ModuleSubject(make, type(model).__name__), (args, kwargs))
    return make()
