"""The states of a streaming model on its way to a file: a state `lstm.h` is the input `lstm.h` and the output
`lstm.h.next`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.streams.graphs import example_state
from unroll.streams.modules import Streaming
from unroll.streams.states import ARGUMENT, NEXT, zero_states


def add_state_inputs(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return example inputs and dynamic shapes of a streaming model, with those of its states if they were left out.

    Dynamic shapes are then as the model it was made of takes them, and the states have an open number of rows
    where the inputs do.
    """
    if isinstance(model, Streaming):
        if kwargs.get(ARGUMENT) is None and not model.training:  # in training it is refused, and would change buffers
            with torch.no_grad():
                _, state = model(*args, **kwargs)
            kwargs = {**kwargs, ARGUMENT: {name: torch.zeros_like(value) for name, value in state.items()}}
        if dynamic_shapes is not None and not _names_state(dynamic_shapes):
            dynamic_shapes = _with_states(model, args, kwargs, dynamic_shapes)
        return args, kwargs, dynamic_shapes
    example = example_state(model)
    if example is None or not isinstance(model, fx.GraphModule) or ARGUMENT in kwargs:
        return args, kwargs, dynamic_shapes
    if len(args) == len(model.graph.find_nodes(op="placeholder")):
        return args, kwargs, dynamic_shapes
    if dynamic_shapes is not None and not _names_state(dynamic_shapes):
        states = {name: _open_rows(state) for name, state in example.items()}
        mapping = isinstance(dynamic_shapes, Mapping)
        dynamic_shapes = {**dynamic_shapes, ARGUMENT: states} if mapping else (*dynamic_shapes, states)
    return (*args, zero_states(example, None)), kwargs, dynamic_shapes


def _names_state(dynamic_shapes: Any) -> bool:
    return isinstance(dynamic_shapes, Mapping) and ARGUMENT in dynamic_shapes


def _open_rows(state: Tensor) -> dict[int, Any]:
    """Return the dynamic shape of a state whose number of rows may follow that of the inputs."""
    return {state.dim() - 2: Dim.AUTO} if state.dim() > 1 and state.shape[-2] > 1 else {}


def _with_states(model: Streaming, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> dict[str, Any]:
    """Return dynamic shapes for the arguments of the model inside, as `Streaming.forward` takes them."""
    signature = inspect.signature(model.model.forward)
    bound = signature.bind_partial(*args).arguments
    if isinstance(shapes, Mapping):
        positional: tuple[Any, ...] = ()
        for name, value in bound.items():
            given = shapes.get(name)
            several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL  # `*args`
            positional += (tuple(given or [None] * len(value))) if several else (given,)
        named = {name: shapes.get(name) for name in kwargs if name != ARGUMENT}
        unknown = [name for name in shapes if name not in bound and name not in named]
        if unknown:
            finding, fix = "names no argument of the model", f"the arguments are: {', '.join([*bound, *named])}"
            raise UnrollError(*(Problem(f"dynamic_shapes[{name!r}]", finding, fix) for name in unknown))
    else:
        positional, named = tuple(shapes), {name: None for name in kwargs if name != ARGUMENT}
    found: dict[str, Any] = {"args": positional}
    found[ARGUMENT] = {
        name: _open_rows(state) for name, state in (kwargs.get(ARGUMENT) or model.initial_state()).items()
    }
    return {**found, "kwargs": named} if named else found


def name_states(
    model: nn.Module | ExportedProgram,
    program: ExportedProgram,
    written: ir.Model,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> None:
    """Call the states of a streaming model by their names in the file.

    Args:
        model: of any kind; others than streaming ones are left alone.
        program: what it was captured as.
        written: the model of the file.
        input_names: the names that were asked for, for the first inputs at least.
        output_names: the same for outputs.

    Raises:
        UnrollError: for other names that were asked for states, and for states called as something else.
    """
    if not isinstance(model, Streaming) and example_state(model) is None:
        return
    spec = program.call_spec.in_spec
    assert spec is not None
    # Each argument as its number among the inputs: `state` maps a state's name to its input.
    args, kwargs = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    state: dict[str, int] = kwargs[ARGUMENT] if ARGUMENT in kwargs else args[-1]
    graph = written.graph
    # The states are the last outputs, in the same order.
    results = len(graph.outputs) - len(state)
    named = {name: graph.inputs[k] for name, k in state.items()}
    named |= {f"{name}{NEXT}": value for name, value in zip(state, graph.outputs[results:])}
    others = {value.name for value in (*graph.inputs, *graph.outputs)} - {value.name for value in named.values()}
    asked = dict(zip(graph.inputs, input_names)) | dict(zip(graph.outputs, output_names))
    problems = Problems(
        Problem(asked[value], f"is to be the name of the state {name}", "leave it out: states keep their own names")
        for name, value in named.items()
        if asked.get(value, name) != name
    )
    fix = "give the other one another name, by input_names or output_names"
    problems += (Problem(name, "is the name of a state and of something else", fix) for name in named if name in others)
    problems.check()
    # Values inside make way for the names.
    for node in graph:
        for value in node.outputs:
            if value.name in named:
                value.name = f"{value.name}.inside"
    for name, value in named.items():
        value.name = name
