"""Runs an exported model over many rows by Ray Data: `map_batches`, with a session of ONNX Runtime in each worker.

Workers run the file by ONNX Runtime alone, with no model in Python. The same script starts Ray on this machine or,
where `RAY_ADDRESS` names one, runs on a cluster. Needs Ray: pip install "ray[data]".
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import ray
import torch
from digits import Reader, digits, train

from unroll import export_onnx


class Scorer:
    """Made once in each worker, of the bytes of the file; a worker on another machine sees no path of this one."""

    def __init__(self, file: bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (scores,) = self.session.run(None, {"images": np.stack(batch["image"]).astype(np.float32)})
        return {"number": batch["number"], "scores": scores, "worker": np.full(len(scores), os.getpid())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="rounds of training (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="how many run the file (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    train_images, train_labels, images, labels = digits()
    model = Reader()
    train(model, train_images, train_labels, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.onnx"
        export_onnx(model.eval(), images, file, dynamic_shapes=({0: "batch"},))
        content = file.read_bytes()

    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:  # one machine, with a processor for each worker and one to read
        ray.init(num_cpus=options.workers + 1, include_dashboard=False)
    rows = ray.data.from_items([{"number": k, "image": image} for k, image in enumerate(images.numpy())])
    workers = ray.data.ActorPoolStrategy(size=options.workers)
    scored = rows.map_batches(
        Scorer, fn_constructor_args=(content,), batch_size=options.batch, compute=workers
    ).take_all()
    ray.shutdown()

    scored.sort(key=lambda row: row["number"])
    with torch.no_grad():
        expected = model(images)
    scores = torch.tensor(np.stack([row["scores"] for row in scored]))
    right = (scores.argmax(1) == labels).sum().item()
    count = len({row["worker"] for row in scored})
    print(f"{len(scored)} rows from {count} of {options.workers} workers, {right} right")
    print(f"largest difference from nn.GRU: {(scores - expected).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
