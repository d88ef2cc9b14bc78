"""A recurrent layer apart from its tensors, and functions that read it from where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from unroll.core.cells import CELLS, ONNX_CELLS, Cell
from unroll.core.weights import Tensorlike, Weights


class Frame(NamedTuple):
    """The sizes of an input around its features."""

    batched: bool
    """True if it has a batch"""
    steps: Any
    """T; 1 of a cell"""
    batch: Any
    """B; 1 of an input without a batch"""


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
        """The features of `h`, and of the output in one direction."""
        return self.proj_size or self.hidden_size

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The features of each state: of `h`, and for an LSTM of `c`."""
        return (self.output_size, self.hidden_size)[: len(self.cell.states)]

    @property
    def passes(self) -> int:
        """The number of scans over the sequence: layers times directions, the leading size of a state."""
        return self.num_layers * len(self.directions)

    @property
    def time_axis(self) -> int:
        """The axis of the steps in a layer's input with a batch."""
        return 1 if self.batch_first else 0

    @property
    def batch_axis(self) -> int:
        """The axis of the batch in an input with one."""
        return 0 if self.is_cell else 1 - self.time_axis

    def rank(self, *, batched: bool = True) -> int:
        """Return the number of dimensions of an input, and of a state."""
        return (1 if self.is_cell else 2) + batched

    def frame(self, shape: Sequence[Any]) -> Frame:
        """Read the sizes of an input of this shape.

        Example:
            >>> Recurrence("GRU", 3, 5, batch_first=True).frame((2, 7, 3))
            Frame(batched=True, steps=7, batch=2)
        """
        batched = len(shape) == self.rank()
        steps = 1 if self.is_cell else shape[self.time_axis if batched else 0]
        return Frame(batched, steps, shape[self.batch_axis] if batched else 1)

    def state_shapes(self, frame: Frame) -> list[tuple[Any, ...]]:
        """Return the shape of each state for an input with these sizes."""
        lead = (*(() if self.is_cell else (self.passes,)), *((frame.batch,) if frame.batched else ()))
        return [(*lead, size) for size in self.state_sizes]

    def output_shape(self, frame: Frame) -> tuple[Any, ...]:
        """Return the shape of a layer's output for an input with these sizes."""
        lead = (frame.steps, frame.batch) if frame.batched else (frame.steps,)
        return (*(lead[::-1] if self.batch_first else lead), len(self.directions) * self.output_size)

    @property
    def flat_names(self) -> list[str]:
        """Names of the parameters in torch's order."""
        return [name for group in self.weight_names for name in group]

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
            # layers after the first read h of all directions
            first = k < len(self.directions)
            features = self.input_size if first else len(self.directions) * size
            shapes += [(rows, features), (rows, size)] + [(rows,)] * 2 * self.bias
            shapes += [(size, self.hidden_size)] * bool(self.proj_size)
        return shapes

    def weights(self, flat: Sequence[Tensorlike]) -> list[Weights]:
        """Group tensors given in the order of `weight_names` (that of torch's flat weights)."""
        groups, size = [], len(self.weight_names[0])
        for start in range(0, len(flat), size):
            w_ih, w_hh, *rest = flat[start : start + size]
            b_ih, b_hh = rest[:2] if self.bias else (None, None)
            groups.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if self.proj_size else None))
        return groups


LAYERS: tuple[type[nn.Module], ...] = (nn.LSTM, nn.GRU, nn.RNN)

CELL_MODES: dict[type[nn.Module], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU", nn.RNNCell: "RNN"}
CLASS_NAMES = {kind.__name__ for kind in (*LAYERS, *CELL_MODES)}
"""The classes whose modules give a layer its name"""
KINDS = tuple(mode.lower() for mode in CELLS)
"""The recurrences by the names of torch's functions and operators, `rnn_tanh`; those of a cell end with `_cell`"""


def read_layer(layer: Any) -> Recurrence:
    """Read the recurrence of an `nn.LSTM`, `nn.GRU`, `nn.RNN`, or of anything with their attributes.

    Example:
        >>> read_layer(nn.GRU(3, 5, bidirectional=True)).passes
        2
    """
    names = ("mode", "input_size", "hidden_size", "num_layers", "bias", "batch_first")
    names += ("dropout", "bidirectional", "proj_size")
    return Recurrence(**{name: getattr(layer, name) for name in names})


def read_cell(layer: Any, mode: str) -> Recurrence:
    """Read the recurrence of an `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell`, given its mode from `CELL_MODES`.

    Example:
        >>> read_cell(nn.GRUCell(3, 5), "GRU").weight_names
        [['weight_ih', 'weight_hh', 'bias_ih', 'bias_hh']]
    """
    if mode == "RNN":
        mode = f"RNN_{layer.nonlinearity.upper()}"
    return Recurrence(mode, layer.input_size, layer.hidden_size, bias=layer.bias, is_cell=True)


def read_module(layer: Any) -> Recurrence:
    """Read the recurrence of any recurrent layer or cell of torch, or of a subclass of one.

    Example:
        >>> read_module(nn.RNNCell(3, 5)).mode, read_module(nn.LSTM(3, 5)).mode
        ('RNN_TANH', 'LSTM')
    """
    mode = cell_mode(layer)
    return read_layer(layer) if mode is None else read_cell(layer, mode)


def cell_mode(layer: Any) -> str | None:
    """Return the mode in `CELL_MODES` of a cell of torch, or of a subclass of one; None for anything else."""
    return next((mode for kind, mode in CELL_MODES.items() if isinstance(layer, kind)), None)


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
    """Read the recurrence of a call of `torch.lstm`, `torch.gru_cell` and the like, from its arguments.

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
    # w_ih is [gates * H, F], and w_hh [gates * H, P], where P is H without a projection
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


def scope(recurrence: Recurrence, k: int) -> str:
    """Return the name of pass number `k`: `l1`, `l1.reverse`."""
    layer, direction = divmod(k, len(recurrence.directions))
    return f"l{layer}.reverse" if recurrence.directions[direction] else f"l{layer}"
