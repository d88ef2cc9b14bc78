"""Gate math: what one step of each recurrent cell computes, and the weights it wants.

Everything here is an ordinary function of tensor-like values and calls a small closed set of torch
functions (`addmm`, `matmul`, `add`, `sub`, `mul`, `sigmoid`, `tanh`, `relu`, `split`, `chunk`, `cat`,
`neg`, `transpose`; for several passes at once `stack`, `baddbmm`, `bmm`; for products by sums `unsqueeze`, `sum`; for
those of `nn.Linear` `linear`), never in place. Given tensors it computes; given values of a graph it writes nodes.

Formulas are those of the PyTorch documentation of `torch.nn.LSTM`, `torch.nn.GRU` and `torch.nn.RNN`. What the
ONNX standard lets vary beyond them is a `Variant`; torch's layers have none, and steps without one write nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from unroll.core.weights import Affine, Precision, StepWeights, Tensorlike, Weights

State = tuple[Tensorlike, ...]
"""`(h,)` or `(h, c)`, each `[B, size]`; an entry is None while it is still the zeros it began with."""

Label = Callable[[Tensorlike, str], Tensorlike]
"""A function that names a value (`label(value, "forget")`) and returns it, or for a state what it is to be."""


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell."""

    gates: tuple[str, ...]
    """The gates, in the order in which torch stacks them in the rows of a weight."""
    sigmoid: tuple[str, ...]
    """Gates under a sigmoid. The last gate is the candidate, under the cell's other activation."""
    states: tuple[str, ...]
    folds: bool
    """True if the candidate's `b_hh` may be added to its `b_ih` (not in a GRU: reset scales it)."""
    step: Callable[[tuple[Tensorlike, ...], State, StepWeights, Label], State]
    """`step(x, state, weights, label) -> state`, for `x` already projected, one `[B, n]` a product."""
    waits: bool = False
    """True if the candidate's product needs the other gates first, so that it cannot be merged with theirs."""

    @property
    def candidate(self) -> str:
        return next(gate for gate in self.gates if gate not in self.sigmoid)

    def products(self, layout: str) -> tuple[tuple[str, ...], ...]:
        """Return the groups of gates that share a product.

        Args:
            layout: `merged`, `paired` (sigmoid gates, candidate), `split`, or `linear`: `merged` in torch's order.
        """
        if layout == "linear" and not self.waits:
            return (self.gates,)
        if layout == "split":
            return tuple((gate,) for gate in (*self.sigmoid, self.candidate))
        pair = (self.sigmoid, (self.candidate,))
        groups = ((*self.sigmoid, self.candidate),) if layout == "merged" and not self.waits else pair
        return tuple(group for group in groups if group)

    def input_products(self, layout: str) -> tuple[tuple[str, ...], ...]:
        """Return the groups of gates that share a product with `x`."""
        if layout == "linear":
            return (self.gates,)
        # The GRU's merged product with h stands apart from x, so that reset can scale the candidate's part of it.
        return self.products(layout if self.folds or layout == "split" else "paired")

    def prepare(
        self,
        weights: Weights,
        layout: str,
        hidden_size: int,
        precision: Precision | None = None,
        *,
        summed: bool = False,
        differentiable: bool = True,
    ) -> StepWeights:
        """Reorder, transpose and add up the parameters once, outside the loop over time.

        With `summed`, what a step multiplies by `h` and by its projection is written as multiplications and sums.
        With `differentiable`, each parameter is given a gradient in memory of its own.
        """
        hidden = self.products(layout)
        if layout == "linear":
            return self._prepare_linear(weights, hidden, hidden_size, precision)
        # Gates whose b_hh is added to the product with h; that of the others is added to x, once for all steps.
        apart = () if self.folds else next(group for group in hidden if self.candidate in group)

        # [gates * H, ...] becomes [H, ...] for each gate
        def by_gate(rows: Tensorlike) -> dict[str, Tensorlike]:
            parts = torch.chunk(rows, len(self.gates)) if len(self.gates) > 1 else (rows,)
            return dict(zip(self.gates, parts, strict=True))

        def maps(
            rows: Tensorlike,
            groups: tuple[tuple[str, ...], ...],
            biases: dict[str, Tensorlike],
            *,
            summed: bool = False,
        ) -> tuple[Affine, ...]:
            rows = by_gate(rows)
            # [in, out] of a group, or summed [out, in]; its gates all have a bias in `biases`, or none has
            return tuple(
                Affine(
                    torch.cat([rows[gate] for gate in group])
                    if summed
                    else torch.cat([torch.transpose(rows[gate], 0, 1) for gate in group], 1),
                    torch.cat([biases[gate] for gate in group]) if group[0] in biases else None,
                    form="sums" if summed else "matrix",
                )
                for group in groups
            )

        x_bias, h_bias = {}, {}
        b_ih, b_hh = weights.b_ih, weights.b_hh
        if b_ih is not None and b_hh is not None:
            # bit for bit the same: of `add`, both biases would be given one tensor as their gradient
            both = torch.sub(b_ih, torch.neg(b_hh)) if differentiable else torch.add(b_ih, b_hh)
            x_bias = by_gate(both)
            if apart:
                x_bias |= {gate: b for gate, b in by_gate(b_ih).items() if gate in apart}
                h_bias = {gate: b for gate, b in by_gate(b_hh).items() if gate in apart}
        projection = weights.w_hr
        if projection is not None:
            form = "sums" if summed else "matrix"
            projection = Affine(projection if summed else torch.transpose(projection, 0, 1), form=form)
        prepared = StepWeights(
            maps(weights.w_ih, self.input_products(layout), x_bias),
            maps(weights.w_hh, hidden, h_bias, summed=summed),
            projection,
            hidden_size,
            precision,
        )
        return prepared.looking(weights.peephole)

    def _prepare_linear(
        self,
        weights: Weights,
        hidden: tuple[tuple[str, ...], ...],
        hidden_size: int,
        precision: Precision | None,
    ) -> StepWeights:
        """Take the parameters as they are; those of `h` are cut in two for a candidate that waits."""
        rows = [len(group) * hidden_size for group in hidden]

        def cut(whole: Tensorlike) -> Sequence[Tensorlike]:
            return [whole] * len(rows) if whole is None else torch.split(whole, rows) if len(rows) > 1 else [whole]

        each = zip(cut(weights.w_hh), cut(weights.b_hh), strict=True)
        return StepWeights(
            (Affine(weights.w_ih, weights.b_ih, form="linear"),),
            tuple(Affine(w, b, form="linear") for w, b in each),
            None if weights.w_hr is None else Affine(weights.w_hr, form="linear"),
            hidden_size,
            precision,
        ).looking(weights.peephole)


def _sigmoid_gates(
    parts: Sequence[Tensorlike],
    names: tuple[str, ...],
    label: Label,
    sigmoid: Callable[[Tensorlike], Tensorlike] = torch.sigmoid,
) -> list[Tensorlike]:
    """Return the gates `names`, out of one pre-activation that holds them all or out of one each."""
    activated = [sigmoid(part) for part in parts]
    gates = activated if len(parts) == len(names) else torch.chunk(activated[0], len(names), -1)
    return [label(gate, name) for gate, name in zip(gates, names, strict=True)]


def _lstm(x: tuple[Tensorlike, ...], state: State, weights: StepWeights, label: Label) -> State:
    h, c = state
    size = weights.hidden_size
    sigmoid, tanh, squash = weights.activations(torch.sigmoid, torch.tanh, torch.tanh)
    pre = [weights.onto(xi, w, h) for xi, w in zip(x, weights.hidden, strict=True)]
    # [B, 4 * H] in torch's order, or merged in that of the products: input, forget, output, candidate
    if weights.hidden[0].form == "linear":
        i, f, g, o = torch.chunk(pre[0], 4, -1)
        pre = [i, f, o, g]
    elif len(pre) == 1:
        pre = torch.split(pre[0], [3 * size, size], -1)
    gates = pre[:-1]
    # with peepholes i and f look at the old c, and o at the new one
    if weights.peephole is None:
        i, f, o = _sigmoid_gates(gates, ("input", "forget", "output"), label, sigmoid)
    else:
        i, f, o = gates if len(gates) == 3 else torch.chunk(gates[0], 3, -1)
        i, f = (
            label(sigmoid(_peek(gate, c, weight)), name)
            for gate, weight, name in zip((i, f), weights.peephole, ("input", "forget"))
        )
    if weights.variant is not None and weights.variant.coupled:
        f = label(torch.sub(1.0, i), "coupled")
    g = label(tanh(pre[-1]), "cell")
    c = torch.mul(i, g) if c is None else torch.add(torch.mul(f, c), torch.mul(i, g))
    c = label(c, "c")
    if weights.peephole is not None:
        o = label(sigmoid(_peek(o, c, weights.peephole[2])), "output")
    h = weights.narrow(torch.mul(o, squash(c)))
    if weights.projection is not None:
        h = weights.projection(h)
    return label(h, "h"), c


def _peek(gate: Tensorlike, c: Tensorlike | None, weight: Tensorlike) -> Tensorlike:
    """Return the pre-activation of a gate that looks at `c`."""
    return gate if c is None else torch.add(gate, torch.mul(c, weight))


def _gru(x: tuple[Tensorlike, ...], state: State, weights: StepWeights, label: Label) -> State:
    (h,) = state
    size = weights.hidden_size
    sigmoid, tanh = weights.activations(torch.sigmoid, torch.tanh)
    *x_sigmoid, x_new = torch.split(x[0], [2 * size, size], -1) if len(x) == 1 else x
    *hidden, last = weights.hidden
    factor = weights.factor(h)
    h_new = weights.project(last, factor)  # reset scales this product, its bias included
    h_new = h_new if h_new is None else weights.widen(h_new)
    if hidden:
        pre = [weights.onto(xi, w, factor) for xi, w in zip(x_sigmoid, hidden, strict=True)]
    else:
        pre = [weights.widen(xi) for xi in x_sigmoid]
    # merged: the product with h is one of all gates, [B, 3 * H]
    if not hidden and h_new is not None:
        h_sigmoid, h_new = torch.split(h_new, [2 * size, size], -1)
        pre = [torch.add(pre[0], h_sigmoid)]
    r, z = _sigmoid_gates(pre, ("reset", "update"), label, sigmoid)
    n = weights.widen(x_new)
    n = n if h_new is None else torch.add(n, torch.mul(r, h_new))
    return _between(label(tanh(n), "new"), z, h, weights, label)


def _gru_resetting_first(x: tuple[Tensorlike, ...], state: State, weights: StepWeights, label: Label) -> State:
    (h,) = state
    sigmoid, tanh = weights.activations(torch.sigmoid, torch.tanh)
    size = weights.hidden_size
    *pre, n = torch.split(x[0], [2 * size, size], -1) if len(x) == 1 else x
    *hidden, last = weights.hidden
    pre = [w.onto(xi, h) for xi, w in zip(pre, hidden, strict=True)]
    r, z = _sigmoid_gates([weights.widen(p) for p in pre], ("reset", "update"), label, sigmoid)
    n = last.onto(n, None if h is None else weights.narrow(torch.mul(r, weights.widen(h))))
    return _between(label(tanh(weights.widen(n)), "new"), z, h, weights, label)


def _between(n: Tensorlike, z: Tensorlike, h: Tensorlike | None, weights: StepWeights, label: Label) -> State:
    """Return the next `h` of a GRU, between its candidate `n` and the last `h`."""
    # (1 - z) * n + z * h
    h = torch.sub(n, torch.mul(z, n)) if h is None else torch.add(n, torch.mul(z, torch.sub(weights.widen(h), n)))
    return (label(weights.narrow(h), "h"),)


def _rnn(activation: Callable[[Tensorlike], Tensorlike]) -> Callable[..., State]:
    # One rounding before the activation and one after: a wider type between them would change nothing.
    def step(x: tuple[Tensorlike, ...], state: State, weights: StepWeights, label: Label) -> State:
        (h,) = state
        (activate,) = weights.activations(activation)
        pre = weights._replace(precision=None).onto(x[0], weights.hidden[0], h)
        return (label(activate(pre), "h"),)

    return step


CELLS = {
    # i = σ(W_ii x + b_ii + W_hi h + b_hi), f and o likewise, g = tanh(W_ig x + b_ig + W_hg h + b_hg),
    # c' = f * c + i * g, h' = o * tanh(c'), and with a projection h' = W_hr (o * tanh(c'))
    "LSTM": Cell(("input", "forget", "cell", "output"), ("input", "forget", "output"), ("h", "c"), True, _lstm),
    # r = σ(W_ir x + b_ir + W_hr h + b_hr), z likewise, n = tanh(W_in x + b_in + r * (W_hn h + b_hn)),
    # h' = (1 - z) * n + z * h, computed as n + z * (h - n)
    "GRU": Cell(("reset", "update", "new"), ("reset", "update"), ("h",), False, _gru),
    # h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu of the same
    "RNN_TANH": Cell(("hidden",), (), ("h",), True, _rnn(torch.tanh)),
    "RNN_RELU": Cell(("hidden",), (), ("h",), True, _rnn(torch.relu)),
}
"""The cells by torch's name of the mode (`nn.RNNBase.mode`)."""

ONNX_CELLS = {
    # As a GRU, but n = tanh(W_in x + b_in + W_hn (r * h) + b_hn): `linear_before_reset` 0, the standard's default
    "GRU_RESETTING_FIRST": Cell(
        ("reset", "update", "new"), ("reset", "update"), ("h",), True, _gru_resetting_first, waits=True
    ),
}
"""The cells that only the ONNX standard has, by names of our own."""
