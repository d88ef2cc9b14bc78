"""Small models that use their recurrent layers as published ones do: packed, under weight_norm, step by step."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from unroll import compare, trace, unroll

torch.set_num_threads(1)


class TextEncoder(nn.Module):
    """Convolutions under the old weight_norm, then an LSTM over packed sequences: the way of speech synthesis."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.conv = nn.utils.weight_norm(nn.Conv1d(6, 6, 3, padding=1))
        self.lstm = nn.LSTM(6, 4, batch_first=True, bidirectional=True)

    def forward(self, symbols: Tensor, lengths: Tensor) -> Tensor:
        x = self.conv(self.embedding(symbols).transpose(1, 2)).transpose(1, 2)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        self.lstm.flatten_parameters()
        output, _ = self.lstm(packed)
        return pad_packed_sequence(output, batch_first=True, total_length=symbols.shape[1])[0]


class Translator(nn.Module):
    """An encoder of two layers, and a cell that looks back at it and writes one symbol after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.encoder = nn.GRU(6, 5, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True)
        self.bridge = nn.Linear(10, 5)
        self.look = nn.Linear(5, 10)
        self.decoder = nn.GRUCell(16, 5)
        self.scores = nn.Linear(5, 20)

    def forward(self, symbols: Tensor, steps: int) -> Tensor:
        read, last = self.encoder(self.embedding(symbols))
        h = torch.tanh(self.bridge(torch.cat([last[-2], last[-1]], 1)))
        symbol, written = symbols[:, 0], []
        for _ in range(steps):
            attention = (read * self.look(h)[:, None]).sum(2).softmax(1)
            context = (attention[..., None] * read).sum(1)
            h = self.decoder(torch.cat([self.embedding(symbol), context], 1), h)
            written.append(self.scores(h))
            symbol = written[-1].argmax(1)
        return torch.stack(written, 1)


@pytest.fixture
def symbols() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, 20, (3, 7))


LENGTHS = torch.tensor([5, 7, 2])


def test_packed_text_encoder(symbols):
    model = TextEncoder()
    compare(model, unroll(model), (symbols, LENGTHS), gradients=True).check()


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # Inductor's own
def test_packed_text_encoder_compiled_with_graph_breaks(symbols):
    model = TextEncoder()
    compiled = torch.compile(unroll(model), backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(symbols, LENGTHS), model(symbols, LENGTHS))


@pytest.mark.parametrize("training", [False, True])
def test_translator(symbols, training):
    model = Translator().train(training)
    compare(model, unroll(model), (symbols, 4), gradients=True).check()


def test_translator_as_a_graph(symbols):
    model = Translator().eval()
    graph = unroll(trace(model, concrete_args={"steps": 4}), (symbols, 4))
    compare(model, graph, [(symbols, 4), (symbols[:2], 4)], gradients=True).check()


def test_state_kept_between_calls():
    class Streaming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 4)
            self.state: tuple[Tensor, Tensor] | None = None

        def forward(self, x: Tensor) -> Tensor:
            output, state = self.lstm(x, self.state)
            self.state = state[0].detach(), state[1].detach()
            return output

    model = Streaming().double()
    unrolled = unroll(model)
    for x in torch.randn(3, 2, 1, 3, dtype=torch.float64):
        torch.testing.assert_close(unrolled(x), model(x), rtol=1e-9, atol=0)
    assert model.state is not unrolled.state


def test_export_keeps_the_batch_open(symbols):
    """The number of steps is fixed in an exported program, the size of the batch is not."""

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 6)
            self.lstm = nn.LSTM(6, 4, num_layers=2, batch_first=True, bidirectional=True)

        def forward(self, symbols: Tensor) -> Tensor:
            return self.lstm(self.embedding(symbols))[0]

    model = Tagger()
    program = torch.export.export(unroll(model), (symbols,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = torch.randint(0, 20, (batch, 7))
            torch.testing.assert_close(program.module()(x), model(x))


def test_a_single_tensor_is_one_argument_of_compare():
    layer = nn.GRU(3, 3).double()
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    assert [row.shape for row in compare(layer, unroll(layer), x).check().rows] == [(2, 1, 3), (1, 1, 3)]
