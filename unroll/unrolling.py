"""The one public function: finds the frontend for what it is given."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from unroll import graphs, trees
from unroll.graphs import Steps
from unroll.plan import Plan
from unroll.recurrence import Problem, UnrollError
from unroll.trees import Rules, Where


def unroll(
    model: Any,
    args: Any = None,
    *,
    where: Where = None,
    rules: Rules | None = None,
    plan: Plan | None = None,
    steps: Steps = None,
) -> Any:
    plan = plan or Plan()
    if isinstance(model, fx.GraphModule):
        return graphs.unroll_graph(model, args, where=where, rules=rules, plan=plan, steps=steps)
    if isinstance(model, nn.Module):
        if args is not None or steps is not None:
            name = "args" if args is not None else "steps"
            finding = f"{name} was given for a module, which runs at any length"
            raise UnrollError(Problem(f"unroll({name}=...)", finding, f"leave {name} out, or trace the module first"))
        return trees.replace(model, plan, where, rules)
    raise UnrollError(Problem("unroll(model)", f"got {type(model).__name__}", "give an nn.Module or a GraphModule"))
