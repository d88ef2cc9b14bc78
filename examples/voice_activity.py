"""Voice activity, 32 ms at a time: a streaming model in ONNX Runtime against the offline model on the whole recording.

The model has the shape of the well-known open ones: a window of 512 samples at 16 kHz, with 64 samples of the window
before, goes through a learned filter bank (a convolution that begins as a short-time Fourier transform, and the
magnitude of its halves), convolutions over the frames of the window, an LSTM over the windows, a linear layer and a
sigmoid. It is trained for some seconds on synthetic audio, where bursts of harmonic tones are the voice and noise is
not. The convolutions see one window each, so that the LSTM's state is all that a window needs of those before.
"""

import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from unroll import Stream, export_onnx, streaming

RATE, WINDOW, CONTEXT, FRAME, HOP = 16_000, 512, 64, 256, 128
"""Samples: in a second, in a window, before it, in a frame of the filter bank and between frames."""


class VoiceActivity(nn.Module):
    """The probability of voice in each window: `[B, T, 576]` to `[B, T]`."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        bins = FRAME // 2 + 1
        self.bank = nn.Conv1d(1, 2 * bins, FRAME, HOP, bias=False)
        angles = 2 * math.pi * torch.arange(bins)[:, None] * torch.arange(FRAME) / FRAME
        waves = torch.cat([angles.cos(), angles.sin()]) * torch.hann_window(FRAME)
        self.bank.weight = nn.Parameter(waves[:, None])
        self.convolutions = nn.Sequential(
            nn.Conv1d(bins, 64, 3, padding=1), nn.ReLU(), nn.Conv1d(64, hidden, 3, stride=2), nn.ReLU()
        )
        self.lstm = nn.LSTM(hidden, hidden, batch_first=True)
        self.voice = nn.Linear(hidden, 1)

    def forward(self, windows: Tensor) -> Tensor:
        batch, steps, samples = windows.shape
        real, imaginary = self.bank(windows.reshape(-1, 1, samples)).chunk(2, 1)
        spectrum = torch.log1p(real * real + imaginary * imaginary)
        features = self.convolutions(spectrum).flatten(1).reshape(batch, steps, -1)
        return torch.sigmoid(self.voice(self.lstm(features)[0])).squeeze(-1)


def recordings(count: int, seconds: float) -> tuple[Tensor, Tensor]:
    """Windows `[count, T, 576]` of audio with bursts of voice, and which of them have voice, `[count, T]`."""
    steps = int(seconds * RATE) // WINDOW
    clock = torch.arange(steps * WINDOW) / RATE
    audio = torch.zeros(count, steps * WINDOW)
    voiced = torch.zeros(count, steps)
    for row in range(count):
        level = 0.01 + 0.05 * torch.rand(1)
        audio[row] = level * torch.randn(steps * WINDOW)
        begin = 0
        while begin < steps:
            quiet, loud = torch.randint(5, 25, (2,)).tolist()
            begin += quiet
            part = slice(begin * WINDOW, (begin + loud) * WINDOW)
            pitch = 90 + 160 * torch.rand(1)
            if torch.rand(1) < 0.7:
                tones = [torch.sin(2 * math.pi * pitch * k * clock[part]) / k for k in range(1, 9)]
                audio[row, part] += 0.2 * sum(tones)
                voiced[row, begin : begin + loud] = 1
            else:  # a burst of noise, as loud, is no voice
                audio[row, part] += 0.2 * torch.randn_like(audio[row, part])
            begin += loud
    return nn.functional.pad(audio, (CONTEXT, 0)).unfold(1, WINDOW + CONTEXT, WINDOW), voiced


def train(model: nn.Module, rounds: int = 25) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(rounds):
        windows, voiced = recordings(8, 3.2)
        loss = nn.functional.binary_cross_entropy(model(windows), voiced)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


torch.manual_seed(0)
torch.set_num_threads(1)
model = VoiceActivity()
train(model)
model.eval()

windows, voiced = recordings(2, 32.0)
with torch.no_grad():
    offline = model(windows)
    exact = VoiceActivity().double()
    exact.load_state_dict(model.state_dict())
    reference = exact(windows.double())

streamed = streaming(model, windows[:1, :1])
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "voice_activity.onnx"
    export_onnx(
        streamed,
        windows[:2, :1].contiguous(),
        path,
        input_names=["audio"],
        output_names=["voice"],
        dynamic_shapes=({0: "batch"},),
    )
    streams = {"torch": Stream(streamed, batch=2), "ONNX Runtime": Stream(path, batch=2)}

right = ((offline > 0.5) == (voiced > 0.5)).double().mean().item()
seconds = windows.shape[1] * WINDOW / RATE
print(f"two recordings of {seconds:.0f} s in {windows.shape[1]} pieces of {1000 * WINDOW // RATE} ms; ", end="")
print(f"{right:.0%} of the pieces are told right offline")
print(f"states: {', '.join(streams['ONNX Runtime'].state)}\n")
titles = ["from offline", "from float64", "offline to float64", "time / audio"]
print("32 ms at a time in    " + "  ".join(titles))
drift = (offline - reference).abs().max().item()
for name, stream in streams.items():
    began = time.perf_counter()
    voice = torch.cat([stream(piece.contiguous()) for piece in windows.split(1, 1)], 1)
    factor = (time.perf_counter() - began) / seconds
    difference, error = ((voice - other).abs().max().item() for other in (offline, reference))
    print(f"{name:<20}  {difference:>12.1e}  {error:>12.1e}  {drift:>18.1e}  {factor:>12.4f}")
    assert difference < 1e-4

stream.reset()
stream(windows[:, :1].contiguous())
for state in stream.state.values():
    state[:, 1] = 0  # another recording begins in the second row
again = stream(windows[:, 1:2].contiguous())
assert torch.allclose(again[0], offline[0, 1:2], atol=1e-4)
with torch.no_grad():
    assert torch.allclose(again[1], model(windows[1:, 1:2])[0], atol=1e-4)
