"""Models as people write them: what published packages do around their recurrent layers, in small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.by_version import EXPORTS_ASSIGNED_WEIGHTS


class AttentionDecoder(nn.Module):
    """A decoder of speech: two cells, attention over an encoded text, a frame a step, as Tacotron 2."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(6, 4, bidirectional=True, batch_first=True)
        self.attend, self.decode = nn.LSTMCell(3 + 8, 8), nn.LSTMCell(16, 8)
        self.query, self.frame = nn.Linear(8, 8), nn.Linear(16, 3)

    def forward(self, text: Tensor, steps: int = 5) -> tuple[Tensor, Tensor]:
        memory, _ = self.encoder(text)
        batch = text.size(0)
        frame = text.new_zeros(batch, 3)
        states = [text.new_zeros(batch, 8) for _ in range(4)]
        context = text.new_zeros(batch, 8)
        frames, weights = [], []
        for _ in range(steps):
            h, c = self.attend(torch.cat([frame, context], -1), (states[0], states[1]))
            energies = torch.einsum("btf,bf->bt", memory, self.query(h))
            weight = energies.softmax(-1)
            context = torch.bmm(weight.unsqueeze(1), memory).squeeze(1)
            h2, c2 = self.decode(torch.cat([h, context], -1), (states[2], states[3]))
            states = [h, c, h2, c2]
            frame = self.frame(torch.cat([h2, context], -1))
            frames.append(frame)
            weights.append(weight)
        return torch.stack(frames, 1), torch.stack(weights, 1)


class Policy(nn.Module):
    """An agent with memory: the state is reset where an episode starts, but only if one does."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.lstm = nn.Linear(4, 6), nn.LSTM(6, 5)
        self.action, self.value = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, seen: Tensor, h: Tensor, c: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.features(seen).tanh()
        if not torch.any(starts):
            out, (h, c) = self.lstm(x, (h, c))
        else:
            steps = []
            for t in range(x.shape[0]):
                keep = (1.0 - starts[t].to(x.dtype)).view(1, -1, 1)
                step, (h, c) = self.lstm(x[t : t + 1], (keep * h, keep * c))
                steps.append(step)
            out = torch.cat(steps)
        return self.action(out), self.value(out), h, c


class SortedEncoder(nn.Module):
    """An encoder that sorts by length, packs and sorts back, as forecasting models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Linear(3, 4), nn.LSTM(4, 5, 2, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if (lengths <= 0).any():
            raise ValueError("a sequence is empty")
        lengths, order = lengths.sort(descending=True)
        packed = pack_padded_sequence(self.embed(x).index_select(0, order), lengths.cpu(), batch_first=True)
        packed, (h, _) = self.lstm(packed)
        out, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.size(1))
        back = order.argsort()
        return out.index_select(0, back), h[-1].index_select(0, back)


class Recognizer(nn.Module):
    """A reader of lines of text: convolutions, height squeezed away, two bidirectional layers, as CRNN."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.MaxPool2d((4, 1)),
        )
        self.rnn, self.head = nn.LSTM(6, 5, 2, bidirectional=True), nn.Linear(10, 7)

    def forward(self, image: Tensor) -> Tensor:
        features = self.cnn(image)
        assert features.size(2) == 1, "the height must be 8"
        out, _ = self.rnn(features.squeeze(2).permute(2, 0, 1))
        return self.head(out).log_softmax(-1)


class Separator(nn.Module):
    """A separator of sounds that cuts the input into overlapping chunks and looks within and across them."""

    def __init__(self) -> None:
        super().__init__()
        self.within, self.across = (nn.LSTM(4, 3, bidirectional=True, batch_first=True) for _ in range(2))
        self.mix, self.mix_across = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, size = x.shape
        chunk, hop = 4, 2
        gap = (hop - (steps - chunk) % hop) % hop
        x = nn.functional.pad(x, (0, 0, 0, gap))
        chunks = x.unfold(1, chunk, hop).permute(0, 1, 3, 2)  # [B, S, K, F]
        count = chunks.size(1)
        rows = chunks.reshape(batch * count, chunk, size)
        rows = rows + self.mix(self.within(rows)[0])
        turned = rows.view(batch, count, chunk, size).transpose(1, 2).reshape(batch * chunk, count, size)
        turned = turned + self.mix_across(self.across(turned)[0])
        return turned.view(batch, chunk, count, size).mean(1)


class Tagger(nn.Module):
    """A tagger of words of unequal sentences, cut at the longest of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(11, 4), nn.GRU(4, 5, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(words), lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(out)


class Sampler(nn.Module):
    """A generator that feeds its own choice back until all rows have ended, or twelve steps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(9, 4), nn.GRUCell(4, 6), nn.Linear(6, 9)

    def forward(self, h: Tensor) -> Tensor:
        token = torch.zeros(h.size(0), dtype=torch.long)
        done = torch.zeros(h.size(0), dtype=torch.bool)
        chosen = []
        for _ in range(12):
            h = self.cell(self.embed(token), h)
            token = self.head(h).argmax(-1)
            chosen.append(token)
            done = done | (token == 8)
            if bool(done.all()):
                break
        return torch.stack(chosen, 1)


class WeightDrop(nn.Module):
    """A layer whose recurrent weights are dropped before each call, as AWD-LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.LSTM(3, 4)
        raw = self.module.weight_hh_l0
        self.raw = nn.Parameter(raw.data)
        del self.module._parameters["weight_hh_l0"]
        self.module.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5, False)

    def forward(self, x: Tensor) -> Tensor:
        self.module.weight_hh_l0 = nn.functional.dropout(self.raw, 0.5, self.training)
        return self.module(x)[0]


class Vocoder(nn.Module):
    """A vocoder: upsampled conditions, and a cell that hears its own last sample."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.cell, self.out = nn.ConvTranspose1d(4, 3, 2, stride=2), nn.GRUCell(4, 5), nn.Linear(5, 1)

    def forward(self, mel: Tensor) -> Tensor:
        conditions = self.up(mel).transpose(1, 2)
        sample, h = mel.new_zeros(mel.size(0), 1), mel.new_zeros(mel.size(0), 5)
        samples = []
        for t in range(conditions.size(1)):
            h = self.cell(torch.cat([conditions[:, t], sample], 1), h)
            sample = self.out(h).tanh()
            samples.append(sample)
        return torch.cat(samples, 1)


class SetReadout(nn.Module):
    """A readout of a set by repeated attention with a state, as Set2Set."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4)

    def forward(self, nodes: Tensor) -> Tensor:
        batch = nodes.size(0)
        state = (nodes.new_zeros(1, batch, 4), nodes.new_zeros(1, batch, 4))
        star = nodes.new_zeros(batch, 8)
        for _ in range(3):
            query, state = self.lstm(star.unsqueeze(0), state)
            query = query.view(batch, 4)
            weight = (nodes * query.unsqueeze(1)).sum(-1).softmax(1)
            star = torch.cat([query, (weight.unsqueeze(-1) * nodes).sum(1)], -1)
        return star


class Neighbours(nn.Module):
    """A layer of a graph that runs over the neighbours of each node, as GraphSAGE with an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.own = nn.LSTM(4, 4, batch_first=True), nn.Linear(8, 5)

    def forward(self, features: Tensor, neighbours: Tensor) -> Tensor:
        nodes, degree = neighbours.shape
        messages = features[neighbours.reshape(-1)].view(nodes, degree, -1)
        _, (h, _) = self.lstm(messages)
        return self.own(torch.cat([features, h.squeeze(0)], -1)).relu()


class Speech(nn.Module):
    """A recognizer of speech: a strided convolution, packed bidirectional layers by the lengths that it leaves, CTC."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm = nn.Conv1d(5, 6, 3, stride=2, padding=1), nn.LSTM(6, 4, 2, bidirectional=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x.transpose(1, 2)).relu().permute(2, 0, 1)
        lengths = torch.div(lengths - 1, 2, rounding_mode="floor") + 1
        packed = pack_padded_sequence(h, lengths, enforce_sorted=False)
        out, lengths = pad_packed_sequence(self.lstm(packed)[0], total_length=h.size(0))
        return self.head(out).log_softmax(-1), lengths


class Memory(nn.Module):
    """A model that keeps its state in an attribute between calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.h = nn.GRU(3, 4), None

    def forward(self, x: Tensor) -> Tensor:
        out, self.h = self.gru(x, self.h)
        return out


class Documents(nn.Module):
    """Sentences of a document in a Python list, packed from there."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4)

    def forward(self, *sentences: Tensor) -> Tensor:
        _, h = self.gru(pack_sequence(list(sentences), enforce_sorted=False))
        return h[-1]


@dataclass(frozen=True)
class Person:
    """A model, its example, and how its file may be had."""

    make: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    shapes: Any
    """Its sizes that may be open in a file"""
    route: str
    """The way to a file that `capture="auto"` takes; `none` if there is none"""
    other: Callable[[], tuple[Any, ...]] | None = None
    """Arguments of another batch size"""
    refused: str = ""
    """What is said where there is no way to a file"""
    package: str = ""
    """The published package that the model is of"""
    double: bool = True
    """Whether a copy in float64 can run"""
    time: tuple[int, int] | None = None
    """The argument that a stream has in pieces, and its axis of time, where there is one"""

    @property
    def name(self) -> str:
        return self.make.__name__


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _policy(batch: int, *starts: int) -> tuple[Tensor, ...]:
    flags = torch.zeros(4, batch, dtype=torch.bool)
    for row in starts:
        flags[row, 0] = True
    return floats(4, batch, 4), floats(1, batch, 5), floats(1, batch, 5), flags


BATCH = {0: "batch"}

ASSIGNED = "export" if EXPORTS_ASSIGNED_WEIGHTS else "trace"
"""The way of a model that assigns a tensor where a layer had a parameter"""

PEOPLE = [
    Person(AttentionDecoder, lambda: (floats(2, 7, 6),), (BATCH,), "export", lambda: (floats(3, 7, 6),)),
    Person(Policy, lambda: _policy(2, 1), ({1: "batch"},) * 4, "trace", lambda: _policy(3, 0, 2)),
    Person(
        SortedEncoder,
        lambda: (floats(3, 6, 3), torch.tensor([2, 6, 4])),
        (BATCH, BATCH),
        "trace",
        lambda: (floats(2, 6, 3), torch.tensor([5, 1])),
    ),
    Person(Recognizer, lambda: (floats(2, 1, 8, 16),), (BATCH,), "export", lambda: (floats(3, 1, 8, 16),)),
    Person(Separator, lambda: (floats(2, 11, 4),), (BATCH,), "export", lambda: (floats(3, 11, 4),)),
    Person(
        Tagger,
        lambda: (torch.arange(12).reshape(2, 6) % 11, torch.tensor([6, 3])),
        (BATCH, BATCH),
        "export",
        lambda: (torch.arange(18).reshape(3, 6) % 11, torch.tensor([2, 5, 4])),
    ),
    Person(Sampler, lambda: (floats(2, 6),), (BATCH,), "trace", lambda: (floats(3, 6),)),
    Person(WeightDrop, lambda: (floats(5, 2, 3),), ({1: "batch"},), ASSIGNED, lambda: (floats(5, 3, 3),), time=(0, 0)),
    Person(Vocoder, lambda: (floats(2, 4, 6),), (BATCH,), "export", lambda: (floats(3, 4, 6),)),
    Person(SetReadout, lambda: (floats(2, 5, 4),), (BATCH,), "export", lambda: (floats(3, 5, 4),)),
    Person(
        Neighbours,
        lambda: (floats(6, 4), torch.arange(18).reshape(6, 3) % 6),
        ({0: "nodes"}, {0: "nodes"}),
        "export",
        lambda: (floats(4, 4), torch.arange(12).reshape(4, 3) % 4),
        time=(1, 1),
    ),
    Person(
        Speech,
        lambda: (floats(2, 9, 5), torch.tensor([9, 6])),
        (BATCH, BATCH),
        "export",
        lambda: (floats(3, 9, 5), torch.tensor([3, 9, 1])),
    ),
    Person(
        Memory,
        lambda: (floats(5, 2, 3),),
        None,
        "none",
        refused="keeps state between calls in h: make it an argument and a result",
    ),
    Person(Documents, lambda: (floats(4, 3), floats(2, 3)), None, "export"),
]
