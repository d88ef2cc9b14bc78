"""Engines that TensorRT for RTX builds of files in the forms of other runtimes."""

from __future__ import annotations

import pytest

from tests.runtimes.models import MODELS
from unroll import check
from unroll.core.forms import FORMS

pytest.importorskip("tensorrt_rtx_bindings")
pytestmark = pytest.mark.runtimes


TRIED = [model for model in MODELS if model.name in ("LSTM", "RNN", "packed", "open length", "open batch")]


@pytest.mark.parametrize("model", TRIED, ids=lambda model: model.name)
@pytest.mark.parametrize("runtime", [runtime for runtime in FORMS if runtime])
def test_forms(runtime, model, tmp_path):
    path = model.export(tmp_path / "model.onnx", f"runtime={runtime}")
    verdict = check(path, target="tensorrt_rtx", build=True).check()
    assert (verdict.engine.loops > 0) == bool(model.time)
