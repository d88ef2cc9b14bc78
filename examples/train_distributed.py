"""Trains on several processes: by DDP, then sharded by FSDP2, with checkpoints that fused and unrolled models share.

    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py

DDP trains an unrolled model, and with it the fused one that it shares parameters with. `fully_shard` puts other
parameters in their place, so that a model is unrolled first, sharded then, and the original dropped. Checkpoints of
torch.distributed.checkpoint (DCP), of parameters and optimizer, go from fused models to unrolled ones and back. The
result is compared to a fused model that one process trained alone. Runs on CPUs, by gloo; no GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from digits import Reader, digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from unroll import unroll

BATCH = 64


def optimizer_of(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9)


def batches(count: int, epoch: int) -> Iterator[Tensor]:
    """Yield the numbers of the images in each batch of an epoch, the same in all processes."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
    yield from order[: count - count % BATCH].split(BATCH)


def train(
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, epochs: range, rank: int = 0, world: int = 1
) -> None:
    """Train a model on the share of each batch that this process has."""
    for epoch in epochs:
        for batch in batches(len(images), epoch):
            own = batch[rank::world]
            optimizer.zero_grad()
            functional.cross_entropy(model(images[own]), labels[own]).backward()
            optimizer.step()


def save(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    parameters, state = get_state_dict(model, optimizer)
    dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    parameters, state = get_state_dict(model, optimizer)
    dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="rounds of training by DDP, and as many by FSDP2")
    epochs = parser.parse_args().epochs
    if "RANK" not in os.environ:
        parser.error("run by torchrun: torchrun --standalone --nproc-per-node 2 examples/train_distributed.py")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def tell(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    alone = Reader()
    fused = Reader()
    fused.load_state_dict(alone.state_dict())

    def compare(name: str, model: nn.Module) -> None:
        with torch.no_grad():
            scores, expected = model(test_images), alone(test_images)
        right = (scores.argmax(1) == test_labels).sum().item()
        difference = (scores - expected).abs().max().item()
        tell(f"{name:<44} {right} of {len(test_labels)} right, scores differ by {difference:.1e} from one process")

    # With a folder that all processes see; on many machines, one that all machines see.
    folders: list[str | None] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folders)
    folder = Path(str(folders[0]))

    by_one = optimizer_of(alone)
    train(alone, by_one, images, labels, range(epochs))

    # DDP: the unrolled model and the fused one have the same parameters, before and after.
    parallel = DistributedDataParallel(unroll(fused))
    optimizer = optimizer_of(parallel)
    train(parallel, optimizer, images, labels, range(epochs), rank, world)
    compare(f"nn.GRU, trained by DDP on {world} processes", fused)
    save(fused, optimizer, folder / "fused")

    # FSDP2: unrolled first, sharded then; nothing holds the original.
    sharded = unroll(Reader())
    fully_shard(sharded, mesh=init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of(sharded)
    load(sharded, optimizer, folder / "fused")
    compare("its checkpoint in a sharded unrolled model", sharded)
    train(sharded, optimizer, images, labels, range(epochs, 2 * epochs), rank, world)
    train(alone, by_one, images, labels, range(epochs, 2 * epochs))
    compare(f"the same, trained on by FSDP2 on {world} processes", sharded)
    save(sharded, optimizer, folder / "unrolled")

    # And back, where nothing is sharded or unrolled.
    last = Reader()
    load(last, optimizer_of(last), folder / "unrolled")
    compare("its checkpoint in an nn.GRU", last)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
