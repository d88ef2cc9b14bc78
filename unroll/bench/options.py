"""The names and numbers by which a measurement is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict, get_args

Form = Literal[
    "eager",
    "eager-unrolled",
    "compile",
    "compile-allow-rnn",
    "eager-cudagraph",
    "compile-allow-rnn-cudagraphs",
    "unroll-compile",
    "unrolled-compile",
    "unrolled-cpp",
    "unrolled-cudagraphs",
    "unrolled-aoti",
    "onnx",
    "onnx-unrolled",
    "onnx-decomposed",
    "tensorrt",
]

FORMS = get_args(Form)
"""The names of all `CONTENDERS`"""


class LayerOptions(TypedDict, total=False):
    """The options of a layer and of its input."""

    input_size: int | None
    hidden_size: int | Sequence[int] | None
    num_layers: int | None
    bidirectional: bool | None
    bias: bool | None
    proj_size: int | None
    nonlinearity: Literal["tanh", "relu"] | None
    steps: int | Sequence[int] | None
    batch: int | Sequence[int] | None
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None


LAYER: dict[str, Any] = {
    "input_size": 64,
    "hidden_size": 128,
    "num_layers": 1,
    "bidirectional": False,
    "bias": True,
    "proj_size": 0,
    "nonlinearity": "tanh",
    "steps": 32,
    "batch": 1,
    "dtype": "float32",
}
"""The values of those that are not given"""

SWEPT = ("steps", "batch", "hidden_size")
"""Options that may be several values: every combination is then measured."""

DTYPES = ("float64", "float32", "float16", "bfloat16")
"""Floating types, the finest first"""
