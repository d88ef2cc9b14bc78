"""Eleven unrolled models in each runtime that is installed, in the form of the preset that it has."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.runtimes.models import MODELS
from tests.runtimes.runners import RUNTIMES
from tests.runtimes.runners.runtime import difference

pytestmark = pytest.mark.runtimes


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("name", RUNTIMES)
def test_results_are_those_of_torch(name, model, tmp_path, request):
    runtime = RUNTIMES[name]
    if find_spec(runtime.package) is None:
        pytest.skip(f"{runtime.package} is not installed")
    if missing := runtime.missing.get(model.name):
        request.applymarker(pytest.mark.xfail(reason=missing.why, strict=True))
    path = model.export(tmp_path / "model.onnx", runtime.preset)
    feeds = model.feeds(path)
    run = runtime.load(runtime.convert(path, feeds[0][0]))
    for inputs, expected in feeds:
        assert difference(run(inputs), expected) < runtime.tolerance
