"""The drop-in modules that stand where recurrent layers stood."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unroll.core import schedule
from unroll.core.arguments import as_result, as_states, check_arguments
from unroll.core.errors import Problem, UnrollError
from unroll.core.layout import Frozen
from unroll.core.limits import STEPS
from unroll.core.patching import Local
from unroll.core.plan import Plan
from unroll.core.recurrence import Recurrence, read_cell, read_layer
from unroll.modules import linears
from unroll.modules.flat_weights import FlatWeights, listed_weights, make_list, reach_list, set_list
from unroll.modules.running import own, run_packed, run_rows
from unroll.torchscript import kernels
from unroll.torchscript.kernels import SCRIPTED, make_scriptable

# Attributes that a frozen layer's weights were laid out for, besides their own names.
SETTLED = {"plan", "mode", "nonlinearity", "input_size", "hidden_size", "num_layers", "bias", "bidirectional"}
SETTLED |= {"proj_size"}

# Attributes that a copy has no use for.
UNCOPIED = {*SCRIPTED, "traced"}

STAND_IN: Local[Callable[[Any, Any, Any], Any]] = Local("stand_in")
"""The stand-in for `layer(input, hx)` in a thread that captures models with layers as single nodes"""


class Unrolled(nn.Module):
    """A module that stands where a recurrent layer stood: the same parameters and attributes, explicit steps.

    Made by `unroll.unroll`, never by hand. Options such as `dropout` and `batch_first` are read at
    every call, as torch's layers read theirs, and so are the weights.

    Attributes:
        plan: how the steps are laid out.
        limit: the most steps that are written out where a graph is made of a run.
        place: the layer's name in the model, for messages.
        frozen: where its weights are after `unroll(model, freeze=True)`; None for a layer with parameters.
        carry: where its state is kept between calls of a model that `unroll.streaming` made; None in others.
    """

    plan: Plan
    limit: int = STEPS
    place: str
    hidden_size: int
    frozen: Frozen | None = None
    carry: Any = None
    origin: type[nn.Module] | None = None
    """The class of the user's own that this one was made of"""

    @property
    def recurrence(self) -> Recurrence:
        raise NotImplementedError

    @property
    def like(self) -> Any:
        """A tensor with the dtype and on the device of the weights; None if they are in modules of another kind."""
        if linears.are_held(self):
            return linears.weight_like(self)
        return self.flat_weights[0] if self.frozen is None else getattr(self, self.frozen.first)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.frozen is not None and name in SETTLED.union(*self.recurrence.weight_names):
            self.refuse_if_frozen(f"cannot be given another {name}")
        if name == "plan":
            self._give_plan(value)
        elif held := linears.holder_of(self, name):
            setattr(*held, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        held = linears.holder_of(self, name)
        found = getattr(*held, None) if held else None
        return super().__getattr__(name) if found is None else found

    def _give_plan(self, plan: Plan) -> None:
        before = self.__dict__.get("plan")
        if before is not None and linears.are_held(self) and plan.products != "linear":
            linears.release(self)
        held = before is not None and before.products == "linear"
        if plan.products == "linear" and not held and self.frozen is None:
            linears.hold(self)
        self.__dict__["plan"] = plan

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        found = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if linears.are_held(self):
            linears.name_as_torch(self, found, prefix)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if linears.are_held(self):
            linears.name_by_module(self, state_dict, prefix)
        if given := [name for name in self.recurrence.flat_names if prefix + name in state_dict]:
            self.refuse_if_frozen(f"cannot load {', '.join(given)}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __dir__(self) -> list[str]:
        # torch.jit.trace reads all that is listed: that would make lists of weights, and what a frozen layer has no
        # more would answer before forward does.
        gone = {"flat_weights", "_flat_weights", *["all_weights"] * (self.frozen is not None)}
        return [name for name in super().__dir__() if name not in gone]

    def refuse_if_frozen(self, finding: str = "has no parameters any more") -> None:
        if self.frozen is not None:
            fix = "use the model that unroll gives without freeze, and freeze that again"
            raise UnrollError(Problem(self.place, f"is frozen and {finding}", fix))

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights, a list for each layer and direction, in torch's order."""
        self.refuse_if_frozen()
        if linears.are_held(self):
            linears.check_plain(self)
        names = self.recurrence.weight_names
        try:
            return [[getattr(self, name) for name in group] for group in names]
        except AttributeError as error:
            missing = ", ".join(name for group in names for name in group if not hasattr(self, name))
            fix = "set it before the call, as a parameter or a tensor"
            raise UnrollError(Problem(self.place, f"has no {missing}", fix)) from error

    def reset_parameters(self) -> None:
        """Draw all parameters anew, from torch's distribution for recurrent layers."""
        self.refuse_if_frozen()
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    @property
    def flat_weights(self) -> list[Tensor]:
        """The weights that it runs with in one list, in torch's order."""
        return [weight for group in self.all_weights for weight in group]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in UNCOPIED}

    def __prepare_scriptable__(self) -> Unrolled:
        """Return the form that `torch.jit.script` compiles; it asks for it by this name."""
        self.refuse_if_frozen("cannot be scripted")
        if self.carry is not None:
            finding = "keeps its state between calls of its model, which TorchScript cannot"
            raise UnrollError(Problem(self.place, finding, "use torch.export, or torch.jit.trace"))
        return make_scriptable(self)


def _instead(layer: Unrolled) -> Callable[[Any, Any, Any], Any] | None:
    """Return the function of a layer, its input and state to call in place of its steps, if there is one."""
    if not torch.compiler.is_dynamo_compiling() and STAND_IN.value is not None:
        return STAND_IN.value
    if torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export():  # that exporter wants plain operators
        layer.refuse_if_frozen("cannot be traced by torch.jit.trace")
        return kernels.trace
    return None


class UnrolledLayer(Unrolled):
    """Runs an `nn.LSTM`, `nn.GRU` or `nn.RNN` as explicit steps, with the same arguments and results.

    Shapes:
        input: `[T, B, F]`, `[B, T, F]` with `batch_first`, `[T, F]` unbatched, or a `PackedSequence`.
        hx: None for zeros, or `h_0` of `[layers * directions, B, H]`; for an LSTM the pair `(h_0, c_0)`.
        returns: the output `[T, B, directions * H]` and the last state, as the torch layer does.

    Raises:
        UnrollError: for input that torch refuses.

    Example:
        >>> layer = unroll(nn.GRU(3, 5))
        >>> [tuple(t.shape) for t in layer(torch.zeros(7, 2, 3))]
        [(7, 2, 5), (1, 2, 5)]
    """

    mode: str
    listed: FlatWeights | None = None
    """The list `_flat_weights`, once somebody has reached for it"""
    traced: FlatWeights | None = None
    """The same while `torch.export` has put other tensors in the place of the weights"""

    # What has to do with no weights is as in torch.
    get_expected_hidden_size = nn.RNNBase.get_expected_hidden_size
    check_hidden_size = nn.RNNBase.check_hidden_size
    check_forward_args = nn.RNNBase.check_forward_args
    permute_hidden = nn.RNNBase.permute_hidden

    @property
    def recurrence(self) -> Recurrence:
        return read_layer(self)

    @property
    def flat_weights(self) -> list[Tensor]:
        self.refuse_if_frozen()
        listed = listed_weights(self)
        return [weight for group in self.all_weights for weight in group] if listed is None else listed

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The list of weights that it runs with, as torch's layers do; models that drop or tie weights reach for it."""
        self.refuse_if_frozen("has no _flat_weights any more")
        if linears.are_held(self):
            return cast(list, tuple(self.flat_weights))  # others in the list would not be run with
        return reach_list(self)

    def _init_flat_weights(self) -> None:
        make_list(self)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        make_list(self)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_flat_weights":  # not by a setter of the property, which Dynamo passes over before PyTorch 2.13
            return self._give_list(value)
        if self.listed is not None and name in (names := self.recurrence.flat_names):
            self.listed.weights[names.index(name)] = value
        super().__setattr__(name, value)

    def _give_list(self, weights: list[Tensor]) -> None:
        self.refuse_if_frozen("cannot be given other _flat_weights")
        if linears.are_held(self):
            finding = "holds its weights in nn.Linear modules, and runs with no list, _flat_weights"
            raise UnrollError(Problem(self.place, finding, "set the weights by their names, layer.weight_hh_l0 = ..."))
        set_list(self, weights)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no fused kernel that wants the parameters in one piece of memory."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Check an input as torch's layers do, with their errors."""
        checked: Any = SimpleNamespace(_flat_weights=[self.like], input_size=self.input_size)
        nn.RNNBase.check_input(checked, input, batch_sizes)

    def extra_repr(self) -> str:
        return _told(self, nn.RNNBase)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        if self.carry is not None and self.carry.running:
            return self.carry.run(partial(_run_layer, self), input, hx)
        return _run_layer(self, input, hx)


# Not methods: a subclass of the user's may have some of any name.


def _told(layer: Unrolled, kind: Any) -> str:
    """Return the options of a layer, and how it is unrolled; nothing to Dynamo, which names what `vmap` is given so."""
    if torch.compiler.is_dynamo_compiling():
        return ""
    plan = [] if layer.plan == Plan() else str(layer.plan).split(",")
    return ", ".join([kind.extra_repr(layer), "unrolled", *plan, *["frozen"] * (layer.frozen is not None)])


def _run_layer(layer: UnrolledLayer, input: Any, hx: Any) -> tuple[Any, Any]:
    if instead := _instead(layer):
        return instead(layer, input, hx)
    if isinstance(input, PackedSequence):
        return run_packed(layer, input, hx)
    recurrence = layer.recurrence
    check_arguments(recurrence, layer.place, input, hx, weight=layer.like)
    batched, steps, batch = recurrence.frame(input.shape)
    rows = schedule.flat_rows(recurrence, input, batched=batched)
    result = run_rows(layer, rows, as_states(hx), steps, batch)
    output = schedule.joined_output(recurrence, result.outputs, batched=batched)
    states = schedule.joined_states(recurrence, result, batched=batched)
    return own(output, steps), as_result([own(state) for state in states])


class UnrolledCell(Unrolled):
    """Runs an `nn.LSTMCell`, `nn.GRUCell` or `nn.RNNCell` as explicit operations.

    Shapes:
        input: `[B, F]`, or `[F]` unbatched.
        hx: None for zeros, or `h` of `[B, H]`; for an LSTM the pair `(h, c)`.
        returns: the next `h`, for an LSTM the pair `(h, c)`.

    Raises:
        UnrollError: for input that torch refuses.

    Example:
        >>> unroll(nn.LSTMCell(3, 5))(torch.zeros(2, 3))[1].shape
        torch.Size([2, 5])
    """

    mode: str

    @property
    def recurrence(self) -> Recurrence:
        return read_cell(self, self.mode)

    def extra_repr(self) -> str:
        return _told(self, nn.RNNCellBase)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if self.carry is not None and self.carry.running:
            return self.carry.run(partial(_run_cell, self), input, hx)
        return _run_cell(self, input, hx)


def _run_cell(cell: UnrolledCell, input: Any, hx: Any) -> Any:
    if instead := _instead(cell):
        return instead(cell, input, hx)
    recurrence = cell.recurrence
    check_arguments(recurrence, cell.place, input, hx, weight=cell.like)
    batched, steps, batch = recurrence.frame(input.shape)
    rows = schedule.flat_rows(recurrence, input, batched=batched)
    result = run_rows(cell, rows, as_states(hx), steps, batch)
    return as_result(schedule.joined_states(recurrence, result, batched=batched))
