"""The weights of all passes laid out for the steps, in tensors, values or the names of buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unroll.core.errors import Problem, UnrollError
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence, scope
from unroll.core.values import TENSORS, Target, Writer
from unroll.core.weights import Affine, Precision, StepWeights, Weights, stack, stack_layers


class Layout(NamedTuple):
    """The parameters as the steps want them."""

    passes: list[StepWeights]
    """The weights of each layer and direction"""
    stacks: list[StepWeights]
    """The weights of passes that go together, a step of theirs being one batched product: the directions of each
    layer, or all layers; empty where each goes by itself"""
    widths: tuple[int, ...]
    """The features of what a step reads of the input, for each product"""

    def written_for(self, target: Target) -> Layout:
        """Return the same, its products as the target wants them."""
        if not target.fuses:
            return self
        passes, stacks = ([p.for_one_kernel() for p in several] for several in (self.passes, self.stacks))
        merged = len(passes[0].inputs) < len(self.widths)
        return Layout(passes, stacks, (sum(self.widths),) if merged else self.widths)


def lay_out(
    recurrence: Recurrence,
    weights: Sequence[Weights],
    plan: Plan,
    dtype: torch.dtype | None = None,
    target: Target = TENSORS,
) -> Layout:
    """Lay out the parameters for the steps.

    With float16 or bfloat16 as `dtype`, gates and `c` are computed in float32.

    Raises:
        UnrollError: for a plan that a target to be written cannot honour.
    """
    if isinstance(target, Writer):
        plan.refuse_training(target.layer)
    precision = precision_of(dtype)
    passes = []
    for k, w in enumerate(weights):
        target.enter(scope(recurrence, k))
        prepared = recurrence.cell.prepare(
            w,
            plan.layout,
            recurrence.hidden_size,
            precision,
            summed=plan.products == "sums",
            differentiable=target.differentiable,
        )
        for kind, maps in (("ih", prepared.inputs), ("hh", prepared.hidden)):
            for m in maps:
                target(m.weight, f"weight_{kind}")
                if m.bias is not None:
                    target(m.bias, f"bias_{kind}")
        passes.append(prepared)
    widths = tuple(len(g) * recurrence.hidden_size for g in recurrence.cell.input_products(plan.layout))
    # before they are stacked, so that the weights of a stack can lie in one piece
    laid = Layout(passes, [], widths).written_for(target)
    passes = laid.passes
    # a stack has no `inputs` where these go over all steps at once, before the steps of the stack
    stacks = []
    if plan.directions == "stacked" and recurrence.bidirectional:
        for layer in range(recurrence.num_layers):
            target.enter(f"l{layer}.stacked")
            stacks.append(stack([p._replace(inputs=()) for p in passes[2 * layer : 2 * layer + 2]]))
    elif plan.layers == "wavefront" and not recurrence.bidirectional and recurrence.num_layers > 1:
        target.enter("stacked")
        stacks.append(stack_layers(passes))
    return laid._replace(stacks=stacks)


def precision_of(dtype: torch.dtype | None) -> Precision | None:
    """Return the two types for rows of `dtype`, or None where there is one."""
    return Precision(dtype, torch.float32) if dtype in (torch.float16, torch.bfloat16) else None


class Frozen(NamedTuple):
    """The buffers that hold the weights of a frozen layer, laid out for the steps."""

    layout: Layout
    """The layout, with names of buffers in place of tensors"""
    dtype: torch.dtype
    """The dtype of the parameters that they were made of"""

    @classmethod
    def of(
        cls, recurrence: Recurrence, weights: Sequence[Tensor], plan: Plan, keep: Callable[[str, Tensor], str]
    ) -> Frozen:
        """Lay out weights, and keep the results: `keep` is given a name and a tensor, and returns the buffer's name."""

        def kept(prefix: str, prepared: StepWeights) -> StepWeights:
            # What is only a view of a parameter, such as a transposed projection, would change with it.
            return _mapped(prepared, lambda t, kind: keep(f"{prefix}_{kind}", t.detach().clone()))

        with torch.no_grad():
            layout = lay_out(recurrence, recurrence.weights(weights), plan)
            passes = [kept(scope(recurrence, k).replace(".", "_"), p) for k, p in enumerate(layout.passes)]
            stacks = [kept(f"stack{k}", p) for k, p in enumerate(layout.stacks)]
        return cls(Layout(passes, stacks, layout.widths), weights[0].dtype)

    @classmethod
    def form(cls, recurrence: Recurrence, plan: Plan, dtype: torch.dtype) -> Frozen:
        """Return the same without its tensors, as it follows from the plan."""
        shapes = [torch.empty(shape, device="meta") for shape in recurrence.weight_shapes]
        return cls(lay_out(recurrence, recurrence.weights(shapes), plan), dtype)

    @property
    def first(self) -> str:
        """The name of one of the buffers."""
        return self.layout.passes[0].inputs[0].weight

    @property
    def names(self) -> list[str]:
        """The names of all buffers."""
        found: list[str] = []
        self.mapped(lambda name, kind: found.append(name))
        return found

    def under(self, place: str) -> Frozen:
        """Return the same, named from a module that has the layer at `place`."""
        return self._replace(layout=self.mapped(lambda name, kind: f"{place}.{name}"))

    def read(self, layer: Any, cast: torch.dtype | None, dtype: torch.dtype | None) -> Layout:
        """Return the tensors, for a run of the layer on rows of `dtype`, in which autocast makes weights `cast`.

        Raises:
            UnrollError: for another dtype than that of the parameters: biases were added up in that one.
        """
        held = layer.like.dtype
        found = cast if cast and held == self.dtype else held
        if found != self.dtype:
            finding = f"was frozen in {self.dtype}, and now runs in {found}"
            fix = f"convert what is not frozen by .to({found}), and freeze that; autocast needs layers that are not"
            raise UnrollError(Problem(layer.place, finding, fix))
        return self.mapped(lambda name, kind: getattr(layer, name), dtype)

    def mapped(self, change: Callable[[Any, str], Any], dtype: torch.dtype | None = None) -> Layout:
        """Return the layout with other entries, for rows of `dtype`: `change(name, kind)`, in the order of `names`."""
        precision = precision_of(dtype)
        passes, stacks = (
            [_mapped(p, change)._replace(precision=precision) for p in several]
            for several in (self.layout.passes, self.layout.stacks)
        )
        return Layout(passes, stacks, self.layout.widths)


def _mapped(prepared: StepWeights, change: Callable[[Any, str], Any]) -> StepWeights:
    """Return the same with `change(value, kind)` in place of each value; kinds are such as `weight_hh0`."""

    def of(maps: Iterable[Affine], kind: str) -> tuple[Affine, ...]:
        return tuple(
            m._replace(
                weight=change(m.weight, f"weight_{kind}{k}"),
                bias=None if m.bias is None else change(m.bias, f"bias_{kind}{k}"),
            )
            for k, m in enumerate(maps)
        )

    projection = None if prepared.projection is None else of([prepared.projection], "hr")[0]
    return prepared._replace(inputs=of(prepared.inputs, "ih"), hidden=of(prepared.hidden, "hh"), projection=projection)
