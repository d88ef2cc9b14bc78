"""Torch-TensorRT converts whole unrolled programs, on TensorRT for RTX, up to the point that needs a driver."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from tests.cases import Case
from unroll import unroll

if find_spec("torch_tensorrt") is None or find_spec("tensorrt_rtx_bindings") is None:
    pytest.skip("needs Torch-TensorRT and TensorRT for RTX: make test-torch-tensorrt", allow_module_level=True)

pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore")]

CASES = [
    Case("LSTM", num_layers=2, bidirectional=True, batch_first=True, state=True),
    Case("LSTM", proj_size=2),
    Case("GRU", state=True),
    Case("RNN", num_layers=2),
]


@pytest.fixture
def dynamo(monkeypatch):
    """Import Torch-TensorRT on a machine without a GPU: it asks for one while it is imported and while it converts."""
    import tensorrt_rtx_bindings  # pyright: ignore[reportMissingImports]

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_rtx_bindings)
    answers = {"get_device_capability": (8, 9), "mem_get_info": (2**33, 2**33), "current_device": 0, "set_device": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *device, answer=answer: answer)
    import torch_tensorrt  # pyright: ignore[reportMissingImports]

    return torch_tensorrt.dynamo


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_nodes_are_converted(case, dynamo):
    from torch_tensorrt.dynamo.partitioning import (  # pyright: ignore[reportMissingImports]
        get_graph_converter_support,
    )

    program = torch.export.export(case.model().eval(), case.tensors())
    unrolled = unroll(program, plan="tensorrt").run_decompositions()
    converted, nodes = get_graph_converter_support(unrolled.graph_module, set())
    assert converted == nodes >= 10


def test_a_program_is_built_whole_and_then_needs_a_driver(dynamo):
    case = Case("GRU", steps=3)
    program = unroll(torch.export.export(case.model().eval(), case.tensors()), plan="tensorrt")
    build = dynamo.convert_exported_program_to_serialized_trt_engine
    with pytest.raises(RuntimeError, match="While interpreting the module") as caught:
        build(program, arg_inputs=list(case.tensors()), require_full_compilation=True)
    assert "assert cuda_engine" in str(caught.getrepr())  # the engine is built, and cannot be loaded
