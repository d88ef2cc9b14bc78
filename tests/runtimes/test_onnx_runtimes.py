"""Eleven unrolled models in other runtimes than ONNX Runtime, each in the form of the preset of its name."""

from __future__ import annotations

from importlib.util import find_spec

import onnx
import pytest

from tests.runtimes.models import MODELS, difference
from tests.runtimes.runners import RUNNERS

pytestmark = pytest.mark.runtimes

PACKAGES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tract": "tract", "opencv": "cv2", "mnn": "MNN"}
PRESETS = {"reference": "default"}

REFUSED = {("tract", "packed"): "its Python package loses a symbol of its own, of a size that is open"}
"""Models that a runtime does not run; each is tried, and must fail still"""


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("runtime", RUNNERS)
def test_results_are_those_of_torch(runtime, model, tmp_path, request):
    if runtime in PACKAGES and find_spec(PACKAGES[runtime]) is None:
        pytest.skip(f"{PACKAGES[runtime]} is not installed")
    if reason := REFUSED.get((runtime, model.name)):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    path = model.export(tmp_path / "model.onnx", PRESETS.get(runtime, runtime))
    names = [value.name for value in onnx.load(path).graph.input]
    for args, expected in model.runs():
        found = RUNNERS[runtime](path, {name: arg.numpy() for name, arg in zip(names, args, strict=True)})
        assert difference(found, expected) < 1e-5
