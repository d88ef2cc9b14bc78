"""Models in the hands of DDP and FSDP, as far as one process shows it; examples/train_distributed.py runs on two."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.checks import assert_same
from unroll import UnrollError, streaming, unroll

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="needs a PyTorch with torch.distributed"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning"),
]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.rnn = nn.GRU(3, 5)

    def forward(self, x):
        return self.rnn(self.encoder(x))[0] * 1


@pytest.fixture(autouse=True)
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model, *parts):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for part in (*parts, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    return model


def wrapped(model):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


@pytest.mark.parametrize("shard", [sharded, wrapped])
def test_what_is_sharded_is_refused(shard):
    model, x = shard(Model()), torch.randn(4, 2, 3)
    for refuse in (unroll, lambda m: streaming(m, x)):
        with pytest.raises(UnrollError, match="unroll the model first, shard the result, and drop the original"):
            refuse(model)


def test_each_part_that_is_sharded_is_named():
    model = Model()
    sharded(model, model.encoder)
    with pytest.raises(UnrollError) as caught:
        unroll(model)
    assert [problem.place for problem in caught.value.problems] == ["FSDPModel", "encoder"]


def test_shards_end_the_sharing():
    fused, x = Model(), torch.randn(4, 2, 3)
    expected, model = fused(x), sharded(unroll(fused))
    assert_same(model(x), expected, rtol=1e-5)
    assert not set(map(id, fused.parameters())) & set(map(id, model.parameters()))
    assert list(model.state_dict()) == list(fused.state_dict())


@pytest.mark.parametrize("first", ["unroll", "DDP"])
def test_ddp_keeps_the_sharing(first):
    fused, x = Model(), torch.randn(4, 2, 3)
    ddp = nn.parallel.DistributedDataParallel
    model = ddp(unroll(fused)) if first == "unroll" else unroll(ddp(fused))
    assert [id(p) for p in model.parameters()] == [id(p) for p in fused.parameters()]
    model(x).square().sum().backward()
    found = [p.grad for p in fused.parameters()]
    fused.zero_grad()
    fused(x).square().sum().backward()
    assert all(map(torch.allclose, found, [p.grad for p in fused.parameters()]))
