"""coremltools, which converts exported programs; what it writes runs on Apple's machines alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.runtimes.runners.runtime import Inputs, Missing, Runtime


def convert(path: Path, given: list[Inputs]) -> Path:
    import coremltools
    import torch

    program = torch.export.load(path).run_decompositions({})
    package = path.with_suffix(".mlpackage")
    coremltools.convert(program, convert_to="mlprogram", skip_model_load=True).save(str(package))
    return package


def count(path: Path) -> Counter[str]:
    from coremltools.libmodelpackage import ModelPackage
    from coremltools.proto.MIL_pb2 import Block
    from coremltools.proto.Model_pb2 import Model

    def add(block: Block) -> None:
        for operation in block.operations:
            found[operation.type] += operation.type != "const"
            for inner in operation.blocks:
                add(inner)

    found: Counter[str] = Counter()
    model = Model.FromString(Path(ModelPackage(str(path)).getRootModel().path()).read_bytes())
    for function in model.mlProgram.functions.values():
        for block in function.block_specializations.values():
            add(block)
    return found


RUNTIME = Runtime(
    "coremltools",
    "coremltools",
    "coremltools",
    None,
    convert,
    count,
    suffix=".pt2",
    preset="coreml",
    others={"native": "no recurrent operator of programs is known"},
    missing={
        "open length": Missing(
            "it knows no `scan`, the loop of programs, and of TorchScript's own no `chunk`",
            "a program for each length",
        )
    },
)
