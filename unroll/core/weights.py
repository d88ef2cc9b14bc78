"""The weights of a layer: as torch holds them, and laid out for the products of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

Tensorlike = Any
"""A tensor, or anything with `__torch_function__` that stands for one."""


class Weights(NamedTuple):
    """The parameters of one layer in one direction, as torch holds them: rows stacked by gate."""

    w_ih: Tensorlike
    """`[gates * H, F]`"""
    w_hh: Tensorlike
    """`[gates * H, H]`, or `[gates * H, P]` with a projection"""
    b_ih: Tensorlike | None = None
    """`[gates * H]`"""
    b_hh: Tensorlike | None = None
    """`[gates * H]`"""
    w_hr: Tensorlike | None = None
    """`[P, H]`, the projection of an LSTM with `proj_size`"""
    peephole: Tensorlike | None = None
    """`[3 * H]`, what `c` adds to the input, forget and output gates of an ONNX LSTM, or None"""


class Affine(NamedTuple):
    """The map `x @ weight + bias`; None stands for an `x` of zeros."""

    weight: Tensorlike
    """`[in, out]`, or stacked `[n, in, out]`; for `linear` `[out, in]`, for `sums` that or stacked `[n, 1, out, in]`"""
    bias: Tensorlike | None = None
    """`[out]`, or stacked `[n, 1, out]`, or None"""
    stacked: bool = False
    """True if there are `n` maps, for an `x` of `[n, B, in]`"""
    form: str = "matrix"
    """The way in which the product is written, a choice of `Plan.products`"""
    linear: Callable[..., Tensorlike] = functional.linear
    """What `linear` calls with `x`, weight and bias"""

    def __call__(self, x: Tensorlike | None) -> Tensorlike | None:
        if x is None:
            return self.bias
        if self.form == "linear":
            return self.linear(x, self.weight, self.bias)
        return self.times(x) if self.bias is None else self.onto(self.bias, x)

    def times(self, x: Tensorlike) -> Tensorlike:
        """Return `x @ weight`."""
        if self.form == "sums":
            # [B, 1, in] * [out, in], summed over `in`
            product = torch.sum(torch.mul(torch.unsqueeze(x, -2), self.weight), [-1])
            # Autocast, which makes an operator's result as narrow as its weights, knows nothing of this.
            widened = isinstance(product, torch.Tensor) and product.dtype != self.weight.dtype
            return product.to(self.weight.dtype) if widened else product
        return torch.bmm(x, self.weight) if self.stacked else torch.matmul(x, self.weight)

    def onto(self, y: Tensorlike, x: Tensorlike | None) -> Tensorlike:
        """Return `y + x @ weight`; `linear` adds its bias too."""
        if self.form == "linear":
            product = self(x)
            return y if product is None else torch.add(y, product)
        if x is None:
            return y
        if self.form == "sums":
            return torch.add(y, self.times(x))
        return torch.baddbmm(y, x, self.weight) if self.stacked else torch.addmm(y, x, self.weight)


class Precision(NamedTuple):
    """For float16 and bfloat16, a type of products and `h`, and a wider one of gates and `c`, as in fused kernels."""

    products: torch.dtype
    gates: torch.dtype


class Variant(NamedTuple):
    """The ways in which a step of the ONNX standard departs from torch's."""

    activations: tuple[Callable[[Tensorlike], Tensorlike], ...] = ()
    """Functions, in standard order: f of sigmoid gates, g of the candidate, h of an LSTM's `c`; empty for torch's."""
    clip: float | None = None
    """The limit of what a gate's activation is applied to, `[-clip, clip]`; `c` has none, as in ONNX Runtime."""
    coupled: bool = False
    """True if an LSTM's forget gate is one minus its input gate (`input_forget`)."""


class StepWeights(NamedTuple):
    """The parameters of one layer in one direction, as a step wants them: one product after another."""

    inputs: tuple[Affine, ...]
    """The maps applied to all time steps at once; step `t` gets one `x` from each."""
    hidden: tuple[Affine, ...]
    """The maps applied to `h` in every step. A bias here is one that must not be added to `x` instead."""
    projection: Affine | None
    """The map from `H` to `P` features, or None"""
    hidden_size: int
    precision: Precision | None = None
    peephole: tuple[Tensorlike, ...] | None = None
    """`[H]` for each of the input, forget and output gates, or None"""
    variant: Variant | None = None
    fuses: bool = False
    """True if what a product is added to is left to the kernel that comes after it; see `Target.fuses`"""

    apart: bool = False
    """True if products read a copy of an `h` that gates read too; see `factor`"""

    def for_one_kernel(self) -> StepWeights:
        """Return the same for steps whose gates are one kernel of Inductor's on a GPU; see `Target.fuses`.

        What such a kernel reads it cuts for nothing: there is one product with `x` where there is one with `h`.
        """
        inputs = _side_by_side(self.inputs) if len(self.hidden) == 1 else self.inputs
        into_mm = any(m.bias is None and m.form != "sums" and not m.stacked for m in self.hidden)
        return self._replace(inputs=inputs, fuses=True, apart=into_mm)

    def activations(
        self, *standard: Callable[[Tensorlike], Tensorlike]
    ) -> tuple[Callable[[Tensorlike], Tensorlike], ...]:
        """Return the activations of a step, given torch's."""
        if self.variant is None:
            return standard
        chosen, clip = self.variant.activations or standard, self.variant.clip
        if clip is None:
            return chosen
        # f and g alone: h, of an LSTM's c, is not clipped
        clipped = ((lambda x, f=f, clip=clip: f(torch.clamp(x, -clip, clip))) for f in chosen[:2])
        return *clipped, *chosen[2:]

    def looking(self, peephole: Tensorlike | None) -> StepWeights:
        """Return the same with peepholes, `[3 * H]`, if there are any."""
        return self if peephole is None else self._replace(peephole=tuple(torch.chunk(self.widen(peephole), 3)))

    def onto(self, x: Tensorlike, product: Affine, h: Tensorlike | None) -> Tensorlike:
        """Return `x` and the product with `h`, for the gates to work on."""
        if self.fuses and h is not None:
            return torch.add(self.widen(x), self.widen(product(h)))
        return self.widen(product.onto(x, h))

    def project(self, product: Affine, x: Tensorlike | None) -> Tensorlike | None:
        """Return a product that is added to nothing else, its bias included."""
        if self.fuses and product.stacked and product.bias is not None and x is not None:
            return torch.add(product.times(x), product.bias)
        return product(x)

    def factor(self, h: Tensorlike | None) -> Tensorlike | None:
        """Return what products read in the place of an `h` that gates read too.

        Inductor has what its `mm` reads in memory of its own, and copies it to the outputs: in the kernel of that step
        or, where it is near, of the next one, which reads `h` too, so that both kinds are compiled. Of a copy for `mm`
        alone the kernel is that of the step, and `h` lies in the outputs. `-(-h)` is a copy that no pass leaves out.
        """
        return torch.neg(torch.neg(h)) if self.apart and h is not None else h

    def widen(self, value: Tensorlike) -> Tensorlike:
        """Convert a result of products, for the gates to work on."""
        return value if self.precision is None else value.to(self.precision.gates)

    def narrow(self, value: Tensorlike) -> Tensorlike:
        """Convert a result of gates, for products to work on."""
        return value if self.precision is None else value.to(self.precision.products)


def _side_by_side(maps: tuple[Affine, ...]) -> tuple[Affine, ...]:
    """Return one map in the place of several, of all their outputs; all of them have a bias, or none has."""
    if len(maps) < 2 or maps[0].form != "matrix":
        return maps
    biases = [m.bias for m in maps if m.bias is not None]
    bias = torch.cat(biases, -1) if biases else None
    return (maps[0]._replace(weight=torch.cat([m.weight for m in maps], -1), bias=bias),)


def stack(passes: Sequence[StepWeights]) -> StepWeights:
    """Stack the parameters of passes of one kind, for steps on states `[n, B, size]`."""

    def of(maps: Sequence[Affine]) -> Affine:
        return _stacked(maps, torch.stack([m.weight for m in maps]))

    first = passes[0]
    projection, peephole = first.projection, first.peephole
    if projection is not None:
        projection = of([p.projection for p in passes if p.projection is not None])
    if peephole is not None:
        gates = zip(*(p.peephole or () for p in passes), strict=True)
        peephole = tuple(torch.stack([torch.reshape(weight, (1, -1)) for weight in gate]) for gate in gates)
    return first._replace(
        inputs=tuple(map(of, zip(*(p.inputs for p in passes), strict=True))),
        hidden=tuple(map(of, zip(*(p.hidden for p in passes), strict=True))),
        projection=projection,
        peephole=peephole,
    )


def stack_layers(layers: Sequence[StepWeights]) -> StepWeights:
    """Stack the parameters of layers, each above the other, like `stack`.

    The inputs are those of all but the first: its input is known before the steps.
    """
    count, above = len(layers), layers[1:]
    maps = [m for several in (*(p.hidden for p in layers), *(p.inputs for p in above)) for m in several]
    weights = [m.weight for m in maps]
    stacked = stack([p._replace(inputs=()) for p in layers])._replace(inputs=stack(above).inputs)
    alike = all(isinstance(w, torch.Tensor) and w.shape == weights[0].shape for w in weights)
    if not alike or len(maps) != 2 * count - 1 or maps[0].form != "matrix":
        return stacked
    # in one piece, which one kernel of a compiler lays out
    hidden, inputs = torch.split(torch.stack(weights), [count, count - 1])
    return stacked._replace(hidden=(_stacked(maps[:count], hidden),), inputs=(_stacked(maps[count:], inputs),))


def _stacked(maps: Sequence[Affine], weight: Tensorlike) -> Affine:
    """Return one map of several, given their weights in one."""
    biases = [torch.reshape(m.bias, (1, -1)) for m in maps if m.bias is not None]
    weight = torch.unsqueeze(weight, 1) if maps[0].form == "sums" else weight
    return Affine(weight, torch.stack(biases) if biases else None, True, maps[0].form)
