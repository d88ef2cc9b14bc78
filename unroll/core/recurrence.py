"""What a recurrent layer is, apart from its tensors, and how to read it from where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import has_static_value

from unroll.core.cells import CELLS, ONNX_CELLS, Cell, Value, Weights


class Problem(NamedTuple):
    """One reason why something cannot be unrolled or run."""

    place: str
    """Module path, node or argument"""
    finding: str
    mend: str

    def __str__(self) -> str:
        return f"{self.place}: {self.finding}; {self.mend}"


class UnrollError(RuntimeError):
    """Something that cannot be honoured, with every place where it was met.

    Attributes:
        problems: the reasons, each with `place`, `finding` and `mend`.

    Example:
        >>> str(UnrollError(Problem("encoder.rnn", "3 gates found", "give 4")))
        'encoder.rnn: 3 gates found; give 4'
    """

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems  # all that Dynamo can follow; it tells the arguments of what is raised while it traces

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems]
        return lines[0] if len(lines) == 1 else "\n".join([f"{len(lines)} problems", *lines])


@dataclass(frozen=True)
class Recurrence:
    """A recurrent layer without its tensors; the fields are the constructor arguments of `torch.nn.LSTM`.

    `mode` is torch's: `LSTM`, `GRU`, `RNN_TANH` or `RNN_RELU`. A cell (`nn.LSTMCell` ...) is the
    same with `is_cell`: one layer, one direction, one step. Of the ONNX standard's layers, `mode` may also be one
    of `ONNX_CELLS`, and `reverse` says that the only direction is backwards.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    is_cell: bool = False
    reverse: bool = False

    @property
    def cell(self) -> Cell:
        return CELLS[self.mode] if self.mode in CELLS else ONNX_CELLS[self.mode]

    @property
    def directions(self) -> tuple[str, ...]:
        return ("", "reverse") if self.bidirectional else ("reverse",) if self.reverse else ("",)

    @property
    def output_size(self) -> int:
        """Features of `h`, and of the output in one direction."""
        return self.proj_size or self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """Features of each state: of `h`, and for an LSTM of `c`."""
        return (self.output_size, self.hidden_size)[: len(self.cell.states)]

    @property
    def passes(self) -> int:
        """Sweeps over the sequence: layers times directions, the leading size of a state."""
        return self.num_layers * len(self.directions)

    @property
    def weight_names(self) -> list[list[str]]:
        """Names of the parameters in torch's order, a list for each layer and direction."""
        kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * self.bias + ["weight_hr"] * bool(self.proj_size)
        if self.is_cell:
            return [kinds]
        suffixes = ("", "_reverse")[: len(self.directions)]
        return [[f"{kind}_l{layer}{s}" for kind in kinds] for layer in range(self.num_layers) for s in suffixes]

    @property
    def weight_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters, in torch's order."""
        rows, size = len(self.cell.gates) * self.hidden_size, self.output_size
        shapes: list[tuple[int, ...]] = []
        for k in range(self.passes):
            first = k < len(self.directions)
            features = self.input_size if first else len(self.directions) * size
            shapes += [(rows, features), (rows, size)] + [(rows,)] * 2 * self.bias
            shapes += [(size, self.hidden_size)] * bool(self.proj_size)
        return shapes

    def weights(self, flat: Sequence[Value]) -> list[Weights]:
        """Group tensors given in the order of `weight_names` (that of torch's flat weights)."""
        groups, size = [], len(self.weight_names[0])
        for start in range(0, len(flat), size):
            w_ih, w_hh, *rest = flat[start : start + size]
            b_ih, b_hh = rest[:2] if self.bias else (None, None)
            groups.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if self.proj_size else None))
        return groups


LAYERS: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.RNN)
CELL_MODES: dict[type[nn.Module], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: "RNN"}


def read_layer(layer: Any) -> Recurrence:
    """The recurrence of an `nn.LSTM`, `nn.GRU`, `nn.RNN`, or of anything with their attributes.

    Example:
        >>> read_layer(nn.GRU(3, 5, bidirectional=True)).passes
        2
    """
    names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first")
    names += ("dropout", "bidirectional", "proj_size")
    return Recurrence(**{name: getattr(layer, name) for name in names})


def read_cell(layer: Any, mode: str) -> Recurrence:
    """The recurrence of an `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`, given its mode from `CELL_MODES`.

    Example:
        >>> read_cell(nn.GRUCell(3, 5), "GRU").weight_names
        [['weight_ih', 'weight_hh', 'bias_ih', 'bias_hh']]
    """
    if mode == "RNN":
        mode = f"RNN_{layer.nonlinearity.upper()}"
    return Recurrence(mode, layer.input_size, layer.hidden_size, bias=layer.bias, is_cell=True)


def read_call(
    kind: str,
    shapes: Sequence[Sequence[int]],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    bidirectional: bool = False,
    batch_first: bool = False,
    *,
    is_cell: bool = False,
) -> Recurrence:
    """The recurrence of a call of `torch.lstm`, `torch.gru_cell` and the like, from its arguments.

    Args:
        kind: `lstm`, `gru`, `rnn_tanh` or `rnn_relu`.
        shapes: of the weights, in torch's order.
        has_biases: and the following, as torch's functions take them.
        is_cell: whether one step is called.

    Example:
        >>> read_call("lstm", [(20, 3), (20, 2), (2, 5)], has_biases=False).proj_size
        2
    """
    mode = kind.upper()
    (rows, input_size), (_, output_size) = shapes[:2]
    hidden_size = rows // len(CELLS[mode].gates)
    return Recurrence(
        mode,
        input_size,
        hidden_size,
        num_layers,
        has_biases,
        batch_first,
        dropout,
        bidirectional,
        output_size if output_size != hidden_size else 0,
        is_cell,
    )


AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}
"""What autocast casts; it leaves float64 and integers alone."""


def autocast_dtype(tensor: Any) -> torch.dtype | None:
    """What autocast computes in on the tensor's device, or None where it is off."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def check_arguments(
    recurrence: Recurrence,
    place: str,
    input: Any,
    state: Any,
    *,
    weight: Any = None,
    rows: int | None = None,
) -> None:
    """Refuse what torch refuses, before anything is computed.

    Args:
        recurrence: what the layer is.
        place: its name, for the message.
        input: anything with `shape` (and `dtype` and `device`, if `weight` is given).
        state: None, a tensor, or for an LSTM the pair `(h_0, c_0)`.
        weight: a weight that dtype and device must match; None where they cannot be told.
        rows: of a packed input, its largest batch size.

    Raises:
        UnrollError: with every mismatch found.
    """
    if not hasattr(input, "shape"):
        raise UnrollError(Problem(f"{place}: input", f"is {type(input).__name__}", "give a tensor"))
    problems: list[Problem] = []
    shape = tuple(input.shape)

    def expect(good: bool, argument: str, finding: str, mend: str) -> bool:
        if not good:
            problems.append(Problem(f"{place}: {argument}", finding, mend))
        return good

    features = recurrence.input_size
    ranks = (2,) if rows is not None else (1, 2) if recurrence.is_cell else (2, 3)
    wanted = " or ".join(f"{rank}-D" for rank in ranks)
    known = expect(len(shape) in ranks, "input", f"is {len(shape)}-D, {list(shape)}", f"give a {wanted} tensor")
    if known:
        mend = f"its last size must be input_size={features}"
        known = expect(shape[-1] == features, "input", f"has shape {list(shape)}", mend)
    batched = rows is not None or len(shape) == ranks[-1]
    time, batch = (1, 0) if recurrence.batch_first else (0, 1)
    if known and rows is None and not recurrence.is_cell:
        length = shape[time if batched else 0]
        some = not has_static_value(length) or length > 0  # Dynamo cannot branch on a symbolic length everywhere
        expect(some, "input", f"has no time steps, {list(shape)}", "give a sequence of at least one step")

    checked = [("input", input)]
    if state is not None:
        names = tuple(f"{name}_0" for name in recurrence.cell.states)
        if len(names) == 1:
            tensors = (state,)
            whole = hasattr(state, "shape")
        else:
            whole = isinstance(state, (tuple, list)) and len(state) == len(names)
            tensors = tuple(state) if whole else ()
            whole = whole and all(hasattr(s, "shape") for s in tensors)
        form = "a tensor" if len(names) == 1 else f"a pair ({', '.join(names)})"
        if expect(whole, "state", f"is {type(state).__name__}", f"give {form}, or None for zeros"):
            for name, tensor, size in zip(names, tensors, recurrence.state_sizes, strict=True):
                checked.append((name, tensor))
                if known:
                    lead = () if recurrence.is_cell else (recurrence.passes,)
                    count = shape[0 if recurrence.is_cell else batch] if rows is None and batched else rows
                    form = (*lead, count, size) if batched else (*lead, size)
                    good = tuple(tensor.shape) == form
                    expect(good, name, f"has shape {list(tensor.shape)}", f"it must be {list(form)}")

    if weight is not None:
        for name, tensor in checked:
            mend = f"give {weight.device}, or move the module"
            expect(tensor.device == weight.device, name, f"is on {tensor.device}, the weights on {weight.device}", mend)
            cast = autocast_dtype(weight) is not None and {tensor.dtype, weight.dtype} <= AUTOCAST
            good = tensor.dtype == weight.dtype or cast
            mend = f"convert it with .to({weight.dtype}), or the module with .to({tensor.dtype})"
            expect(good, name, f"has dtype {tensor.dtype}, the weights {weight.dtype}", mend)
    if problems:
        raise UnrollError(*problems)
