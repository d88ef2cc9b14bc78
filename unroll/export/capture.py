"""PyTorch models as exported programs in which each recurrent layer is a single node.

Torch's exporter then has nothing to do with the steps, and its cost does not grow with them.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError
from torch.utils import _pytree as pytree

from unroll.core.alone import alone
from unroll.core.arguments import as_args, refuse_nested
from unroll.core.errors import Problem, Problems, UnrollError, innermost, refusing
from unroll.core.options import Rules, Where
from unroll.export.inputs import FAILS, in_order, tensor_leaves
from unroll.export.nodes import CallsAsNodes, call_node, layer_node, packed_node, refuse_packed
from unroll.graphs.functions import FUNCTIONS
from unroll.graphs.programs import refuse_merged
from unroll.modules.flat_weights import reaches_lists
from unroll.modules.layers import STAND_IN
from unroll.modules.replace import replace
from unroll.packed.contexts import keep_padding
from unroll.packed.functions import stop_by_index
from unroll.packed.guard import guard_run

OURS, TORCH = os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__)
"""The folders of this package and of torch"""


class NotCaptured(UnrollError):
    """A model that torch's own exporter cannot follow."""


def origin(error: BaseException) -> str | None:
    """Return the file and line of the model's own code that an error of torch's names or was raised in, if any."""
    named = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    raised = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    # the first frame is that of whoever called the exporter
    found = [(file, line) for file, line in (*raised[1:], *named) if not file.startswith((OURS, TORCH, "<"))]
    return "{}:{}".format(*found[-1]) if found else None


def capture(
    model: nn.Module | ExportedProgram,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    *,
    dynamic_shapes: Any = None,
    where: Where = None,
    rules: Rules | None = None,
) -> ExportedProgram:
    """Return the model as an ExportedProgram in which every recurrent layer is one `unroll::Recurrence` node.

    Raises:
        UnrollError: for layers that cannot be honoured, for a model that changes its buffers, and if
            `torch.export` fails.
    """
    with alone(exports=True):
        program = _captured(model, as_args(args), in_order(model, kwargs), dynamic_shapes, where, rules)
        changed = _changed_buffers(program)
    refuse_changed(changed)
    return program


def refuse_changed(buffers: Iterable[str]) -> None:
    """Refuse buffers that a run of the model changes."""
    finding = "is a buffer that the model changes, and an ONNX file keeps none"
    Problems(Problem(name, finding, "return it instead") for name in buffers).check()


def _changed_buffers(program: ExportedProgram) -> list[str]:
    """Return the names of the buffers that a run changes, which a program tells only of functional operators."""
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
        refuse_merged(model)
        return model.run_decompositions(
            {op: partial(call_node, op) for op in FUNCTIONS if isinstance(op, torch._ops.OpOverload)}
        )
    model, args, kwargs = prepare(model, args, kwargs, where, rules)

    def export(shapes: Any) -> ExportedProgram:
        with layers_as_nodes(model, every=where is None):
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)

    try:
        try:
            return export(dynamic_shapes)
        except Exception as error:
            if not isinstance(innermost(error), ConstraintViolationError) or FIXED.search(str(error)):
                raise
            return export(_within_bounds(dynamic_shapes))
    except UnrollError:
        raise
    except Exception as error:
        if fixed := FIXED.findall(str(error)):
            # with another example the model may be captured
            kind = UnrollError if all(int(size) < 2 for _, size in fixed) else NotCaptured
            raise kind(*(_is_fixed(*found) for found in dict.fromkeys(fixed))) from error
        refuse_arguments(model, args, kwargs, dynamic_shapes)
        cause = innermost(error)
        at = "".join(f" at {place}" for place in [origin(cause)] if place)
        first = next(iter(str(cause).splitlines()), "")
        finding = f"cannot be captured by torch.export{at} ({type(cause).__name__}: {first})"
        fix = "make torch.export.export(model, args, strict=False) work first"
        raise NotCaptured(Problem(type(model).__name__, finding, fix)) from error


def prepare(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], where: Where, rules: Rules | None
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Return what is run for a capture: a copy of the model that shares all tensors, and arguments for it alone.

    Raises:
        UnrollError: for layers that cannot be honoured, and for a model in training mode.
    """
    if model.training:
        finding = "is in training mode, in which an ONNX file cannot run it"
        raise UnrollError(Problem(type(model).__name__, finding, "call model.eval() first"))
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        fix = "load them first: model.to_empty(device='cpu'), then load_state_dict"
        raise UnrollError(Problem(type(model).__name__, "has no weights, only their shapes (device meta)", fix))
    for k, tensor in enumerate(pytree.tree_leaves((args, kwargs))):
        refuse_nested(f"args[{k}]", tensor)
    every = where is None
    model = _apart(model) if rules is None and every else replace(model, None, where, rules)
    if not every and (problems := _left_out(model)):
        raise UnrollError(*problems)
    # Strides mean nothing in a file, and those of a piece of a tensor would fix sizes that are open.
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, (args, kwargs))
    return model, *_each_its_own(args, kwargs)


@contextmanager
def layers_as_nodes(model: nn.Module, *, every: bool) -> Iterator[None]:
    """Let the recurrent layers of a model write single nodes while this lasts: all, or those that are `Unrolled`."""
    with (
        STAND_IN.set(layer_node),
        CallsAsNodes() if every else nullcontext(),
        keep_padding(packed_node if every else refuse_packed, stop_by_index),
        guard_run(model),
    ):
        yield


UNBOUND = Dim("unbound")

FIXED = re.compile(r"marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)")
"""The message of `torch.export` for a size that cannot stay open"""


def _within_bounds(dynamic_shapes: Any) -> Any:
    """Return dynamic shapes whose sizes have the bounds that the model gives them, where none were asked for.

    Behind a strided convolution a length must be some steps long, and `torch.export` refuses a `Dim` of any length.
    """

    def loosened(dim: Any) -> Any:
        return Dim.DYNAMIC if isinstance(dim, Dim) and (dim.min, dim.max) == (UNBOUND.min, UNBOUND.max) else dim

    return pytree.tree_map(loosened, dynamic_shapes)


def refuse_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> None:
    """Refuse open sizes that do not fit the arguments, and arguments that the model itself does not take."""
    if isinstance(model, torch.jit.ScriptModule):
        return
    tensor_leaves(model, args, kwargs, dynamic_shapes)
    with torch.no_grad(), refusing(type(model).__name__, *FAILS):
        model(*args, **kwargs)


def _is_fixed(name: str, size: str) -> Problem:
    if int(size) < 2:
        finding, fix = f"is open, and {size} in the example, which torch.export fixes", "give an example of 2 or more"
    else:
        finding = f"is open, and the model fixes it to {size}"
        fix = "leave it out, open it in every argument that has it, or change what fixes it"
    return Problem(f"dynamic_shapes: {name}", finding, fix)


def _each_its_own(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with a copy of each tensor that is there twice: `torch.export` would make one input of both."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    seen: set[int] = set()
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[k] = leaf.clone() if id(leaf) in seen else leaf
            seen.add(id(leaf))
    return pytree.tree_unflatten(leaves, spec)


def _apart(model: nn.Module) -> nn.Module:
    """Return a copy that shares all tensors, if one can be made.

    While `torch.export` runs a module, its parameters are fake, and what it assigns to itself stays; other threads may
    use the model meanwhile. With other parameters torch's layers forget their list of weights, and `Unrolled` ones not.
    """
    listed = reaches_lists(model)
    try:
        return replace(model, None, lambda name, layer: listed)
    except UnrollError:
        return model


def _left_out(model: nn.Module) -> list[Problem]:
    """Return a problem for each layer that torch's exporter would write, and wrongly."""
    finding = "has proj_size, which torch's exporter writes wrongly, and is not chosen by where="
    return [
        Problem(name, finding, "let where= choose it too")
        for name, module in model.named_modules()
        if isinstance(module, nn.LSTM) and module.proj_size
    ]


def _refuse(given: dict[str, Any], finding: str) -> None:
    problems = Problems(
        Problem(f"export_onnx({name}=...)", finding, f"leave {name} out") for name, value in given.items() if value
    )
    problems.check()
