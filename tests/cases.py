"""The one table of layer cases, which the tests of every frontend run.

A frontend's test takes a list of cases and builds what it needs from each:

    @pytest.mark.parametrize("case", CHOSEN, ids=str)
    def test_exported(case):
        model, args = case.model(torch.float64), case.tensors(torch.float64)

`case.layer()` and `case.args()` are the bare layer and its arguments; `case.model()` and `case.tensors()` the
same inside a module whose inputs and outputs are tensors, as exporters want them. Weights and inputs depend on
the case alone, so two readings of one case can be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from unroll import Plan
from unroll.core.plan import CHOICES

# Sizes differ from each other, so that no two axes can be mistaken for one another.
FEATURES, HIDDEN, PROJECTION = 6, 5, 2

LAYER_KINDS = ("LSTM", "GRU", "RNN")
CELL_KINDS = ("LSTMCell", "GRUCell", "RNNCell")
KINDS = LAYER_KINDS + CELL_KINDS


@dataclass(frozen=True)
class Case:
    """A recurrent layer and the form of its input. `replace(case, steps=9)` is the same layer at another length."""

    kind: str
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    proj_size: int = 0
    dropout: float = 0.0
    nonlinearity: str = "tanh"
    form: str = "batched"
    """`batched`, `unbatched`, `packed` (sorted by length) or `unsorted` (packed, in any order)"""
    state: bool = False
    steps: int = 4
    batch: int = 3

    def __str__(self) -> str:
        """Such as `LSTM-num_layers=2-bidirectional`: all that is not the default."""
        parts = [self.kind]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(
                    field.name if value is True else f"no_{field.name}" if value is False else f"{field.name}={value}"
                )
        return "-".join(parts)

    @property
    def is_cell(self) -> bool:
        return self.kind in CELL_KINDS

    @property
    def packed(self) -> bool:
        return self.form in ("packed", "unsorted")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the constructor, after the sizes."""
        names = ["bias"]
        if not self.is_cell:
            names += ["num_layers", "batch_first", "dropout", "bidirectional"]
        names += {"LSTM": ["proj_size"], "RNN": ["nonlinearity"], "RNNCell": ["nonlinearity"]}.get(self.kind, [])
        return {name: getattr(self, name) for name in names}

    def layer(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Any:
        """The torch layer; its weights are the same numbers in every dtype."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            layer = getattr(nn, self.kind)(FEATURES, HIDDEN, **self.options, dtype=torch.float64)
        return layer.to(dtype)

    def model(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Holder:
        """The layer as `rnn` of a module that takes and returns tensors; see `Holder`."""
        return Holder(self.layer(dtype, seed=seed), self)

    def args(self, dtype: torch.dtype = torch.float32, *, seed: int = 1) -> tuple[Any, ...]:
        """What to call the layer with: the input, and the initial state where the case has one."""
        input, *rest = self.tensors(dtype, seed=seed)
        if self.packed:
            lengths = rest.pop(0)
            input = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=self.form == "packed")
        state = tuple(rest)
        return (input, state if len(state) > 1 else state[0]) if state else (input,)

    def tensors(self, dtype: torch.dtype = torch.float32, *, seed: int = 1) -> tuple[Tensor, ...]:
        """What to call the model with: the input, for packed cases the lengths, and each initial state."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        batch = [] if self.form == "unbatched" else [self.batch]
        lead = batch if self.is_cell else [*batch, self.steps] if self.batch_first else [self.steps, *batch]
        tensors = [draw(*lead, FEATURES)]
        if self.packed:
            tensors.append(self.lengths())
        if self.state:
            passes = [] if self.is_cell else [self.num_layers * (1 + self.bidirectional)]
            tensors.append(draw(*passes, *batch, self.proj_size or HIDDEN))
            if self.kind.startswith("LSTM"):
                tensors.append(draw(*passes, *batch, HIDDEN))
        return tuple(tensors)

    def lengths(self) -> Tensor:
        """How long each sequence of a packed batch is: from all steps down to one, and not in order if unsorted."""
        lengths = [max(1, self.steps * (self.batch - k) // self.batch) for k in range(self.batch)]
        return torch.tensor(lengths if self.form == "packed" else lengths[1:] + lengths[:1])


class Holder(nn.Module):
    """A recurrent layer between tensors, as part of a model.

    `forward(input, *state)`, or `forward(input, lengths, *state)` for packed cases, gives the output (a packed
    one padded again) and each final state, of a cell each next state, as a flat tuple of tensors.
    """

    def __init__(self, layer: nn.Module, case: Case) -> None:
        super().__init__()
        self.rnn = layer
        self.packed, self.sorted, self.batch_first = case.packed, case.form == "packed", case.batch_first

    def forward(self, input: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if self.packed:
            lengths, *rest = rest
            input = pack_padded_sequence(input, lengths, self.batch_first, enforce_sorted=self.sorted)
        result = self.rnn(input) if not rest else self.rnn(input, rest[0] if len(rest) == 1 else tuple(rest))
        if isinstance(result, tuple) and isinstance(result[0], PackedSequence):
            result = (pad_packed_sequence(result[0], self.batch_first)[0], result[1])
        return tuple(flat(result))


def flat(result: Any) -> Iterator[Tensor]:
    """The tensors of a result, of a packed sequence its data and batch sizes."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            if part is not None:
                yield from flat(part)


def grid() -> list[Case]:
    """The full product of options, for what is cheap enough to be tested on all of it."""
    cases = []
    kinds: list[dict[str, Any]] = [
        {"kind": "LSTM"},
        {"kind": "LSTM", "proj_size": PROJECTION},
        {"kind": "GRU"},
        {"kind": "RNN"},
        {"kind": "RNN", "nonlinearity": "relu"},
    ]
    forms = [
        *({"form": "batched", "steps": steps, "batch": batch} for steps in (1, 4) for batch in (0, 1, 3)),
        {"form": "unbatched"},
        {"form": "unbatched", "steps": 1},
        {"form": "packed"},
        {"form": "unsorted"},
    ]
    flags = (False, True)
    for kind, layers, two, bias, first, form, state in itertools.product(
        kinds, (1, 3), flags, flags, flags, forms, flags
    ):
        cases.append(
            Case(**kind, **form, num_layers=layers, bidirectional=two, bias=bias, batch_first=first, state=state)
        )
    cells = [
        {"kind": "LSTMCell"},
        {"kind": "GRUCell"},
        {"kind": "RNNCell"},
        {"kind": "RNNCell", "nonlinearity": "relu"},
    ]
    shapes = [{"batch": 0}, {"batch": 1}, {}, {"form": "unbatched"}]
    for kind, shape, bias, state in itertools.product(cells, shapes, flags, flags):
        cases.append(Case(**kind, **shape, bias=bias, state=state))
    return cases


GRID = grid()

VALUES = {field: get_args(choices) for field, choices in CHOICES.items()}
CHOSEN_VALUES = [dict(zip(VALUES, values, strict=True)) for values in itertools.product(*VALUES.values())]
# products="linear" goes with no other choice, see tests/core/test_options.py
LINEAR = Plan(products="linear")
ALL_PLANS = [Plan(**v) for v in CHOSEN_VALUES if v["products"] != "linear" or vars(LINEAR) | v == vars(LINEAR)]
"""Every way to write all steps."""

PLANS = [plan for plan in ALL_PLANS if sum(getattr(plan, field) != VALUES[field][0] for field in VALUES) < 2]
PLANS.append(ALL_PLANS[-1])
"""Every choice by itself, and with all others that it goes with: for frontends where a case costs more."""

CHOSEN = [
    Case("LSTM"),
    Case("LSTM", state=True),
    Case("LSTM", num_layers=2, bidirectional=True, batch_first=True, state=True),
    Case("LSTM", num_layers=2, bias=False, batch=1),
    Case("LSTM", num_layers=2, proj_size=PROJECTION, bidirectional=True),
    Case("LSTM", proj_size=PROJECTION, batch_first=True, state=True),
    Case("LSTM", form="unbatched", bidirectional=True, state=True),
    Case("LSTM", steps=1, state=True),
    Case("GRU"),
    Case("GRU", state=True),
    Case("GRU", num_layers=2, bidirectional=True, batch_first=True, state=True),
    Case("GRU", num_layers=2, bias=False, batch=1),
    Case("GRU", form="unbatched", bidirectional=True, batch_first=True),
    Case("GRU", steps=1),
    Case("RNN"),
    Case("RNN", nonlinearity="relu", num_layers=2, bidirectional=True, batch_first=True, state=True),
    Case("RNN", num_layers=2, bias=False, state=True),
    Case("RNN", form="unbatched", steps=1, state=True),
    Case("LSTMCell"),
    Case("LSTMCell", state=True),
    Case("LSTMCell", bias=False, form="unbatched", state=True),
    Case("GRUCell"),
    Case("GRUCell", state=True),
    Case("GRUCell", bias=False, form="unbatched"),
    Case("RNNCell", state=True),
    Case("RNNCell", nonlinearity="relu", bias=False),
]
"""One of each, and the combinations that have gone wrong elsewhere: for frontends where a case costs seconds."""

EMPTY = [Case(kind, batch=0, state=state) for kind in KINDS for state in (False, True)]
"""A batch of zero, legal in torch."""

PACKED = [
    Case("LSTM", form="packed"),
    Case("LSTM", form="unsorted", num_layers=2, bidirectional=True, batch_first=True, state=True),
    Case("LSTM", form="unsorted", proj_size=PROJECTION, bidirectional=True, state=True),
    Case("GRU", form="packed", num_layers=2, bidirectional=True, state=True),
    Case("GRU", form="unsorted", batch_first=True, bias=False),
    Case("RNN", form="packed", nonlinearity="relu", bidirectional=True),
    Case("RNN", form="unsorted", num_layers=2, state=True),
]
"""Packed sequences, sorted and not."""

DROPOUT = [
    Case(kind, num_layers=3, dropout=0.4, bidirectional=two, batch_first=first)
    for kind in LAYER_KINDS
    for two, first in ((False, False), (True, True))
]
"""Dropout between layers, for training mode."""

__all__ = [
    "ALL_PLANS",
    "CHOSEN",
    "DROPOUT",
    "EMPTY",
    "GRID",
    "KINDS",
    "PACKED",
    "PLANS",
    "Case",
    "Holder",
    "flat",
    "replace",
]
