"""The one public function: finds the frontend for what it is given."""

from __future__ import annotations

from typing import Any

from torch import nn

from unroll import trees
from unroll.plan import Plan
from unroll.trees import Rules, Where


def unroll(model: Any, args: Any = None, *, where: Where = None, rules: Rules | None = None, plan: Plan | None = None) -> Any:
    return trees.replace(model, plan or Plan(), where, rules)
