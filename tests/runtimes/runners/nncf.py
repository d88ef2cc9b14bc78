"""NNCF's static quantization of OpenVINO's models, which OpenVINO runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.runtimes.runners.openvino import load
from tests.runtimes.runners.runtime import Inputs, Runtime

QUANTIZED = "of eight bits"


def convert(path: Path, given: list[Inputs]) -> Path:
    import nncf
    import openvino
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    model = openvino.Core().read_model(str(path))
    quantized = path.with_name(f"{path.stem}.nncf.xml")
    # Else a range is the mean of those of all samples, and what lies beyond is cut.
    ranges = nncf.AdvancedQuantizationParameters(activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX)
    smaller = nncf.quantize(model, nncf.Dataset(given), advanced_parameters=ranges)
    openvino.save_model(smaller, quantized, compress_to_fp16=False)
    return quantized


def count(path: Path) -> Counter[str]:
    """Return the operators, loops' bodies too; products whose factors are both quantized under a name of their own."""
    import openvino

    def add(model: object) -> None:
        for node in model.get_ordered_ops():
            kind = node.get_type_name().removesuffix("Sequence")
            eight = kind == "MatMul" and all(_quantized(node.input_value(k).get_node()) for k in (0, 1))
            found[f"{kind} {QUANTIZED}" if eight else kind] += 1
            for get in ("get_body", "get_function"):
                if hasattr(node, get):
                    add(getattr(node, get)())
                    break

    found: Counter[str] = Counter()
    add(openvino.Core().read_model(str(path)))
    return found


def _quantized(node: object) -> bool:
    """Follow a factor back, over what moves values and the scale of a weight, to where it is of eight bits."""
    kind = node.get_type_name()
    if kind in ("FakeQuantize", "Convert"):
        return kind == "FakeQuantize" or node.input_value(0).get_element_type().bitwidth == 8
    if kind not in ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Multiply", "Subtract"):
        return False
    return _quantized(node.input_value(0).get_node())


def products(counted: Counter[str]) -> dict[str, int]:
    taken = counted[f"MatMul {QUANTIZED}"]
    recurrent = sum(counted[kind] for kind in ("LSTM", "GRU", "RNN"))
    return {"taken": taken, "products": taken + counted["MatMul"] + recurrent}


RUNTIME = Runtime(
    "NNCF, static quantization",
    "nncf",
    "nncf",
    load,
    convert,
    count,
    products,
    preset="npu",
    plans=("default",),
    tolerance=0.1,
    apart=True,
)
