"""The classes that stand in for torch's, under their names.

Each has the signature of `forward` whose types TorchScript reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unroll.modules.layers import UnrolledCell, UnrolledLayer
from unroll.torchscript.kernels import Scriptable


class LSTM(Scriptable, UnrolledLayer):
    check_forward_args = nn.LSTM.check_forward_args
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    permute_hidden = nn.LSTM.permute_hidden

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if torch.jit.is_scripting():
            results = self._compiled(input, [] if hx is None else [hx[0], hx[1]])
            return results[0], (results[1], results[2])
        else:
            return super().forward(input, hx)


class _OneState(Scriptable, UnrolledLayer):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, hx: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            results = self._compiled(input, [] if hx is None else [hx])
            return results[0], results[1]
        else:
            return super().forward(input, hx)


class GRU(_OneState):
    pass


class RNN(_OneState):
    pass


class LSTMCell(Scriptable, UnrolledCell):
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if torch.jit.is_scripting():
            results = self._compiled(input, [] if hx is None else [hx[0], hx[1]])
            return results[0], results[1]
        else:
            return super().forward(input, hx)


class _OneStateCell(Scriptable, UnrolledCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if torch.jit.is_scripting():
            return self._compiled(input, [] if hx is None else [hx])[0]
        else:
            return super().forward(input, hx)


class GRUCell(_OneStateCell):
    pass


class RNNCell(_OneStateCell):
    pass


STAND_INS: dict[type[nn.Module], type[UnrolledLayer | UnrolledCell]] = {
    nn.RNNBase: UnrolledLayer,
    nn.LSTM: LSTM,
    nn.GRU: GRU,
    nn.RNN: RNN,
    nn.RNNCellBase: UnrolledCell,
    nn.LSTMCell: LSTMCell,
    nn.GRUCell: GRUCell,
    nn.RNNCell: RNNCell,
}
"""The class that stands in for each of torch's"""
