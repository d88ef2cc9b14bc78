"""On a GPU that is not there: fake tensors of a CUDA device go through unrolled models, and none is left on the CPU."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from tests.cases import ALL_PLANS, CHOSEN, Case
from tests.torchscript.test_scripts import model_of
from unroll import trace, unroll


@pytest.fixture
def fake():
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=False):  # which would have to be there
        yield FakeTensorMode(allow_non_fake_inputs=False, shape_env=ShapeEnv())


def on_cuda(model):
    """The model with parameters that have a shape and a device and nothing else."""
    for module in model.modules():
        for name, weight in [*module._parameters.items()]:
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.empty(weight.shape, device="cuda"), requires_grad=False)
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return model


def arguments(case):
    return tuple(torch.empty(tensor.shape, device="cuda") for tensor in case.tensors())


def assert_on_cuda(values):
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    assert tensors
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def assert_all_on_cuda(case, plan, fake):
    model = model_of(case, torch.float32)
    module, graph = unroll(model, plan=plan), unroll(trace(model), case.tensors(), plan=plan)
    with fake:
        assert_on_cuda(on_cuda(module)(*arguments(case)))
        assert_on_cuda(on_cuda(graph)(*arguments(case)))
        if case.is_cell:  # torch.export would ask for the original's own kernel
            return
        program = torch.export.export(on_cuda(model), arguments(case), strict=False)
    assert_on_cuda([node.meta.get("val") for node in unroll(program, plan=plan).graph.nodes])


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_every_layer(case, fake):
    assert_all_on_cuda(case, None, fake)


def test_a_cell_without_bias_is_exported_once_it_is_unrolled(fake):
    """PyTorch's shape function of its fused LSTM cell reads the biases that are not there."""
    model, x = nn.Sequential(nn.LSTMCell(6, 5, bias=False)), (Case("LSTMCell"),)
    with fake:
        args = arguments(*x)
        with pytest.raises(AttributeError, match="has no attribute 'device'"):
            torch.export.export(on_cuda(model), args, strict=False)
        program = torch.export.export(on_cuda(unroll(model)), args, strict=False)
    assert_on_cuda([node.meta.get("val") for node in program.graph.nodes])


@pytest.mark.parametrize("two", [False, True], ids=["one_direction", "two_directions"])
@pytest.mark.parametrize("plan", ALL_PLANS, ids=str)
def test_every_plan(plan, two, fake):
    assert_all_on_cuda(Case("LSTM", num_layers=2, bidirectional=two), plan, fake)
