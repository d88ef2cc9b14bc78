"""The pass on TorchScript: explicit gate operations where recurrent operators were called.

Every method of every submodule is rewritten where it stands, so that control flow, `train()` and `eval()`,
parameters and the names of submodules stay as they were.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unroll.core.arguments import as_args
from unroll.core.errors import Problem, UnrollError
from unroll.core.limits import check_written
from unroll.core.options import Steps, Where, chooses, unknown_names, unknown_steps
from unroll.core.patching import seeded, without_gc
from unroll.core.plan import Plan
from unroll.core.presets import Situation
from unroll.core.recurrence import CLASS_NAMES
from unroll.torchscript.calls import Observed, ScriptCall, calls_recurrent_function, find_calls
from unroll.torchscript.checks import compiled, quiet
from unroll.torchscript.lowering import lower, observe
from unroll.torchscript.operators import SCRIPT_KINDS, count_recurrent, methods, walk


def unroll_script(module: Any, args: Any = None, *, where: Where = None, plan: Plan, steps: Steps = None) -> Any:
    """Return a copy of the script module with explicit gate operations in place of recurrent operators.

    The copy is what saving and loading would give, but shares its tensors with the original: parameters, buffers
    and lists of them. Without `args` and `steps` a loop of TorchScript runs over the time steps, any number of them;
    otherwise every step is written, or the loop that the plan asks for, and another number is refused when it comes.

    A layer is called by the path of its module; where a module calls an operator itself, or was frozen, by the
    operator's name after the path, such as `encoder.lstm` or, for the next one, `encoder.lstm_2`.

    Under `torch.autocast` the products are cast and the rest is promoted, operator by operator, so that results may
    be float32 where torch casts a layer as a whole.

    Raises:
        UnrollError: with everything that cannot be honoured.
    """
    copied = _prepared_copy(module)
    _share(module, copied)
    calls = find_calls(copied)
    picked = _picked(where, calls, copied)
    plan.refuse_training("plan=...")
    noted = None if args is None else _run_and_observe(copied, args)
    stepping = [calls[number] for number in picked if not calls[number].is_cell]
    jobs: list[Any] = []  # all are read, and all problems found, before anything is rewritten
    problems = unknown_steps(steps, (name for call in stepping for name in call.instances))
    for number in picked:
        call, seen = calls[number], None if noted is None else noted.get(number, [])
        with problems:
            count = call.steps(steps, seen)
            recurrence, weights = call.read(seen)
            at = Situation(recurrence, count, None, call.packed, weights[0].device.type, "torchscript")
            own = plan.resolve(at)
            if not call.is_cell:
                check_written(call.name, count, own.block)
            jobs.append((call, recurrence, weights, count, own))
    problems.check()
    with without_gc():
        for job in jobs:
            lower(*job)
        # several calls may stand in one graph
        for graph in {id(call.graph): call.graph for call, *_ in jobs}.values():
            torch._C._jit_pass_dce_graph(graph)
            torch._C._jit_pass_constant_pooling(graph)  # pyright: ignore[reportAttributeAccessIssue]
            torch._C._jit_pass_lint(graph)
        left = sum(count_recurrent(graph) for _, _, graph in methods(copied))
    if left != len(calls) - len(picked):
        raise UnrollError(Problem(module.original_name, "is still recurrent in the copy", "report this model"))
    return copied


def _picked(where: Where, calls: Sequence[ScriptCall], root: Any) -> list[int]:
    """Return the numbers of the calls that are to be replaced."""
    names = [name for call in calls for name in call.instances]
    done = [name for name, module in root.named_modules() if module.original_name in CLASS_NAMES]
    problems = unknown_names(where, list(dict.fromkeys([*names, *done])))
    picked = []
    for number, call in enumerate(calls):
        picks = {chooses(where, [name], instance) for name, instance in call.instances.items()}
        if len(picks) > 1:
            fix = "choose all of them, or freeze the module (torch.jit.freeze)"
            problems.add(call.names, "share one piece of compiled code", fix)
        if True in picks:
            picked.append(number)
    problems.check()
    return picked


def _copy(module: Any) -> Any:
    try:
        with quiet():
            return torch.jit.load(io.BytesIO(module.save_to_buffer()))
    except Exception as error:
        finding = f"cannot be saved and loaded ({str(error).strip().splitlines()[0]})"
        fix = "take out what cannot be saved, such as functions under torch.jit.ignore"
        raise UnrollError(Problem(module.original_name, finding, fix)) from error


def _prepared_copy(module: Any) -> Any:
    """Return a copy in which operators stand in methods, none of them in a function that methods call."""
    copied = _copy(module)
    calling = {
        id(graph): (part, graph)
        for part, _, whole in methods(copied)
        for node, graph in walk(whole)
        if node.kind() == "prim::CallFunction"
    }
    if not calling:
        return copied
    for graph in [graph for part, graph in calling.values() if calls_recurrent_function(part, graph)]:
        torch._C._jit_pass_inline(graph)
    return _copy(copied)  # inlining has compiled what is called; nothing that is to change may be compiled yet


def _share(module: Any, copied: Any) -> None:
    """Give the copy the very tensors of the original."""
    originals = dict(_parts(module._c))
    for path, ours in copied.named_modules(remove_duplicate=False):
        theirs = originals[path]
        for name in ours._concrete_type.get_attributes():
            value = theirs.getattr(name)
            leaves = [leaf for leaf in pytree.tree_leaves(value) if leaf is not None]
            if leaves and all(isinstance(leaf, Tensor) for leaf in leaves):
                ours._c.setattr(name, value)


def _parts(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a module of C++ and those inside of it with their paths; in Python, a frozen one shows none."""
    yield path, module
    for name, part in torch._C.ModuleDict(module).items():
        yield from _parts(part, f"{path}.{name}" if path else name)


_observed: ContextVar[dict[int, list[Observed]]] = ContextVar("noted")


@torch.jit.ignore()
def _observe(number: int, input: Tensor, weights: list[Tensor]) -> None:
    kinds = [torch.empty_like(weight, device="meta") for weight in weights]
    _observed.get().setdefault(number, []).append(Observed(tuple(input.shape), kinds))


_observe.__annotations__ = get_type_hints(
    _observe
)  # TorchScript calls it from compiled code, and does not read strings


def _observing(number: int, input: Tensor, weights: list[Tensor]) -> None:
    _observe(number, input, weights)


def _run_and_observe(module: Any, args: Any) -> dict[int, list[Observed]]:
    """Return what each call, by its number, is given whenever it is reached in a run of the module."""
    copied = _copy(module)
    # a copy has the same code, so that calls have the same numbers
    for number, call in enumerate(find_calls(copied)):
        if call.operator in SCRIPT_KINDS:
            observe(call, compiled(_observing), number)
    found: dict[int, list[Observed]] = {}
    token = _observed.set(found)
    try:
        with torch.no_grad(), seeded():
            copied(*as_args(args))
    except Exception as error:
        finding = f"the module cannot be run on them ({str(error).strip().splitlines()[-1]})"
        raise UnrollError(Problem("args", finding, "give arguments that fit it, or steps=")) from error
    finally:
        _observed.reset(token)
    return found
