"""Gradients of a pass with those of its weights as one product at the end, in place of a sum over the steps.

A sum that goes on from step to step is rounded at each in the weight's own type. Here a pass is one function to
autograd: its backward goes over the steps for the gradients of the gates alone, which `torch.func.vjp` takes of the
cell's own step, and keeps them; what weights are given is one product of them with what the weights were multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from unroll.core.cells import CELLS, State
from unroll.core.scan import mask_state
from unroll.core.values import TENSORS
from unroll.core.weights import Affine, Precision, StepWeights


class Form(NamedTuple):
    """A pass without its tensors, in constants alone."""

    mode: str
    hidden_size: int
    types: tuple[torch.dtype, torch.dtype] | None
    """The fields of a `Precision`"""
    products: str
    """The form of its products"""
    stacked: bool
    inputs: int
    """The number of products with the input"""
    biases: tuple[bool, ...]
    """For each product with `h`, True if it has a bias"""
    projected: bool
    reverse: bool
    masked: bool


class Given(NamedTuple):
    """A stand-in for an `Affine` in a step whose products are made already."""

    product: Tensor
    form: str
    stacked: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.product


class Tensors(NamedTuple):
    """The tensors of a pass."""

    xs: list[Tensor]
    """The projected rows of each product, `[T, ..., B, n]`; `...` is of passes that are stacked"""
    start: State
    """The state that it begins with, each `[..., B, size]`"""
    hidden: list[Affine]
    projection: Affine | None
    mask: Tensor | None
    """`[T, ..., B, 1]`, or None"""


class Kept(NamedTuple):
    """The outputs of a pass: all that its backward reads besides its inputs."""

    states: list[Tensor]
    """`h`, and of an LSTM `c`, after each step, `[T, ..., B, size]`"""
    products: list[Tensor]
    """Each product with `h`, `[T, ..., B, n]`"""
    raw: Any
    """What was projected, `[T, ..., B, H]`, or None"""


def run_joined(
    weights: StepWeights,
    xs: Sequence[Tensor],
    start: State,
    mask: Tensor | None,
    mode: str,
    *,
    reverse: bool,
    apply: Callable[..., tuple[Tensor, ...]],
) -> list[Tensor]:
    """Run a pass, or several stacked, so that each weight's gradient is one product.

    Args:
        weights: what the steps multiply by.
        xs: the projected rows, `[T, ..., B, n]` for each product with the input.
        start: the state to begin with, each `[..., B, size]`.
        mask: the rows that have each step, boolean `[T, ..., B, 1]`, or None.
        mode: the cell, of `CELLS`.
        reverse: whether it goes from the last step to the first.
        apply: `Joined.apply`, or what stands for it in a graph.

    Returns:
        The state after each step, each `[T, ..., B, size]`.
    """
    hidden, projection = weights.hidden, weights.projection
    form = (
        mode,
        weights.hidden_size,
        None if weights.precision is None else tuple(weights.precision),
        hidden[0].form,
        hidden[0].stacked,
        len(xs),
        tuple(m.bias is not None for m in hidden),
        projection is not None,
        reverse,
        mask is not None,
    )
    tensors = [*xs, *start]
    for m in hidden:
        tensors += [m.weight] if m.bias is None else [m.weight, m.bias]
    tensors += [] if projection is None else [projection.weight]
    tensors += [] if mask is None else [mask]
    return list(apply(form, *tensors)[: len(start)])


def _read(form: Form, tensors: Sequence[Tensor]) -> Tensors:
    left = list(tensors)
    take = partial(left.pop, 0)
    xs = [take() for _ in range(form.inputs)]
    start = tuple(take() for _ in CELLS[form.mode].states)
    make = partial(Affine, stacked=form.stacked, form=form.products)
    hidden = [make(take(), take() if has else None) for has in form.biases]
    projection = make(take()) if form.projected else None
    return Tensors(xs, start, hidden, projection, take() if form.masked else None)


def _kept(form: Form, outputs: Sequence[Tensor]) -> Kept:
    states, products = len(CELLS[form.mode].states), len(form.biases)
    raw = outputs[-1] if form.projected else None
    return Kept(list(outputs[:states]), list(outputs[states : states + products]), raw)


def _gates(form: Form, x: Sequence[Tensor], state: State, products: Sequence[Tensor]) -> State:
    """Return the state that a step makes of its products, before a projection."""
    precision = None if form.types is None else Precision(*form.types)
    given: Any = tuple(Given(product, form.products) for product in products)
    weights = StepWeights((), given, None, form.hidden_size, precision, fuses=True)
    return CELLS[form.mode].step(tuple(x), state, weights, TENSORS)


def _order(form: Form, steps: int) -> Sequence[int]:
    return range(steps)[::-1] if form.reverse else range(steps)


def _run(form: Form, *given: Tensor) -> tuple[Tensor, ...]:
    """Run the steps; returns the entries of a `Kept`."""
    tensors = _read(form, given)
    steps, state = len(tensors.xs[0]), tensors.start
    kept: list[Any] = [None] * steps
    xs = [x.unbind() for x in tensors.xs]
    for t in _order(form, steps):
        products: list[Any] = [m(state[0]) for m in tensors.hidden]
        raw, *rest = _gates(form, [x[t] for x in xs], state, products)
        new = (raw if tensors.projection is None else tensors.projection(raw), *rest)
        state = new if tensors.mask is None else mask_state(tensors.mask[t], new, state)
        kept[t] = (*state, *products, *([raw] if form.projected else []))
    return tuple(torch.stack(each) for each in zip(*kept, strict=True))


class Joined(Function):
    """A pass; `apply(form, *tensors)` gives the entries of a `Kept`, as all that its backward reads is an output."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _run(Form(*form), *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        form, *tensors = inputs
        ctx.form, ctx.inputs = Form(*form), len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, outputs = saved[: ctx.inputs], saved[ctx.inputs :]
        grads = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(grads, outputs, strict=True))
        found = _pull(ctx.form, _read(ctx.form, given), _kept(ctx.form, outputs), _kept(ctx.form, grads))
        return None, *found, *([None] if ctx.form.masked else [])

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        given = ctx.saved_tensors
        masks = 1 if ctx.form.masked else 0
        numbers, mask = given[: len(given) - masks], given[len(given) - masks :]
        # the transpose of the transpose, as forward mode may not be nested
        outputs, pull, *_ = torch.func.vjp(lambda *numbers: _run(ctx.form, *numbers, *mask), *numbers)
        _, push, *_ = torch.func.vjp(pull, tuple(map(torch.zeros_like, outputs)))
        along = (torch.zeros_like(n) if v is None else v for n, v in zip(numbers, tangents[1:]))
        return push(tuple(along))[0]


def _transposed(product: Affine, grad: Tensor) -> Tensor:
    """Return the gradient of what the weight was multiplied by."""
    weight = product.weight
    if product.form == "sums":
        weight = torch.squeeze(weight, 1) if product.stacked else weight
        return torch.matmul(grad, weight)
    return torch.matmul(grad, weight.mT)


def _weight_gradient(product: Affine, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the weight of all steps, given `[T, ..., B, in]` and `[T, ..., B, out]`."""
    if product.form == "sums":
        found = torch.einsum("t...bi,t...bo->...oi", x, grad)
        return torch.unsqueeze(found, 1) if product.stacked else found
    return torch.einsum("t...bi,t...bo->...io", x, grad)


def _pull(form: Form, tensors: Tensors, kept: Kept, grads: Kept) -> list[Tensor]:
    """Return the gradients of the tensors, in the order of `_read`, without the mask's."""
    steps = len(tensors.xs[0])
    order = _order(form, steps)
    carried: State = tuple(map(torch.zeros_like, tensors.start))
    of_x: list[Any] = [None] * steps
    of_products, of_h = list(of_x), list(of_x)
    for k in reversed(range(steps)):
        t = order[k]
        before = tensors.start if k == 0 else tuple(s[order[k - 1]] for s in kept.states)
        new = tuple(torch.add(g[t], c) for g, c in zip(grads.states, carried, strict=True))
        old = None
        if tensors.mask is not None:
            zeros = tuple(map(torch.zeros_like, new))
            new, old = mask_state(tensors.mask[t], new, zeros), mask_state(tensors.mask[t], zeros, new)
        h, *rest = new
        of_h[t] = h
        if tensors.projection is not None and grads.raw is not None:
            h = torch.add(_transposed(tensors.projection, h), grads.raw[t])
        x, products = [x[t] for x in tensors.xs], [p[t] for p in kept.products]
        _, pull, *_ = torch.func.vjp(partial(_gates, form), x, before, products)
        of_x[t], carried, found = pull((h, *rest))
        of_products[t] = [torch.add(g, of[t]) for g, of in zip(found, grads.products, strict=True)]
        back = sum(_transposed(m, g) for m, g in zip(tensors.hidden, of_products[t], strict=True))
        carried = (torch.add(carried[0], back), *carried[1:])
        if old is not None:
            carried = tuple(map(torch.add, carried, old))
    gates = [torch.stack(each) for each in zip(*of_products, strict=True)]
    return [
        *(torch.stack(each) for each in zip(*of_x, strict=True)),
        *carried,
        *_weight_gradients(form, tensors, kept, gates),
        *([] if tensors.projection is None else [_weight_gradient(tensors.projection, kept.raw, torch.stack(of_h))]),
    ]


def _weight_gradients(form: Form, tensors: Tensors, kept: Kept, gates: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of the weights of products with `h`, and of their biases."""
    first, h = torch.unsqueeze(tensors.start[0], 0), kept.states[0]
    before = torch.cat([h[1:], first] if form.reverse else [first, h[:-1]])
    found = []
    for m, grad in zip(tensors.hidden, gates, strict=True):
        found.append(_weight_gradient(m, before, grad))
        if m.bias is not None:
            # of all steps and rows: [out], or stacked [n, 1, out]
            summed = torch.sum(grad, [0, -2], keepdim=m.stacked)
            found.append(torch.squeeze(summed, 0) if m.stacked else summed)
    return found
