"""PyTorch models on their way to ONNX, with each recurrent layer as a single node.

Torch's exporter then has nothing to do with the steps, and its cost does not grow with them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unroll.core.options import Rules, Where
from unroll.core.patching import alone
from unroll.core.recurrence import Problem, Recurrence, UnrollError, check_arguments, read_layer
from unroll.graphs.functions import FUNCTIONS, bind, form_of_call, read_given
from unroll.modules import replace as trees
from unroll.modules.layers import STAND_IN, UnrolledLayer
from unroll.onnx.calls import DOMAIN, LAYER
from unroll.packed.contexts import Sizes, keeping_rows, original_order, sorted_state, stopped_by_index
from unroll.packed.guard import released, watched, watched_run


def example_args(args: Any) -> tuple[Any, ...]:
    """Example inputs as a tuple: a single one need not be in one."""
    return () if args is None else tuple(args) if isinstance(args, (tuple, list)) else (args,)


def in_order(model: nn.Module | ExportedProgram, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Keyword arguments as the model's forward names them, which is the order of a file's inputs."""
    given = dict(kwargs or {})
    if not given or isinstance(model, (ExportedProgram, torch.jit.ScriptModule)):
        return given
    names = [name for name in inspect.signature(model.forward).parameters if name in given]
    return {name: given[name] for name in [*names, *given]}


def capture(
    model: nn.Module | ExportedProgram,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    *,
    dynamic_shapes: Any = None,
    where: Where = None,
    rules: Rules | None = None,
) -> ExportedProgram:
    """The model as an ExportedProgram in which every recurrent layer is one `unroll::Recurrence` node.

    Raises:
        UnrollError: for layers that cannot be honoured, for a model that changes its buffers, and if
            `torch.export` fails.
    """
    with alone():
        program = _captured(model, example_args(args), in_order(model, kwargs), dynamic_shapes, where, rules)
        changed = _changed_buffers(program)
    problems = [
        Problem(name, "is a buffer that the model changes, and an ONNX file keeps none", "return it instead")
        for name in changed
    ]
    if problems:
        raise UnrollError(*problems)
    return program


def _changed_buffers(program: ExportedProgram) -> list[str]:
    """Names of the buffers that a run changes, which a program tells only of functional operators."""
    if not program.graph_signature.buffers:
        return []
    return list(program.run_decompositions({}).graph_signature.buffers_to_mutate.values())


def _captured(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
    where: Where,
    rules: Rules | None,
) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        given = {"args": args, "kwargs": kwargs, "dynamic_shapes": dynamic_shapes, "where": where, "rules": rules}
        _refuse(given, "was given for an ExportedProgram, which has its own")
        return model.run_decompositions(
            {op: partial(_call, op) for op in FUNCTIONS if isinstance(op, torch._ops.OpOverload)}
        )
    if model.training:
        finding = "is in training mode, in which an ONNX file cannot run it"
        raise UnrollError(Problem(type(model).__name__, finding, "call model.eval() first"))
    every = where is None
    if rules is not None or not every:
        model = trees.replace(model, None, where, rules)
    if not every and (problems := _left_out(model)):
        raise UnrollError(*problems)
    # Strides mean nothing in a file, and those of a piece of a tensor would fix sizes that are open.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, (args, kwargs))
    on_layer = _on_packed if every else _not_chosen
    try:
        with (
            STAND_IN.set(_forward),
            _Calls() if every else nullcontext(),
            keeping_rows(on_layer, stopped_by_index),
            watched_run(model),
        ):
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except UnrollError:
        raise
    except Exception as error:
        if fixed := FIXED.findall(str(error)):
            raise UnrollError(*(_is_fixed(*found) for found in fixed)) from error
        finding = f"cannot be captured by torch.export ({type(error).__name__}: {error})"
        mend = "make torch.export.export(model, args, strict=False) work first"
        raise UnrollError(Problem(type(model).__name__, finding, mend)) from error


FIXED = re.compile(r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)")
"""What `torch.export` says of a size that cannot stay open"""


def _is_fixed(name: str, size: str) -> Problem:
    if int(size) < 2:
        finding, mend = f"is open, and {size} in the example, which torch.export fixes", "give an example of 2 or more"
    else:
        finding, mend = f"is open, and the model fixes it to {size}", "leave it out, or change what fixes it"
    return Problem(f"dynamic_shapes: {name}", finding, mend)


def _left_out(model: nn.Module) -> list[Problem]:
    """A problem for each layer that torch's exporter would write, and wrongly."""
    finding = "has proj_size, which torch's exporter writes wrongly, and is not chosen by where="
    return [
        Problem(name, finding, "let where= choose it too")
        for name, module in model.named_modules()
        if isinstance(module, nn.LSTM) and module.proj_size
    ]


def _refuse(given: dict[str, Any], finding: str) -> None:
    problems = [
        Problem(f"export_onnx({name}=...)", finding, f"leave {name} out") for name, value in given.items() if value
    ]
    if problems:
        raise UnrollError(*problems)


class Lengths(NamedTuple):
    """What lengths of packed sequences may be."""

    steps: Any
    """The largest, a number or a symbolic one"""
    falling: bool
    """Whether they must be sorted"""


def lengths_among(program: ExportedProgram) -> dict[str, Lengths]:
    """The inputs of a captured program that are lengths of packed sequences, by name."""
    found: dict[str, Lengths] = {}
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.onnx_symbolic._symbolic_multi_out.default
    ):
        operands: Any = node.args[0]
        if node.kwargs["domain"] != DOMAIN or not _is_padded(node):
            continue
        before = _before(operands[-1])
        vectors = [n for n in before if n.op == "placeholder" and n.meta["val"].dim() == 1]
        if len(vectors) == 1:
            falling = not any("sort" in str(n.target) for n in before)
            found[vectors[0].name] = Lengths(operands[0].meta["val"].shape[0], falling)
    return found


def _is_padded(node: fx.Node) -> bool:
    keys: Any = node.kwargs["attr_keys"]
    values: Any = node.kwargs["attr_ints"]
    positions: Any = node.kwargs["attr_pos"]
    return bool(values[positions[keys.index("padded")][0]])


def _before(node: fx.Node) -> set[fx.Node]:
    """Everything that a node's value is computed from, that is a tensor."""
    found: set[fx.Node] = set()
    left = [node]
    while left:
        node = left.pop()
        if node not in found and isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
            found.add(node)
            left += node.all_input_nodes
    return found


class _Calls(TorchFunctionMode):
    """Writes a node for every call of a recurrent function, whoever makes it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return _call(func, *args, **kwargs) if func in FUNCTIONS else func(*args, **kwargs)


def _call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """What `torch.lstm`, `aten.gru_cell` and their kin return, from a node."""
    kind, form = form_of_call(func, args, kwargs)
    if form == "packed":
        mend = "export the module itself, whose calls of pack_padded_sequence are understood"
        raise UnrollError(Problem(kind, "is called on packed rows, whose sizes are not in the graph", mend))
    given = bind(form, args, kwargs)
    weights = [w for w in given["params"] if w is not None]
    recurrence = read_given(kind, form, given, [tuple(w.shape) for w in weights[:2]])
    results = _node(recurrence, kind, given["input"], given["hx"], weights, training=bool(given["train"]))
    return results[0] if len(results) == 1 else tuple(results)


def _forward(self: Any, input: Tensor, hx: Any = None) -> Any:
    """Stands in for `Unrolled.forward`."""
    if isinstance(input, PackedSequence):
        return _on_packed(self, input, hx)
    recurrence, weights = self.recurrence, _weights(self)
    results = _node(recurrence, self.place, input, hx, weights, training=self.training, named=True, plan=_plan(self))
    states = results if recurrence.is_cell else results[1:]
    final = states[0] if len(states) == 1 else tuple(states)
    return final if recurrence.is_cell else (results[0], final)


def _weights(layer: Any) -> list[Tensor]:
    """In torch's order, or of a frozen layer as they were laid out."""
    frozen = getattr(layer, "frozen", None)
    if frozen is None:
        return [weight for group in layer.all_weights for weight in group]
    frozen.read(layer, None, layer.like.dtype)  # refuses another type than it was frozen in
    return [getattr(layer, name) for name in frozen.names]


def _plan(layer: Any) -> str:
    """What a frozen layer was laid out for; empty for others."""
    return str(layer.plan) if getattr(layer, "frozen", None) else ""


def _on_packed(layer: Any, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
    """What a layer, torch's or an `Unrolled` one, returns for a packed sequence, from a node that is given lengths."""
    place = getattr(layer, "place", type(layer).__name__)
    sizes = packed.batch_sizes
    if not isinstance(sizes, Sizes):
        mend = "pack by pack_padded_sequence or pack_sequence, inside of the model"
        raise UnrollError(Problem(place, "is given a sequence that was packed elsewhere", mend))
    recurrence = replace(read_layer(layer), batch_first=False)
    weights = _weights(layer)
    data = released(packed.data)
    check_arguments(recurrence, place, data, hx, weight=weights[0], rows=sizes.count)
    state: Any = sorted_state(packed, hx)
    state = state[0] if state and recurrence.mode != "LSTM" else state
    rows = data.unflatten(0, (sizes.steps, sizes.count))
    watched(data)
    named = isinstance(layer, UnrolledLayer)
    options = {"training": layer.training, "named": named, "plan": _plan(layer)}
    output, *states = _node(recurrence, place, rows, state, weights, lengths=sizes.lengths, **options)
    states = original_order(packed, states)
    return PackedSequence(watched(output), *packed[1:]), states[0] if len(states) == 1 else tuple(states)


def _not_chosen(layer: nn.Module, packed: PackedSequence, hx: Any) -> Any:
    """Stands in for torch's own layers where `where` chooses among layers: it has left them as they are."""
    finding = "is given a packed sequence and is not chosen by where=; in a file it cannot stay as it is"
    raise UnrollError(Problem(type(layer).__name__, finding, "let where= choose it too"))


def _node(
    recurrence: Recurrence,
    place: str,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    *,
    training: bool,
    named: bool = False,
    plan: str = "",
    lengths: Tensor | None = None,
) -> Sequence[Tensor]:
    """The output of a layer and its last states, or the next states of a cell, from one node.

    With a `plan`, the weights are laid out for it already.
    With `lengths`, `[B]`, the input is padded, and the output all its rows, `[T * B, features]`; those that have ended
    hold no values in particular.
    """
    if training and recurrence.dropout and recurrence.num_layers > 1:
        raise UnrollError(Problem(place, "drops out between layers in training mode", "call eval() on it"))
    if torch.is_autocast_enabled(input.device.type):
        mend = "convert the model by .to(dtype), or export it without autocast"
        raise UnrollError(Problem(place, "is called under autocast", mend))
    check_arguments(recurrence, place, input, hx if not isinstance(hx, list) else tuple(hx), weight=weights[0])
    lead = list(input.shape[:-1])
    batched = len(lead) == (1 if recurrence.is_cell else 2)
    batch = (lead[:1] if recurrence.batch_first or recurrence.is_cell else lead[1:]) if batched else []
    passes = [] if recurrence.is_cell else [recurrence.passes]
    shapes = [[*passes, *batch, size] for size in recurrence.state_sizes]
    if not recurrence.is_cell:
        rows = lead if lengths is None else [lead[0] * lead[1]]
        shapes.insert(0, [*rows, len(recurrence.directions) * recurrence.output_size])
    state = (hx,) if isinstance(hx, Tensor) else hx or (None,) * len(recurrence.state_sizes)
    attributes = {**asdict(recurrence), "batched": batched, "padded": lengths is not None, "plan": plan}
    return torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::Recurrence",
        (input, *state, *weights, *([] if lengths is None else [lengths])),
        {name: int(value) if isinstance(value, bool) else value for name, value in attributes.items()},
        dtypes=[input.dtype] * len(shapes),
        shapes=shapes,
        version=1,
        metadata_props={LAYER: place} if named else None,
    )
