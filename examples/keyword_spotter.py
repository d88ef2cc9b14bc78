"""A streaming keyword spotter with a convolution over time, whose border is a state beside that of the LSTM.

The word is that of examples/browser: a low tone and then a high one. Before the LSTM stands a convolution over five
frames. It looks back only, and what it looks back at, the last four frames of the piece before, is an argument and a
result of the model; `unroll.streaming` adds the states of the LSTM. So pieces of any length give what the whole
recording gives, in PyTorch and in ONNX Runtime.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from unroll import Stream, export_onnx, streaming

sys.path.append(str(Path(__file__).parent / "browser"))
from make_page import Word, sounds


class CausalConvolution(nn.Module):
    """A convolution over time that looks back alone: `[T, B, F]` and a border `[K - 1, B, F]` to the same two."""

    def __init__(self, features: int, kernel: int) -> None:
        super().__init__()
        self.kernel, self.features = kernel, features
        self.convolution = nn.Conv1d(features, features, kernel)

    def border(self, batch: int) -> Tensor:
        """Silence before the first frame."""
        return torch.zeros(self.kernel - 1, batch, self.features)

    def forward(self, x: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.cat([border, x])
        y = self.convolution(rows.permute(1, 2, 0)).permute(2, 0, 1)
        return y, rows[rows.shape[0] - self.kernel + 1 :]


class Spotter(Word):
    """The probability that the word was just said, after each frame, and the border: `[T, B, 256]` to `[T, B]`."""

    def __init__(self, bands: int = 24, kernel: int = 5) -> None:
        super().__init__(bands)
        self.causal = CausalConvolution(bands, kernel)

    def forward(self, frames: Tensor, border: Tensor) -> tuple[Tensor, Tensor]:
        features, border = self.causal(self.features(frames), border)
        return torch.sigmoid(self.word(self.lstm(features)[0])).squeeze(-1), border


def train(model: Spotter, generator: torch.Generator, rounds: int = 120) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(rounds):
        frames, said = sounds(16, 120, generator)
        loss = nn.functional.binary_cross_entropy(model(frames, model.causal.border(16))[0], said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def in_torch(stream: Stream, pieces: list[Tensor], border: Tensor) -> Tensor:
    """The probabilities of a recording that comes in pieces; the stream carries the LSTM's states alone."""
    found = []
    for piece in pieces:
        word, border = stream(piece, border)
        found.append(word)
    return torch.cat(found)


def in_onnx_runtime(stream: Stream, pieces: list[Tensor], border: Tensor) -> Tensor:
    """The same; an input `border` and an output `border.next` are a state too, which begins with zeros."""
    return torch.cat([stream(piece.contiguous()) for piece in pieces])


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = Spotter()
    train(model, generator)
    model.eval()

    frames, said = sounds(2, 240, generator)
    border = model.causal.border(2)
    with torch.no_grad():
        whole = model(frames, border)[0]
    told, right = whole > 0.5, said > 0.5
    print(f"{(told & right).sum()} of {right.sum()} frames after the word are told, ", end="")
    print(f"and {(told & ~right).sum()} of {(~right).sum()} others")

    # The border is the model's own, and no piece tells it: streaming need not look for what looks along time.
    streamed = streaming(model, (frames[:4], border), check=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spotter.onnx"
        names = {"input_names": ["frames", "border"], "output_names": ["word", "border.next"]}
        export_onnx(
            streamed, (frames[:4], border), path, dynamic_shapes=({0: "time", 1: "batch"}, {1: "batch"}), **names
        )
        streams = {"torch": Stream(streamed, batch=2), "ONNX Runtime": Stream(path, batch=2)}
    print(f"states in the file: {', '.join(streams['ONNX Runtime'].state)}")
    ways = {"torch": in_torch, "ONNX Runtime": in_onnx_runtime}
    for sizes in ([4] * 60, [1] * 240, [100, 37, 3, 100]):
        for name, run in ways.items():
            streams[name].reset()
            pieces = run(streams[name], list(frames.split(sizes)), border)
            difference = (pieces - whole).abs().max().item()
            print(f"{len(sizes):>4} pieces, {name:<13} largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
