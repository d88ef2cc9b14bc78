"""The one public function, which finds the frontend for what it is given."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack, overload

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from unroll.core.errors import Problem, Problems, UnrollError, UnrollWarning
from unroll.core.limits import limited
from unroll.core.options import Rules, Steps, Where, read_where
from unroll.core.plan import Plan, Preset
from unroll.core.signatures import no_model, told
from unroll.extras import is_onnx, require
from unroll.graphs import programs
from unroll.graphs.forwards import functional_calls
from unroll.graphs.rewrite import unroll_graph
from unroll.modules.find import find, walk_objects
from unroll.modules.layers import Unrolled
from unroll.modules.replace import replace
from unroll.torchscript.rewrite import unroll_script

if TYPE_CHECKING:
    import onnx_ir as ir


class Options(TypedDict, total=False):
    """The options of `unroll`, for its types."""

    where: Where
    rules: Rules | None
    plan: Plan | Preset | None
    steps: Steps
    freeze: bool
    limit: int | None


Model = TypeVar("Model")


@overload
def unroll(model: fx.GraphModule, args: Any = None, **options: Unpack[Options]) -> fx.GraphModule: ...
@overload
def unroll(model: torch.jit.ScriptModule, args: Any = None, **options: Unpack[Options]) -> torch.jit.ScriptModule: ...
@overload
def unroll(model: nn.Module, args: Any = None, **options: Unpack[Options]) -> nn.Module: ...
@overload
def unroll(model: str | os.PathLike[str], args: Any = None, **options: Unpack[Options]) -> ir.Model: ...
@overload
def unroll(model: Model, args: Any = None, **options: Unpack[Options]) -> Model: ...


@told
def unroll(
    model: Any,
    args: Any = None,
    *,
    where: Where = None,
    rules: Rules | None = None,
    plan: Plan | Preset | None = None,
    steps: Steps = None,
    freeze: bool = False,
    limit: int | None = None,
) -> Any:
    """Replace the recurrent layers of a model by explicit unrolled operations.

    The result is of the same kind as the model, computes the same, and shares every parameter with it; the
    model itself is not changed. Whatever cannot be honoured is refused, all of it at once.

    Args:
        model: an `nn.Module` (also a single layer), a `torch.fx.GraphModule`, a
            `torch.export.ExportedProgram`, a `torch.jit.ScriptModule`, or an ONNX model: an `onnx.ModelProto`, an
            `onnx_ir.Model`, or the path of a file, which is read as an `onnx_ir.Model`.
        args: for a graph, example inputs, from which the number of time steps is read where the graph's
            metadata does not tell it.
        where: which layers: a name or shell pattern such as `"encoder.*"`, several of them, or a function
            of name and layer; all by default. Where a model has no module for a layer any more, the function
            is given what it has: a node of the graph, or a part of the ScriptModule.
        rules: for classes of your own that cannot be unrolled as they are, a function from the layer to
            a module that does the same and can.
        plan: how the steps are laid out, a `Plan` or the name of one, `"inductor"`; for an ONNX model,
            `"onnxruntime"` if not given. Layers that are unrolled already keep theirs, unless `where` picks them or
            there are no others.
        steps: for a graph, the number of time steps, for all layers or by layer name. An ONNX model that leaves
            it open, and a ScriptModule, need none: their steps then run in a loop.
        freeze: for inference with a module or graph module: whether weights are laid out for the steps once, now,
            and held as buffers that nothing else shares, in place of the layers' parameters and parametrizations.
            Gradients of inputs, and dropout in training mode, are as ever. It settles the dtype: convert first. A
            module that is converted later raises an `UnrollError` when it runs, a graph module an `AssertionError`.
        limit: the most steps of a layer that are written out, 20,000 if not given; more are refused. A module runs at
            any length, and is held to it where a graph is made of a run: by `torch.export`, `torch.compile`,
            `torch.jit.trace`, `make_fx`.

    Returns:
        A module of `unroll.Unrolled` layers for a module, a graph module without them for a graph module.

    Raises:
        UnrollError: with every layer that cannot be unrolled, why, and what to do.

    Warns:
        UnrollWarning: if a module holds no recurrent layer, unrolled or not, and for each module whose `forward` calls
            `torch.lstm`, `torch.gru_cell` or their kin itself; both only without `where`.

    Example:
        >>> model = nn.Sequential(nn.LSTM(3, 5, num_layers=2, bidirectional=True))
        >>> x = torch.randn(7, 2, 3)
        >>> torch.allclose(model(x)[0], unroll(model)(x)[0], atol=1e-6)
        True
    """
    if not isinstance(freeze, bool):
        raise UnrollError(Problem(f"unroll(freeze={freeze!r})", "is neither True nor False", "give one of them"))
    where = read_where(where)
    plan = plan if plan is None else Plan.of(plan)
    with limited(limit):
        return _unrolled(model, args, where, rules, plan, steps, freeze, limit)


def _unrolled(
    model: Any,
    args: Any,
    where: Where,
    rules: Rules | None,
    plan: Plan | None,
    steps: Steps,
    freeze: bool,
    limit: int | None,
) -> Any:
    """Call the frontend for a model; refuse what it has no use for."""
    if is_onnx(model):
        _refuse("an ONNX model, which has no Python classes and needs no example", args=args, rules=rules)
        _refuse_freeze(freeze, "an ONNX model", "leave freeze out: constants are always folded there")
        return _onnx(model, where, plan, steps)
    if isinstance(model, ExportedProgram):
        _refuse("an ExportedProgram, which has them in its metadata", args=args, steps=steps)
        _refuse("an ExportedProgram, which has no modules any more", rules=rules)
        _refuse_freeze(freeze, "an ExportedProgram", "export what unroll(module, freeze=True) returns")
        return programs.unroll_program(model, where=where, plan=Plan.of(plan))
    if isinstance(model, fx.GraphModule):
        return unroll_graph(model, args, where=where, rules=rules, plan=plan, steps=steps, freeze=freeze)
    if isinstance(model, torch.jit.ScriptModule):
        _refuse("a ScriptModule, which has no Python classes any more", rules=rules)
        _refuse_freeze(freeze, "a ScriptModule", "leave freeze out, and use torch.jit.freeze")
        return unroll_script(model, args, where=where, plan=Plan.of(plan), steps=steps)
    if isinstance(model, nn.Module):
        _refuse("a module, which runs at any length", args=args, steps=steps)
        unrolled = replace(model, plan, where, rules, freeze=freeze, limit=limit)
        if where is None:
            _warn_of_the_rest(model, unrolled, rules)
        return unrolled
    kinds = "an nn.Module, a GraphModule, an ExportedProgram, a ScriptModule or an ONNX model"
    raise UnrollError(no_model("unroll(model)", model, kinds))


def _warn_of_the_rest(model: nn.Module, unrolled: nn.Module, rules: Rules | None) -> None:
    """Warn of functions that are called in place of layers, and if there is nothing that was unrolled."""
    calls = functional_calls(model)
    for name, function in calls.items():
        place = f"{name or type(model).__name__}.forward"
        fix = "call unroll on a graph of the model: unroll.trace, torch.export or torch.jit.script"
        _warn(f"{place}: calls {function}, which stays as it is in a module; {fix}")
    explicit = (Unrolled, nn.RNNBase, nn.RNNCellBase)  # torch's own would have been replaced
    done = any(isinstance(value, explicit) for _, value in walk_objects(unrolled))
    if not (calls or done or find(model, None, rules)):
        fix = "if it calls functions such as torch.lstm, give a graph of it: unroll.trace or torch.export"
        _warn(f"{type(model).__name__}: has no recurrent layer, and nothing was unrolled; {fix}")


def _warn(text: str) -> None:
    warnings.warn(text, UnrollWarning, stacklevel=6)


def _onnx(model: Any, where: Where, plan: Plan | None, steps: Steps) -> Any:
    require("onnx", "onnx_ir")
    from unroll.onnx.rewrite import unroll_model

    return unroll_model(model, where=where, plan=plan, steps=steps)


def _refuse_freeze(freeze: bool, what: str, fix: str) -> None:
    if freeze:
        raise UnrollError(Problem("unroll(freeze=True)", f"was given for {what}", fix))


def _refuse(what: str, **given: Any) -> None:
    """Refuse arguments that mean nothing here and are not None: none is ignored."""
    problems = Problems(
        Problem(f"unroll({name}=...)", f"was given for {what}", f"leave {name} out")
        for name, value in given.items()
        if value is not None
    )
    problems.check()
