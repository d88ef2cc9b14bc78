"""Quantizes a reader of handwritten digits: by PT2E for PyTorch, and by ONNX Runtime's quantizer; sizes and accuracies.

Both look for products of a weight that the model holds, and reach all of them where the steps are written with
`plan="quantize"`. `check(converted, target="pt2e")` counts those that stayed float. Needs torchao: pip install torchao.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from digits import Reader, digits, session, train
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quant_pre_process, quantize_static
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from unroll import check, export_onnx, unroll
from unroll.bench.machine import command, machine


class Calibration(CalibrationDataReader):
    """Gives a quantizer images, a batch at a time."""

    def __init__(self, images: Tensor) -> None:
        self.batches = iter(images.split(64))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def by_pt2e(model: nn.Module, plan: str, images: Tensor) -> nn.Module:
    """What PT2E makes of the unrolled model, calibrated with these images."""
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    batch = torch.export.Dim("batch", min=2, max=4096)
    with torch.no_grad():
        program = torch.export.export(unroll(model, plan=plan), (images,), dynamic_shapes=({0: batch},))
        prepared = prepare_pt2e(program.module(), quantizer)
        prepared(images)
        return convert_pt2e(prepared)


def by_onnxruntime(model: nn.Module, plan: str, images: Tensor, folder: Path) -> tuple[Path, Path]:
    """Files of the unrolled model and of what ONNX Runtime's quantizer makes of it."""
    file, ready, quantized = (folder / f"{plan}.{kind}.onnx" for kind in ("float", "ready", "int8"))
    export_onnx(model, images, file, plan=plan, dynamic_shapes=({0: "batch"},))
    quant_pre_process(file, ready, skip_symbolic_shape=True, skip_optimization=True)
    options = {"ActivationSymmetric": True}
    quantize_static(ready, quantized, Calibration(images), quant_format=QuantFormat.QDQ, extra_options=options)
    return file, quantized


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="rounds of training (%(default)s)")
    parser.add_argument("--save", type=Path, help="a file for the figures, in JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)

    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = Reader()
    train(model, images, labels, options.epochs)
    model.eval()

    def right(run: object) -> int:
        with torch.no_grad():
            return int((run(test_images).argmax(1) == test_labels).sum())

    of = f"of {len(test_labels)} right"
    rows = [{"by": "float", "right": right(model)}]
    print(f"float: {rows[0]['right']} {of}")
    for plan in ("default", "quantize"):
        converted = by_pt2e(model, plan, images[:256])
        verdict = str(check(converted, target="pt2e")).splitlines()[0]
        rows.append({"by": "PT2E", "plan": plan, "right": right(converted), "verdict": verdict})
        print(f"PT2E, plan {plan}: {rows[-1]['right']} {of}; {verdict}")
    with tempfile.TemporaryDirectory() as folder:
        for plan in ("default", "quantize"):
            files = by_onnxruntime(model, plan, images[:256], Path(folder))
            weights = onnx.load(files[1]).graph.initializer
            held = sum(int(np.prod(w.dims)) for w in weights if w.data_type == onnx.TensorProto.INT8)
            sizes = [file.stat().st_size for file in files]
            rows.append({"by": "ONNX Runtime", "plan": plan, "right": right(session(files[1]))})
            rows[-1] |= {"bytes": sizes, "int8_weights": held}
            kilobytes = " to ".join(str(size // 1024) for size in sizes)
            print(f"ONNX Runtime, plan {plan}: {rows[-1]['right']} {of}; {kilobytes} KB, {held} weights of int8")
    if options.save:
        found = {"command": command(), "machine": machine(), "tested": len(test_labels), "rows": rows}
        options.save.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
