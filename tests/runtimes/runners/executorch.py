"""ExecuTorch, by XNNPACK where it takes a part of the program, from exported programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tests.runtimes.runners.runtime import Inputs, Run, Runtime

TAKEN = " by XNNPACK"
PRODUCTS = ("aten.linear.default", "aten.addmm.default", "aten.mm.default", "aten.bmm.default")


def convert(path: Path, given: list[Inputs]) -> Path:
    """Write the program, and beside it how often it has each operator, loops' bodies too."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        torch.export.load(path),
        partitioner=[XnnpackPartitioner()],
        # Its check takes the length of the first of several results, and what was open there is then the example's.
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    counted: Counter[str] = Counter()
    for module in lowered.exported_program().graph_module.modules():
        taken = getattr(module, "original_module", None)
        graph = getattr(taken or module, "graph", None)
        for node in graph.nodes if graph else ():
            if hasattr(node.target, "_schema"):
                counted[f"{node.target.__name__}{TAKEN if taken else ''}"] += 1
    written = path.with_suffix(".pte")
    written.write_bytes(lowered.to_executorch().buffer)
    written.with_suffix(".json").write_text(json.dumps(counted))
    return written


def count(path: Path) -> Counter[str]:
    """Return the operators, those that XNNPACK has taken under a name of their own."""
    return Counter(json.loads(path.with_suffix(".json").read_text()))


def products(counted: Mapping[str, int]) -> dict[str, int]:
    taken, left = (sum(counted.get(f"{kind}{by}", 0) for kind in PRODUCTS) for by in (TAKEN, ""))
    return {"taken": taken, "products": taken + left}


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
    products,
    suffix=".pt2",
    preset="xnnpack",
    plans=("default",),
    apart=True,
)
