"""The reference evaluator of the package onnx."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.runtimes.runners.runtime import Run, Runtime


def load(path: Path) -> Run:
    import onnx
    from onnx.reference import ReferenceEvaluator

    return partial(ReferenceEvaluator(onnx.load(path)).run, None)


RUNTIME = Runtime("onnx, reference evaluator", "onnx", "onnx", load, others={"native": "`sequence_lens` is ignored"})
