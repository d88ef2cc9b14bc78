"""Kernels: compiled functions in which the recipe has written the steps of a layer, for traced and scripted layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.jit import _state
from torch.nn.utils.rnn import PackedSequence

from unroll.core.arguments import as_result, as_states, check_arguments
from unroll.core.errors import Problems
from unroll.core.limits import check_written
from unroll.core.plan import Plan
from unroll.core.presets import Situation
from unroll.core.recurrence import Frame, Recurrence
from unroll.core.values import Value
from unroll.torchscript.lowering import write_recurrence
from unroll.torchscript.writer import TENSOR, ScriptWriter


def make_scriptable(layer: Any) -> Any:
    """Make an unrolled layer or cell ready for `torch.jit.script`, and return it.

    The module stays the object that it is and runs in Python as before.

    Raises:
        UnrollError: for a layer of which TorchScript would compile something else than it runs.
    """
    problems = Problems()
    if computed := [n for n in layer.recurrence.flat_names if not isinstance(getattr(layer, n), nn.Parameter)]:
        fix = "remove the parametrization, or use torch.jit.trace"
        problems.add(layer.place, f"computes {', '.join(computed)} at every call", fix)
    elif layer.origin is not None:
        finding = f"{type(layer).__name__} has methods of its own, which call super()"
        problems.add(layer.place, finding, "TorchScript knows no super(); use torch.jit.trace")
    elif any(weight is not getattr(layer, n) for weight, n in zip(layer.flat_weights, layer.recurrence.flat_names)):
        finding = "runs with a list of other weights than its parameters, _flat_weights"
        problems.add(layer.place, finding, "set the weights by their names, or use torch.jit.trace")
    problems.check()
    recurrence = layer.recurrence
    layer.__dict__.pop("__overloads__", None)  # left by torch.jit.script where the original was scripted before
    layer._kernel, layer._kernel_weights = kernel_of(layer), layer.flat_weights
    layer._kernel_rank, layer._batch_axis = recurrence.rank(), recurrence.batch_axis
    layer._state_lead = [] if recurrence.is_cell else [recurrence.passes]
    layer._state_sizes = list(recurrence.state_sizes)
    return layer


def kernel_of(layer: Any, *, steps: int | None = None, packed: bool = False, train: bool | None = None) -> Any:
    """Return the kernel of a layer or cell, in which `steps` are any number if the plan has blocks; see `kernel`."""
    with pause_tracing():
        recurrence, weight = layer.recurrence, layer.like
        plan = layer.plan.resolve(Situation(recurrence, steps, None, packed, weight.device.type, "torchscript"))
        if recurrence.is_cell or plan.block is not None:
            steps = None
        check_written(layer.place, steps, most=layer.limit)
        return kernel(recurrence, plan, layer.place, weight.dtype, steps=steps, packed=packed, train=train)


@functools.cache
def kernel(
    recurrence: Recurrence,
    plan: Plan,
    place: str,
    dtype: torch.dtype,
    *,
    steps: int | None = None,
    packed: bool = False,
    train: bool | None = None,
) -> Any:
    """Compile a function: `kernel(input, state, weights, train)` gives what torch's operator does, as a list.

    With `steps` every step is written, unless they go in blocks. With `train` given it is no argument. A packed kernel
    takes the batch sizes after the weights. What was compiled stays, as all that `torch.jit.script` compiles: traces
    point to it.
    """
    plan.refuse_training(place)
    graph = torch._C.Graph()
    tensors = torch._C.ListType(TENSOR)
    kinds = {"input": TENSOR, "state": tensors, "weights": tensors}
    kinds |= {"batch_sizes": TENSOR} if packed else {}
    kinds |= {"train": torch._C.BoolType.get()} if train is None else {}
    inputs = {name: graph.addInput(name).setType(kind) for name, kind in kinds.items()}
    writer = ScriptWriter(place, graph)
    values = {name: Value(writer, node=value) for name, value in inputs.items()}
    results = write_recurrence(
        writer,
        recurrence,
        plan,
        writer.items(values["weights"], sum(map(len, recurrence.weight_names))),
        dtype,
        values["input"],
        # torch takes both states of an LSTM as a list, and the one of others by itself
        values["state"] if len(recurrence.state_sizes) == 2 else writer.items(values["state"], 1)[0],
        train=values.get("train", train),
        steps=steps,
        batch_sizes=values.get("batch_sizes"),
    )
    graph.registerOutput(writer.list(results).node)
    return _state._python_cu.create_function("__torch__.unrolled", graph, True)


def trace(layer: Any, input: Any, hx: Any) -> Any:
    """Call the kernel of a layer or cell, for this number of steps, while `torch.jit.trace` records.

    In blocks they may be any number.
    """
    if isinstance(input, PackedSequence):
        return _trace_packed(layer, input, hx)
    recurrence = layer.recurrence
    axis = recurrence.batch_axis
    with pause_tracing():
        check_arguments(recurrence, layer.place, input, hx, weight=layer.like)
        batched, steps, _ = recurrence.frame(input.shape)
    input = input if batched else input.unsqueeze(axis)
    state = _initial(recurrence, input, input.shape[axis], hx)
    # zeros have a batch already
    state = state if batched or hx is None else [s.unsqueeze(-2) for s in state]
    results = kernel_of(layer, steps=steps, train=layer.training)(input, state, layer.flat_weights)
    if not batched:
        results = [results[0].squeeze(axis), *(s.squeeze(-2) for s in results[1:])]
    output, *finals = results
    return as_result([output, *finals]) if recurrence.is_cell else (output, as_result(finals))


def _trace_packed(layer: Any, input: PackedSequence, hx: Any) -> Any:
    """Call a kernel with a loop, since the number of rows in each step may change."""
    recurrence = layer.recurrence
    with pause_tracing():
        rows = int(input.batch_sizes[0])
        check_arguments(recurrence, layer.place, input.data, hx, weight=layer.like, rows=rows)
    # the batch is a tensor here, which the trace follows
    state = _initial(recurrence, input.data, input.batch_sizes[0], hx)
    if hx is not None and input.sorted_indices is not None:
        state = [s.index_select(1, input.sorted_indices) for s in state]
    run = kernel_of(layer, packed=True, train=layer.training)
    output, *finals = run(input.data, state, layer.flat_weights, input.batch_sizes)
    if input.unsorted_indices is not None:
        finals = [s.index_select(1, input.unsorted_indices) for s in finals]
    return input._replace(data=output), as_result(finals)


def _initial(recurrence: Recurrence, input: Tensor, batch: Any, hx: Any) -> list[Tensor]:
    given = as_states(hx)
    if given is not None:
        return list(given)
    return [input.new_zeros(shape) for shape in recurrence.state_shapes(Frame(True, None, batch))]


@contextmanager
def pause_tracing() -> Iterator[None]:
    """Keep `torch.jit.trace` from following while this lasts: Python may look at shapes here."""
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


SCRIPTED = ("_kernel", "_kernel_weights", "_kernel_rank", "_batch_axis", "_state_lead", "_state_sizes")
"""The attributes of a layer that are for `torch.jit.script` alone"""


class Scriptable(nn.Module):
    """The part of a layer that TorchScript compiles."""

    if TYPE_CHECKING:
        place: str
        _kernel: Callable[..., list[Tensor]]
        _kernel_weights: list[Tensor]
        _kernel_rank: int
        _batch_axis: int
        _state_lead: list[int]
        _state_sizes: list[int]

    # TorchScript reads types here, and no strings; it infers those of everything but an empty list.
    __annotations__ = {"_state_lead": list[int]}
    __jit_unused_properties__ = ("all_weights", "flat_weights", "like", "recurrence", "_flat_weights")

    def _compiled(self, input: Tensor, state: list[Tensor]) -> list[Tensor]:
        """Run the kernel, compiled by TorchScript: on any rank of input, and with zeros for an empty state."""
        batched = input.dim() == self._kernel_rank
        if not batched:
            if input.dim() != self._kernel_rank - 1:
                raise RuntimeError(f"{self.place}: the input has shape {input.shape}")
            input = input.unsqueeze(self._batch_axis)
            state = [s.unsqueeze(-2) for s in state]
        if len(state) == 0:
            for size in self._state_sizes:
                shape = self._state_lead + [input.size(self._batch_axis), size]  # noqa: RUF005
                state.append(torch.zeros(shape, dtype=input.dtype, device=input.device))
        results = self._kernel(input, state, self._kernel_weights, self.training)
        if batched:
            return results
        return [results[0].squeeze(self._batch_axis)] + [result.squeeze(-2) for result in results[1:]]
