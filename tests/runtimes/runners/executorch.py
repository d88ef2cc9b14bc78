"""ExecuTorch, by XNNPACK where it takes a part of the program, from exported programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Missing, Run, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        torch.export.load(path),
        partitioner=[XnnpackPartitioner()],
        # Its check takes the length of the first of several results, and what was open there is then the example's.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    written = path.with_suffix(".pte")
    written.write_bytes(lowered.to_executorch().buffer)
    return written


def count(path: Path) -> Counter[str]:
    """Return the operators that no delegate has taken, and the calls of delegates."""
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.schema import DelegateCall, KernelCall

    (plan,) = deserialize_pte_binary(path.read_bytes()).program.execution_plan
    found: Counter[str] = Counter()
    for chain in plan.chains:
        for call in (instruction.instr_args for instruction in chain.instructions):
            if isinstance(call, KernelCall):
                found[plan.operators[call.op_index].name.removeprefix("aten::")] += 1
            elif isinstance(call, DelegateCall):
                found[plan.delegates[call.delegate_index].id] += 1
    return found


def load(path: Path) -> Run:
    import torch
    from executorch.runtime import Runtime as Executor

    # A program holds no reference to what it was loaded by.
    executor = Executor.get()
    program = executor.load_program(path)
    method = program.load_method("forward")

    def run(inputs: Inputs) -> list[np.ndarray]:
        assert executor and program
        return [value.numpy().copy() for value in method.execute([torch.from_numpy(v) for v in inputs.values()])]

    return run


RUNTIME = Runtime(
    "ExecuTorch, XNNPACK",
    "executorch",
    "executorch",
    load,
    convert,
    count,
    suffix=".pt2",
    preset="xnnpack",
    missing={
        "open length": Missing(
            "`torch.export` takes no open length of the layer as it is", "a program for each length"
        ),
    },
    apart=True,
)
