"""Eleven unrolled models in each runtime that is installed, in the form of the preset that it has."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.runtimes.models import MODELS
from tests.runtimes.runners import RUNTIMES
from tests.runtimes.runners.runtime import difference

RECURRENT = {"lstm", "gru", "rnn"}

pytestmark = [pytest.mark.runtimes, pytest.mark.filterwarnings("ignore")]  # those of the runtimes are theirs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
@pytest.mark.parametrize("name", [name for name, runtime in RUNTIMES.items() if not runtime.apart])
def test_results_are_those_of_torch(name, model, tmp_path, request):
    runtime = RUNTIMES[name]
    if find_spec(runtime.package) is None:
        pytest.skip(f"{runtime.package} is not installed")
    if missing := runtime.missing.get(model.name):
        request.applymarker(pytest.mark.xfail(reason=missing.why, strict=True))
    path = model.export(tmp_path / f"model{runtime.suffix}", runtime.preset)
    feeds = model.feeds(path)
    converted = runtime.convert(path, [inputs for inputs, _ in feeds])
    assert not runtime.count or not RECURRENT & {kind.lower() for kind in runtime.count(converted)}
    run = runtime.load(converted) if runtime.load else None
    for inputs, expected in feeds if run else ():
        assert difference(run(inputs), expected) < runtime.tolerance
