"""A streaming model for the browser: a word of two tones is looked for, 64 ms at a time, by onnxruntime-web.

    npm install onnxruntime-web
    python examples/browser/make_page.py page --modules node_modules
    python -m http.server --directory page

The model is a fixed filter bank, an LSTM over frames of 16 ms, and a linear layer; it is trained for some seconds on
sounds that are made here. The word is a low tone and then a high one; the other order, or one tone alone, is none, so
that only the LSTM's state can tell. The page holds two files of it, one with all steps unrolled and states as named
inputs and outputs, one with torch's own LSTM operator, and runs both in WebAssembly and, where there is one, on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from unroll import export_onnx, streaming

RATE, FRAME, PIECE = 16_000, 256, 4
"""Samples in a second and in a frame; frames in a piece"""

LOW, HIGH, TONE = 500, 1500, 9
"""Hertz of the two tones, and frames that each lasts"""


class Word(nn.Module):
    """The probability that the word was just said, after each frame: `[T, B, 256]` to `[T, B]`."""

    def __init__(self, bands: int = 24, hidden: int = 48) -> None:
        super().__init__()
        angles = 2 * math.pi * (torch.arange(bands) + 1)[:, None] * 2 * torch.arange(FRAME) / FRAME
        waves = torch.cat([angles.cos(), angles.sin()]) * torch.hann_window(FRAME)
        self.register_buffer("waves", waves.T.contiguous())
        self.lstm = nn.LSTM(bands, hidden)
        self.word = nn.Linear(hidden, 1)

    def features(self, frames: Tensor) -> Tensor:
        real, imaginary = (frames @ self.waves).chunk(2, -1)
        return torch.log1p(real * real + imaginary * imaginary)

    def forward(self, frames: Tensor) -> Tensor:
        return torch.sigmoid(self.word(self.lstm(self.features(frames))[0])).squeeze(-1)


class WithStates(nn.Module):
    """The same with the states of torch's layer as arguments and results."""

    def __init__(self, model: Word) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output, (h, c) = self.model.lstm(self.model.features(frames), (h, c))
        return torch.sigmoid(self.model.word(output)).squeeze(-1), h, c


def sounds(count: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sounds `[T, count, 256]` with pairs of tones in any order, and whether the word was just said, `[T, count]`."""
    audio = 0.03 * torch.randn(count, frames * FRAME, generator=generator)
    said = torch.zeros(frames, count)
    clock = torch.arange(TONE * FRAME) / RATE
    for row in range(count):
        begin = 4
        while begin + 4 * TONE < frames:
            tones = [(LOW, HIGH)[k] for k in torch.randint(2, (2,), generator=generator).tolist()]
            for tone in tones:
                part = slice(begin * FRAME, (begin + TONE) * FRAME)
                audio[row, part] += 0.3 * torch.sin(2 * math.pi * tone * clock) * torch.hann_window(TONE * FRAME)
                begin += TONE
            said[begin - 2 : begin + 8, row] = float(tones == [LOW, HIGH])
            begin += 12 + int(torch.randint(12, (), generator=generator))
    return audio.reshape(count, frames, FRAME).transpose(0, 1).contiguous(), said


def train(model: Word, generator: torch.Generator, rounds: int = 120) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(rounds):
        frames, said = sounds(16, 120, generator)
        loss = nn.functional.binary_cross_entropy(model(frames), said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--modules", type=Path, default=Path("node_modules"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = Word()
    train(model, generator)
    model.eval()

    frames, said = sounds(1, 750 // PIECE * PIECE, generator)
    with torch.no_grad():
        exact = Word().double()
        exact.load_state_dict(model.state_dict())
        expected = exact(frames.double())
    piece = frames[:PIECE]
    streamed = streaming(model, piece)
    names = {"input_names": ["frames"], "output_names": ["word"]}
    export_onnx(streamed, piece, options.folder / "unrolled.onnx", plan="webgpu", **names)
    native = WithStates(model).eval()
    state = torch.zeros(1, 1, model.lstm.hidden_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its older exporter, which keeps the operator
        torch.onnx.export(
            native,
            (piece, state, state),
            str(options.folder / "native.onnx"),
            dynamo=False,
            input_names=["frames", "h", "c"],
            output_names=["word", "h.next", "c.next"],
        )
    (options.folder / "sound.f32").write_bytes(frames.numpy().tobytes())
    (options.folder / "expected.json").write_text(
        json.dumps({"rate": RATE, "frame": FRAME, "piece": PIECE, "word": expected.flatten().tolist()})
    )
    shutil.copy(Path(__file__).with_name("index.html"), options.folder)
    for file in (options.modules / "onnxruntime-web" / "dist").glob("ort*"):
        if file.name == "ort.webgpu.min.mjs" or file.name.startswith("ort-wasm"):
            shutil.copy(file, options.folder)
    right = ((expected > 0.5) == (said > 0.5)).double().mean().item()
    print(f"{len(frames) * FRAME / RATE:.0f} s of sound, {right:.0%} of its frames are told right")
    print(f"python -m http.server --directory {options.folder}")


if __name__ == "__main__":
    main()
