"""Plans by name, as a benchmark is asked for them and as its tables show them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from unroll import plan as plans
from unroll.plan import Plan
from unroll.recurrence import Problem, UnrollError

PRESETS: dict[str, Plan] = {"default": Plan(), **getattr(plans, "PRESETS", {})}


def named_plan(name: str) -> Plan:
    """The plan of a preset's name, or of fields and values such as `gates=paired,directions=stacked`.

    Raises:
        UnrollError: if it is neither.

    Example:
        >>> named_plan("gates=split").gates
        'split'
    """
    if name in PRESETS:
        return PRESETS[name]
    known = [field.name for field in fields(Plan)]
    given: dict[str, Any] = {}
    for part in name.split(","):
        field, equals, value = part.partition("=")
        if not equals or field not in known:
            mend = (
                f"give {', '.join(PRESETS)}, or fields and values such as gates=paired; fields are {', '.join(known)}"
            )
            raise UnrollError(Problem(f"plan {name!r}", "is no plan", mend))
        given[field] = int(value) if value.isdigit() else value
    return Plan(**given)


def plan_name(plan: Plan) -> str:
    """How tables show a plan: what it has that others have not.

    Example:
        >>> plan_name(Plan()), plan_name(Plan(gates="paired"))
        ('default', 'gates=paired')
    """
    chosen = [f"{f.name}={getattr(plan, f.name)}" for f in fields(plan) if getattr(plan, f.name) != f.default]
    return ",".join(chosen) or "default"
