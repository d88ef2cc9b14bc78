"""Unrolling as a pass among others, for pipelines of `onnx_ir`."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

from unroll.core.limits import limited
from unroll.core.options import Steps, Where, read_where
from unroll.core.plan import Plan, Preset
from unroll.onnx.rewrite import recurrent_nodes, unroll_ir


class UnrollPass(InPlacePass):
    """Puts plain operators in the place of the recurrent nodes of an `onnx_ir.Model`, in place.

    Args:
        where: which nodes, by name.
        plan: how the steps are laid out; `"onnxruntime"` by default.
        steps: the number of time steps where the model leaves it open, for all nodes or by name.
        limit: the most steps of a layer that are written out, as for `unroll.unroll`.

    Raises:
        UnrollError: when it is called, for every node that cannot be unrolled.

    Example:
        >>> import onnx_ir as ir
        >>> from onnx_ir.passes import Sequential, common
        >>> pipeline = Sequential(UnrollPass(plan="time=8"), common.RemoveUnusedNodesPass())
        >>> pipeline(ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)).modified
        False
    """

    def __init__(
        self,
        *,
        where: Where = None,
        plan: Plan | Preset | None = None,
        steps: Steps = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        self.where, self.steps, self.limit = read_where(where), steps, limit
        self.plan = None if plan is None else Plan.of(plan)

    def call(self, model: ir.Model) -> PassResult:
        before = sum(1 for _ in recurrent_nodes(model))
        if before:
            with limited(self.limit):
                unroll_ir(model, where=self.where, plan=self.plan, steps=self.steps)
        return PassResult(model, before > sum(1 for _ in recurrent_nodes(model)))
