"""ONNX Runtime's quantizers, after its own preparation without fusions; ONNX Runtime runs what they write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.runtimes.runners.onnxruntime import load
from tests.runtimes.runners.runtime import Inputs, Missing, Runtime

EIGHT = ("QGemm", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeLSTM")
FLOAT = ("Gemm", "MatMul", "LSTM", "GRU", "RNN")


def products(counted: Mapping[str, int]) -> dict[str, int]:
    taken, left = (sum(counted[kind] for kind in kinds if kind in counted) for kinds in (EIGHT, FLOAT))
    return {"taken": taken, "products": taken + left}


def prepare(path: Path, kind: str) -> tuple[Path, Path]:
    """Return the prepared file, and the path of the quantized one."""
    from onnxruntime.quantization import quant_pre_process

    ready, quantized = (path.with_name(f"{path.stem}.{part}.onnx") for part in (f"{kind}.ready", kind))
    quant_pre_process(path, ready, skip_symbolic_shape=True, skip_optimization=True)
    return ready, quantized


def dynamic(path: Path, given: list[Inputs]) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    ready, quantized = prepare(path, "dynamic")
    quantize_dynamic(ready, quantized, weight_type=QuantType.QInt8)
    return quantized


def static(path: Path, given: list[Inputs]) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        arrays = iter(given)

        def get_next(self) -> Inputs | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            return next(self.arrays, None)

    ready, quantized = prepare(path, "static")
    quantize_static(
        ready,
        quantized,
        Reader(),
        quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return quantized


WHERE = Missing(
    "the quantizer loses what a `Where` gives, in its format `QOperator`",
    '`op_types_to_quantize=["MatMul"]`, which gave 52 of 52 products and a difference of 0.017, or the format `QDQ`',
)
GEMM = {"default": "a bias inside of a `Gemm` is stored by the scale of the first step, and an `RNN` loses `h`"}
PLANS = ("default", "products=linear")

DYNAMIC, STATIC = (
    Runtime(
        f"ONNX Runtime, {name} quantization",
        "onnxruntime",
        "onnxruntime",
        load,
        convert,
        products=products,
        preset="npu",
        plans=PLANS,
        missing=missing,
        others=others,
        tolerance=0.1,
    )
    for name, convert, missing, others in (("dynamic", dynamic, {}, {}), ("static", static, {"packed": WHERE}, GEMM))
)
