"""Trains a reader of handwritten digits privately, with Opacus: no image moves the weights by more than the noise.

Opacus has recurrent layers of its own, and takes none of torch's. With `plan="quantize"` the products of an unrolled
layer are `nn.Linear` modules, whose gradients of each sample Opacus knows; the parameters stay those of the nn.GRU.
Needs Opacus: pip install opacus.
"""

from __future__ import annotations

import argparse

import torch
from digits import Reader, digits
from opacus import PrivacyEngine
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from unroll import unroll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10, help="rounds of training (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.6, help="multiplier of the noise (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = Reader()
    private = unroll(model, plan="quantize")
    optimizer = torch.optim.Adam(private.parameters(), lr=0.005)
    engine = PrivacyEngine(accountant="rdp")
    private, optimizer, loader = engine.make_private(
        module=private,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(images, labels), batch_size=128),
        noise_multiplier=options.noise,
        max_grad_norm=1.0,
    )
    for _ in range(options.epochs):
        for batch, wanted in loader:
            optimizer.zero_grad()
            functional.cross_entropy(private(batch), wanted).backward()
            optimizer.step()

    model.eval()
    with torch.no_grad():
        right = (model(test_images).argmax(1) == test_labels).sum().item()
    print(f"the nn.GRU, whose parameters were trained: {right} of {len(test_labels)} right")
    print(f"epsilon {engine.get_epsilon(delta=1e-4):.1f} at delta 1e-4")


if __name__ == "__main__":
    main()
