"""The forms in which ONNX files can be written, where the standard has several for one thing, and who wants which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Form:
    """The operators that a file takes; each choice gives the same results in a runtime that keeps to the standard.

    Attributes:
        rows: how rows of all steps become those of each: one `Split`, or a `Gather` for each step of `[T, B, n]`.
        most: the most values that a `Concat` takes; more are a tree of such nodes. None for any.
        addend: what a product is added to: `inside`, as the third input of a `Gemm`, or `outside`, by an `Add`.
        loop: the operator that runs blocks of steps.
    """

    rows: Literal["split", "gather"] = "split"
    most: int | None = None
    addend: Literal["inside", "outside"] = "inside"
    loop: Literal["Scan", "Loop"] = "Scan"


# What was run for each row is in docs/runtimes.md.
FORMS = {
    "": Form(),
    # Of a Gemm that adds what is computed no quantizer makes eight bits, see tests/onnx/test_quantized.py.
    "npu": Form(addend="outside"),
    # A Gemm that adds what is computed is not loaded.
    "ncnn": Form(addend="outside"),
    # A Gemm adds one dimension at most, by the table of operators: no file was run.
    "webnn": Form(addend="outside"),
    # A shader has eight buffers, seven beside the one that a Concat writes; JSEP splits an open size wrong.
    "webgpu": Form(rows="gather", most=7),
    # A Split of [T * B, n] with an open B is refused.
    "tract": Form(rows="gather"),
    # There is no Scan.
    "mnn": Form(loop="Loop"),
    "opencv": Form(loop="Loop"),
}
"""The forms of files by runtime, for `Plan.runtime`"""
