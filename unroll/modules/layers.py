"""The drop-in modules that stand where recurrent layers stood, and their swap into a module tree."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from unroll.core import schedule
from unroll.core.passes import Layout
from unroll.core.patching import Local
from unroll.core.plan import Plan
from unroll.core.recurrence import (
    AUTOCAST,
    Problem,
    Recurrence,
    UnrollError,
    autocast_dtype,
    check_arguments,
    read_cell,
    read_layer,
)
from unroll.core.scan import divided, separated
from unroll.modules import loops
from unroll.packed.contexts import Sizes, known_sizes, original_order, sorted_state
from unroll.packed.guard import released, watched

if TYPE_CHECKING:
    from unroll.core.layout import Frozen

# What the weights of a layer were laid out for, besides their own names.
SETTLED = {"plan", "mode", "nonlinearity", "input_size", "hidden_size", "num_layers", "bias", "bidirectional"}
SETTLED |= {"proj_size"}


STAND_IN: Local[Callable[[Any, Any, Any], Any]] = Local("stand_in")
"""In a thread that captures models with layers as single nodes: what `layer(input, hx)` is there"""


def _stand_in() -> Callable[[Any, Any, Any], Any] | None:
    return None if torch.compiler.is_dynamo_compiling() else STAND_IN.value


class Unrolled(nn.Module):
    """What stands where a recurrent layer stood: the same parameters and attributes, explicit steps.

    Made by `unroll.unroll`, never by hand. Options such as `dropout` and `batch_first` are read at
    every call, as torch's layers read theirs, and so are the weights.

    Attributes:
        plan: how the steps are laid out.
        place: the layer's name in the model, for messages.
        frozen: where its weights are after `unroll(model, freeze=True)`; None for a layer with parameters.
    """

    plan: Plan
    place: str
    hidden_size: int
    frozen: Frozen | None = None

    @property
    def recurrence(self) -> Recurrence:
        raise NotImplementedError

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and on the device of the weights."""
        return self.all_weights[0][0] if self.frozen is None else getattr(self, self.frozen.first)

    def __setattr__(self, name: str, value: Any) -> None:
        if self.frozen is not None and name in SETTLED.union(*self.recurrence.weight_names):
            self._refuse_if_frozen(f"cannot be given another {name}")
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        # torch.jit.trace reads all that is listed; what a frozen layer has no more would answer before forward does.
        return [
            name for name in super().__dir__() if self.frozen is None or name not in ("all_weights", "_flat_weights")
        ]

    def _refuse_if_frozen(self, finding: str = "has no parameters any more") -> None:
        if self.frozen is not None:
            mend = "use the model that unroll gives without freeze, and freeze that again"
            raise UnrollError(Problem(self.place, f"is frozen and {finding}", mend))

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights, a list for each layer and direction, in torch's order."""
        self._refuse_if_frozen()
        names = self.recurrence.weight_names
        try:
            return [[getattr(self, name) for name in group] for group in names]
        except AttributeError as error:
            missing = ", ".join(name for group in names for name in group if not hasattr(self, name))
            mend = "set it before the call, as a parameter or a tensor"
            raise UnrollError(Problem(self.place, f"has no {missing}", mend)) from error

    def reset_parameters(self) -> None:
        """Draw all parameters anew, from torch's distribution for recurrent layers."""
        self._refuse_if_frozen()
        bound = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def __prepare_scriptable__(self) -> Unrolled:
        """The form that `torch.jit.script` compiles; it asks for it by this name."""
        from unroll.torchscript.kernels import prepare

        self._refuse_if_frozen("cannot be scripted")
        return prepare(self)

    def _trace(self, input: Any, hx: Any) -> Any:
        from unroll.torchscript.kernels import trace

        self._refuse_if_frozen("cannot be traced by torch.jit.trace")
        return trace(self, input, hx)

    def _layout(self, cast: torch.dtype | None, dtype: torch.dtype | None) -> Layout:
        """The weights as the steps want them, for rows of `dtype`, after autocast has made them `cast`."""
        if self.frozen is not None:
            return self.frozen.read(self, cast, dtype)
        recurrence, weights = self.recurrence, [weight for group in self.all_weights for weight in group]
        cast_weights = [weight.to(cast) for weight in weights] if cast else weights
        return schedule.prepare(recurrence, recurrence.weights(cast_weights), self.plan, dtype)

    def _run(
        self,
        rows: Tensor,
        state: tuple[Tensor, ...] | None,
        steps: Any,
        batch: Any,
        sizes: list[int] | None = None,
        padded: Sizes | None = None,
    ) -> schedule.Result:
        """All steps over `rows`, `[T * B, F]`, of packed rows with their sizes."""
        recurrence = self.recurrence
        promoting = False
        cast = autocast_dtype(rows) if rows.dtype in AUTOCAST else None
        if cast:
            promoting = not _casts_all(recurrence, rows, packed=bool(sizes or padded))
            if not promoting:
                rows = rows.to(cast)
                state = state and tuple(s.to(cast) for s in state)
        loop = None
        if self.plan.block and loops.is_captured(rows) and not (sizes or recurrence.is_cell):
            if promoting:
                finding = "runs in blocks under autocast, where the type of its state changes after the first step"
                raise UnrollError(Problem(self.place, finding, "convert the model, or leave Plan(time='explicit')"))
            weights = [] if self.frozen is not None else [w for group in self.all_weights for w in group]
            trained = loops.is_trained(self.place, [rows, *(state or ()), *weights])
            loop = None if trained else loops.over_blocks(steps, self.plan.block, padded.mask if padded else None)
        # At step 0 zeros are left out; but not where their dtype promotes that of the results, where rows join in later
        # steps, or where the only step has to give the weights that meet them a gradient.
        looped = loop is not None  # what Dynamo can tell of a function in every version
        if state is None and (promoting or sizes or padded or looped or (steps == 1 and torch.is_grad_enabled())):
            state = tuple(rows.new_zeros(recurrence.passes * batch, size) for size in recurrence.state_sizes)
        drop = self.training and recurrence.dropout
        return schedule.run(
            recurrence,
            self._layout(cast, None if promoting else rows.dtype),
            rows,
            state,
            steps=steps,
            sizes=sizes,
            mask=padded.mask if padded else None,
            dropout=partial(functional.dropout, p=drop) if drop else None,
            loop=loop,
            divide=separated if _is_compiled_for_cpu(rows) else divided,
        )


def _is_traced() -> bool:
    """Whether `torch.jit.trace` records; the ONNX exporter built on it wants plain operators."""
    return torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()


def _is_compiled_for_cpu(rows: Tensor) -> bool:
    """Whether Dynamo, not for an export, captures what runs now."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and rows.device.type == "cpu"


def _casts_all(recurrence: Recurrence, rows: Tensor, *, packed: bool) -> bool:
    """Whether torch, under autocast, runs this layer in the lower precision throughout.

    So do cuDNN and, for a padded LSTM without projection, oneDNN. Elsewhere only the products are cast.
    """
    if rows.device.type == "cpu":
        plain = not (recurrence.is_cell or recurrence.proj_size or packed)
        return recurrence.mode == "LSTM" and plain and rows.numel() > 0
    return True


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
    extra_repr = nn.RNNBase.extra_repr

    @property
    def recurrence(self) -> Recurrence:
        return read_layer(self)

    @property
    def _flat_weights(self) -> list[Tensor]:
        """Torch's name for the weights in one list; models that drop or tie weights reach for it."""
        return [weight for group in self.all_weights for weight in group]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor]) -> None:
        self._refuse_if_frozen()
        names = [name for group in self.recurrence.weight_names for name in group]
        for name, weight in zip(names, weights, strict=True):
            setattr(self, name, weight)

    def flatten_parameters(self) -> None:
        """Does nothing: there is no fused kernel that wants the parameters in one piece of memory."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        if stand_in := _stand_in():
            return stand_in(self, input, hx)
        if _is_traced():
            return self._trace(input, hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        recurrence = self.recurrence
        check_arguments(recurrence, self.place, input, hx, weight=self.like)
        batched = input.dim() == 3
        steps = input.shape[1 if batched and recurrence.batch_first else 0]
        batch = input.shape[0 if recurrence.batch_first else 1] if batched else 1
        result = self._run(schedule.flat_rows(recurrence, input, batched=batched), _tuple(hx), steps, batch)
        output = schedule.joined_output(recurrence, result.outputs, batched=batched)
        states = schedule.joined_states(recurrence, result.finals, batched=batched)
        return _own(output, steps), _untuple([_own(state) for state in states])

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        recurrence = self.recurrence
        padded: Any = input.batch_sizes if isinstance(input.batch_sizes, Sizes) else None
        sizes: Any = None if padded else known_sizes(input, self.place)
        steps, batch = (padded.steps, padded.count) if padded else (len(sizes), sizes[0])
        data = released(input.data) if padded else input.data
        check_arguments(recurrence, self.place, data, hx, weight=self.like, rows=batch)
        result = self._run(data, sorted_state(input, hx), steps, batch, sizes, padded)
        states = original_order(input, schedule.joined_states(recurrence, result.finals))
        rows = schedule.joined_rows(result.outputs)
        if padded:
            rows, _ = watched(padded.filled(rows)), watched(data)
        else:
            rows = _own(rows, steps)
        # Not `_replace`, which Dynamo gets wrong after a graph break.
        return PackedSequence(rows, *input[1:]), _untuple([_own(state) for state in states])


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
    extra_repr = nn.RNNCellBase.extra_repr

    @property
    def recurrence(self) -> Recurrence:
        return read_cell(self, self.mode)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        if stand_in := _stand_in():
            return stand_in(self, input, hx)
        if _is_traced():
            return self._trace(input, hx)
        recurrence = self.recurrence
        check_arguments(recurrence, self.place, input, hx, weight=self.like)
        batched = input.dim() == 2
        batch = input.shape[0] if batched else 1
        result = self._run(schedule.flat_rows(recurrence, input, batched=batched), _tuple(hx), 1, batch)
        return _untuple(schedule.joined_states(recurrence, result.finals, batched=batched))


def _tuple(hx: Any) -> tuple[Tensor, ...] | None:
    return hx if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _untuple(states: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return states[0] if len(states) == 1 else tuple(states)


def _own(result: Tensor, steps: Any = 1) -> Tensor:
    """The result in memory of its own, as torch's: it may be detached or written to in place.

    The output of several steps is so already, as the pieces were joined.
    """
    return result.clone() if has_static_value(steps) and steps == 1 else result
