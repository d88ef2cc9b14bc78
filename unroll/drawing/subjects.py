"""The recurrent layers of a model that is to be drawn, with their plans and numbers of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from unroll.core.errors import Problem, Problems, UnrollError
from unroll.core.options import Steps, Where, chooses
from unroll.core.plan import Plan
from unroll.core.presets import Situation
from unroll.core.recurrence import Recurrence, read_module
from unroll.core.signatures import no_model
from unroll.extras import is_onnx, require
from unroll.modules.find import find
from unroll.modules.layers import Unrolled

STEPS = 3
"""Steps that are drawn where nothing tells their number"""


class Subject(NamedTuple):
    """A layer to be drawn."""

    name: str
    recurrence: Recurrence
    plan: Plan
    steps: int
    is_open: bool
    """True if the number of steps is one of many"""


def read_subjects(model: Any, where: Where, plan: Plan | None, steps: int | None) -> list[Subject]:
    """Return the layers of a module or of an ONNX model.

    Raises:
        UnrollError: for anything else, a model without recurrent layers, or a plan that cannot be honoured.
    """
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UnrollError(Problem(f"draw(steps={steps!r})", "is no number of steps", "give a whole number above zero"))
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        found = list(_of_module(model, where, plan, steps))
    elif is_onnx(model):
        found = list(_of_file(model, where, plan, steps))
    else:
        raise UnrollError(no_model("draw(model)", model, "an nn.Module, an ONNX model or the path of one"))
    if not found:
        fix = "draw the model as it was before it was unrolled"
        raise UnrollError(Problem("draw(model)", "has no recurrent layer", fix))
    return found


def _of_module(model: nn.Module, where: Where, plan: Plan | None, steps: int | None) -> Iterator[Subject]:
    fused = {id(layer): names[0] for names, layer in find(model, where)}
    problems = Problems()
    for name, layer in model.named_modules():
        unrolled = isinstance(layer, Unrolled) and chooses(where, [name], layer)
        if unrolled and plan is not None:
            fix = "leave plan= out, or draw the model as it was before"
            problems.add(name or "draw(model)", f"is unrolled already, by the plan {layer.plan}", fix)
    problems.check()
    for name, layer in model.named_modules():
        if isinstance(layer, Unrolled) and chooses(where, [name], layer):
            recurrence, own = layer.recurrence, layer.plan
        elif id(layer) in fused:
            name, recurrence, own = fused.pop(id(layer)), read_module(layer), plan or Plan()
        else:
            continue
        count = 1 if recurrence.is_cell else steps or STEPS
        yield Subject(name, recurrence, own.resolve(Situation(recurrence, steps)), count, not recurrence.is_cell)


def _of_file(model: Any, where: Where, plan: Plan | None, steps: Steps) -> Iterator[Subject]:
    require("onnx", "onnx_ir")
    from unroll.onnx.reading import read_model
    from unroll.onnx.rewrite import PLAN, read_calls

    calls, problems = read_calls(read_model(model, "draw(model)"), where, steps)
    problems.check()
    for call in calls:
        own = (call.plan or plan or PLAN).resolve(call.situation())
        if call.steps is None and own.block is None:
            own = Plan.of(f"{own},time=1") if str(own) != "default" else Plan(time=1)
        yield Subject(call.name, call.recurrence, own, call.steps or STEPS, call.steps is None)
