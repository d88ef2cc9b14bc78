"""Sequences, states and lengths of a model that may come with different numbers of rows."""

from __future__ import annotations

import onnx_ir as ir

from unroll.onnx.calls import Call
from unroll.onnx.constants import is_zero, known_tensor
from unroll.onnx.layers import LayerCall
from unroll.onnx.origins import origin


class Batches:
    """All that is known, before a model runs, of the rows of its values.

    Of a model that came through `torch.export`, all sizes follow from those of its inputs: values of a single open
    input fit together, and those of two once a call has counted rows of both.

    Args:
        graph: of the model, before anything in it is replaced.
        fixed: whether no input of the model leaves a size open.
    """

    def __init__(self, graph: ir.Graph, fixed: bool) -> None:
        self.graph = graph
        self.fixed = fixed
        self.open = frozenset(v for v in graph.inputs if v.shape is None or not v.shape.is_static())
        # Disjoint groups of open inputs: those of one group fit together.
        self.fitting = [frozenset([value]) for value in self.open]
        # Of each value, the open inputs that it is computed from; a node that holds graphs may read any.
        self.sources = {value: self.open & {value} for value in graph.inputs}
        for node in graph:
            holds_graphs = any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
            read = [self.open] if holds_graphs else [self._open_inputs(value) for value in node.inputs if value]
            self.sources |= dict.fromkeys(node.outputs, frozenset[ir.Value]().union(*read))

    def trusts(self, value: ir.Value) -> bool:
        """Tell whether the sizes that are known of a value are checked in a run."""
        return self.fixed or value in self.graph.inputs or known_tensor(value) is not None

    def uncounted(self, call: Call) -> list[ir.Value]:
        """Return the states and lengths of a call whose rows must be counted when the model runs.

        Calls are to be asked about in the order in which they run.
        """
        if call.batch is None:
            return []
        shape = call.shape(call.given)
        count = shape[call.batch] if shape else None
        # Known sizes of a layer were compared when it was captured, those of a standard node when it was read.
        if isinstance(call, LayerCall):
            return [] if count is not None else [value for value in call.rows if not self._fit(call, value)]
        rows = [value for value in call.rows if not self._are_fitting_zeros(call, value)]
        if count is None or not self.trusts(call.given):
            return rows
        return [value for value in rows if None in (call.shape(value) or [None]) or not self.trusts(value)]

    def _are_fitting_zeros(self, call: Call, value: ir.Value) -> bool:
        """Tell whether a state of a standard node is zeros whose rows come from where those of the sequence do."""
        shape, axis = call.shape(call.given), call.batch
        if axis is None or not is_zero(value):
            return False
        known = shape[axis] if shape and self.trusts(call.given) else None
        wanted = origin(call.given, axis) if known is None else known
        return wanted is not None and origin(value, 0 if call.recurrence.batch_first else 1) == wanted

    def _fit(self, call: LayerCall, value: ir.Value) -> bool:
        """Tell whether a value is known to have as many rows as its call's sequence; after the call it is known."""
        used = self._open_inputs(call.given), self._open_inputs(value)
        if any(used[0] | used[1] <= group for group in self.fitting):
            return True
        joined = {next((group for group in self.fitting if names and names <= group), None) for names in used}
        if None not in joined and call.node.graph is self.graph:  # a branch may not run
            self.fitting = [
                *(group for group in self.fitting if group not in joined),
                frozenset[ir.Value]().union(*(group for group in joined if group)),
            ]
        return False

    def _open_inputs(self, value: ir.Value) -> frozenset[ir.Value]:
        """Return the inputs with open sizes that a value is computed from; all if that cannot be told."""
        return frozenset() if value.is_initializer() else self.sources.get(value, self.open)
