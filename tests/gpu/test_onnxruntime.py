"""ONNX Runtime's CUDA provider: unrolled files against those with the recurrent operator, and against PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.cases import flat
from tests.checks import assert_same
from tests.gpu.device import DEVICE, ON_GPU
from unroll import export_onnx, unroll

for name in ("onnx", "onnx_ir", "onnxscript"):
    pytest.importorskip(name)
onnxruntime = pytest.importorskip("onnxruntime")
from tests.onnx import standard  # noqa: E402

PROVIDER = "CUDAExecutionProvider" if ON_GPU else "CPUExecutionProvider"
if PROVIDER not in onnxruntime.get_available_providers():
    pytest.skip(f"this ONNX Runtime has no {PROVIDER} (onnxruntime-gpu has it)", allow_module_level=True)


def results(model, feed):
    """What a file, or a model, gives on the device. ONNX Runtime may not choose another, nor TF32."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    source = model if isinstance(model, str) else model.SerializeToString()
    providers = [(PROVIDER, {"use_tf32": "0"})] if ON_GPU else [PROVIDER]
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    assert session.get_providers()[0] == PROVIDER
    return session.run(None, feed)


@pytest.mark.parametrize("plan", ["onnxruntime", "gates=merged", "gates=split", "directions=stacked"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_unrolled_against_the_operator(kind, dtype, plan):
    attributes = {"direction": "bidirectional"} | ({"linear_before_reset": 1} if kind == "GRU" else {})
    given = standard.draw(kind, attributes, optional=("B", "initial_h"), steps=16, batch=64, size=32, dtype=dtype)
    given |= {name: given[name] * dtype(0.2) for name in ("W", "R", "B")}
    model = standard.model(kind, attributes, given)
    feed = {name: given[name] for name in ("X", "initial_h")}
    exact = standard.evaluate(kind, attributes, {name: value.astype(np.float64) for name, value in given.items()})
    for ours, theirs, true in zip(results(unroll(model, plan=plan), feed), results(model, feed), exact, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        roundings = 4 if dtype == np.float32 else 1  # as unroll.compare has it
        limit = 2 * np.abs(theirs - true).max() + roundings * np.finfo(dtype).eps * np.abs(true).max()
        assert np.abs(ours - true).max() <= limit


@pytest.mark.parametrize("dynamic", [None, ({1: "batch"},), ({0: "steps", 1: "batch"},)], ids=["fixed", "batch", "any"])
def test_a_file_exported_from_torch(dynamic, tmp_path):
    model = nn.Sequential(nn.LSTM(6, 5, num_layers=2, bidirectional=True)).eval()
    path = str(tmp_path / "model.onnx")
    export_onnx(model, torch.randn(7, 3, 6), path, dynamic_shapes=dynamic, input_names=["x"], check=False)
    model = model.to(DEVICE)
    for steps, batch in [(7, 3), (7, 5), (12, 2)][: len(dynamic[0]) + 1 if dynamic else 1]:
        x = torch.randn(steps, batch, 6)
        with torch.no_grad():
            expected = [t.cpu() for t in flat(model(x.to(DEVICE)))]
        assert_same([*map(torch.from_numpy, results(path, {"x": x.numpy()}))], expected, rtol=1e-5)
