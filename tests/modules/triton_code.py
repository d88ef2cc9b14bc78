"""Counts the kernels of the code that Inductor writes for a GPU, on a machine that need not have one.

    python -m tests.modules.triton_code '[{"kind": "LSTM", "steps": 64, "batch": 16}]'

prints the counts of each form, a line of JSON. It needs PyTorch's build for CUDA, with Triton; nothing is compiled by
Triton and nothing is run. What asks the driver is stood in for, throughout this process: it is one for this alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

# Workers would start with the stand-ins, and never end.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
# What lengths go through stays on the CPU, and is not counted: the processor need not be tried for vector code.
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"

import torch
import torch._inductor.config as inductor
from torch import nn
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

HOPPER = SimpleNamespace(
    name="none",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
    uuid="0",
)
"""The properties of the card that the code is written for"""


class Driver:
    """Triton's driver, as far as the writing of code asks it."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * HOPPER.major + HOPPER.minor, HOPPER.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


class OnCPU(TorchDispatchMode):
    """Makes tensors on the CPU whatever device is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{k: "cpu" if k == "device" else value for k, value in (kwargs or {}).items()})


def stand_in() -> None:
    """Have this process believe in a card."""
    import torch._subclasses.fake_tensor as fake_tensor
    import triton
    from torch._inductor.fx_passes import joint_graph, post_grad

    for passes in (joint_graph, post_grad):  # patterns are traced, on a card if there is one
        passes.lazy_init(torch.device("cpu"))
        passes.lazy_init = lambda *_: None
    triton.runtime.driver.set_active(Driver())
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduced(folder: Any, node: Any) -> Any:
        with OnCPU():
            return deduce(folder, node)

    joint_graph.UniformValueConstantFolder._deduce_value = deduced  # which computes what is constant, such as zeros
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (HOPPER.major, HOPPER.minor),
        "_get_device_properties": HOPPER,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        **dict.fromkeys(("set_rng_state", "set_device", "synchronize", "_lazy_init")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    torch.accelerator.is_available = lambda: False  # whose streams nobody needs
    fake_tensor.init_gpu_context = lambda device: None


class Written(Exception):
    """Raised in place of a run."""


def written(model: nn.Module, *args: Any, trained: bool = False) -> list[str]:
    """Return the code that Inductor writes for a call, the backward's too if `trained`."""
    found: list[str] = []

    def keep(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        found.append(code.value)

        def call(*_: Any) -> None:
            raise Written

        return SimpleNamespace(call=call, __file__="", __name__="", runner=None)

    GraphLowering.compile_to_module = keep
    torch.compiler.reset()
    patches: dict[str, Any] = {"force_disable_caches": True}
    eager = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with torch.set_grad_enabled(trained), inductor.patch(patches), eager:
        try:
            torch.compile(model, fullgraph=True)(*args)
        except Written:
            return found
    raise AssertionError("nothing was written")


def counts(code: str) -> dict[str, Any]:
    """Count what is in the code: kernels that differ, sources that do, and launches."""
    kernels = dict(re.findall(r"(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL))
    # apart from their names and from constants, such as the place of a row
    bare = {re.sub(r"\b(tmp|xmask|tl|x|r0|r)?\w*\d+\w*\b|triton_\w+", "", source) for source in kernels.values()}
    called = Counter(re.findall(r"extern_kernels\.(\w+)\(", code))
    called.update(f"aten.{name}" for name in re.findall(r"= torch\.ops\.aten\.(\w+)\.", code))
    triton = len(re.findall(r"^ +triton_\w+\.run\(", code, re.MULTILINE))
    return {"kernels": len(kernels), "sources": len(bare), "triton": triton, "called": dict(called)}


def count(
    *,
    kind: str,
    steps: int,
    batch: int = 16,
    hidden: int = 64,
    dtype: str = "bfloat16",
    plan: str | None = None,
    packed: bool = False,
    trained: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Return the counts for a layer: of the forward, and of the backward if it is trained."""
    from tests.cases import Case, Holder
    from unroll import packing, unroll

    layer = getattr(nn, kind)(hidden, hidden, dtype=getattr(torch, dtype), **options)
    model = unroll(Holder(layer, Case(kind, form="packed" if packed else "batched")), plan=plan)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, weight in [*module._parameters.items()]:
                if weight is not None:
                    empty = torch.empty(weight.shape, dtype=weight.dtype, device="cuda")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=trained)
        x = torch.empty(steps, batch, hidden, dtype=getattr(torch, dtype), device="cuda")
        if not packed:
            return [counts(code) for code in written(model, x, trained=trained)]
        with packing():
            return [counts(code) for code in written(model, x, torch.full((batch,), steps), trained=trained)]


if __name__ == "__main__":
    stand_in()
    for form in json.loads(sys.argv[1]):
        print(json.dumps(count(**form)), flush=True)
