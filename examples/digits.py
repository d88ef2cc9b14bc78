"""The whole way of a recurrent model: train, unroll, compare, export to ONNX, run in ONNX Runtime, compile.

The images are scikit-learn's handwritten digits, 1797 of 8 x 8 pixels, each read as a sequence of eight rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from unroll import compare, export_onnx, unroll

RECURRENT = {"LSTM", "GRU", "RNN", "Loop", "Scan"}


class Reader(nn.Module):
    """Reads the rows of an image downwards and upwards; gives a score for each digit, `[B, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.GRU(8, 64, batch_first=True, bidirectional=True)
        self.head = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        _, last = self.rows(images)
        return self.head(torch.cat([last[0], last[1]], 1))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images `[N, 8, 8]` from 0 to 1 and their digits `[N]`: 1347 to train on, then 450 to test on."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 16, dtype=torch.float32)
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images))
    train, test = order[:1347], order[1347:]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


def session(file: Path) -> Callable[[Tensor], Tensor]:
    """The model in the file, run by ONNX Runtime with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    runtime = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(runtime.run(None, {"images": images.numpy()})[0])


def milliseconds(forms: dict[str, Callable[[Tensor], Tensor]], images: Tensor, rounds: int = 51) -> dict[str, float]:
    """Median time of each form; they take turns, so that a busy moment of the machine meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = time.perf_counter()
            form(images)
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="rounds of training (%(default)s)")
    parser.add_argument("--file", type=Path, default=Path("digits.onnx"), help="what to export to (%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def tell(what: str, begin: float) -> None:
        print(f"{what:<58}{time.perf_counter() - begin:6.1f} s", flush=True)

    train_images, train_labels, images, labels = digits()
    model = Reader()
    begin = time.perf_counter()
    train(model, train_images, train_labels, options.epochs)
    model.eval()
    tell(f"Trained nn.GRU(8, 64, bidirectional=True) for {options.epochs} epochs", begin)

    with torch.no_grad():
        begin = time.perf_counter()
        unrolled = unroll(model)
        report = compare(model, unrolled, (images,), gradients=True).check()
        tell(f"Unrolled it; scores and {len(report.rows) - 1} gradients agree", begin)

        begin = time.perf_counter()
        exported = export_onnx(
            model,
            (images[:2],),
            options.file,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["images"],
            output_names=["scores"],
        )
        in_runtime = session(options.file)
        counts = exported.operators
        assert not RECURRENT & counts.keys(), counts
        tell("Exported it to ONNX and loaded it in ONNX Runtime", begin)

        begin = time.perf_counter()
        compiled = torch.compile(unrolled, fullgraph=True)
        compiled(images)
        tell("Compiled it as one graph, torch.compile(fullgraph=True)", begin)

        forms = {
            "nn.GRU": model,
            "unrolled": unrolled,
            "unrolled, torch.compile": compiled,
            "unrolled, ONNX Runtime": in_runtime,
        }
        results = {name: form(images) for name, form in forms.items()}
        times = milliseconds(forms, images)

    expected = results["nn.GRU"]
    print()
    print(f"{'':<24}{'right':>8}{'same predictions':>20}{'largest difference':>21}{'time':>12}")
    for name, scores in results.items():
        right = (scores.argmax(1) == labels).float().mean().item()
        same = int((scores.argmax(1) == expected.argmax(1)).sum())
        difference = (scores - expected).abs().max().item()
        agreed = f"{same} of {len(images)}"
        print(f"{name:<24}{right:>8.1%}{agreed:>20}{difference:>21.1e}{times[name]:>9.2f} ms")
        assert same == len(images)
        assert difference <= 1e-4
    print(f"\nTimes are medians for all {len(images)} test images at once, on one thread.")
    print(f"Operators in {options.file}: " + ", ".join(f"{count} {kind}" for kind, count in counts.most_common()))
    print("No LSTM, GRU, RNN, Loop or Scan among them.")


if __name__ == "__main__":
    main()
