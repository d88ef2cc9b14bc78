"""What the tests on a GPU take for granted."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from tests.gpu.device import REASON

HERE = Path(__file__).parent


def pytest_configure(config):
    # Said by the original, where weights are called that are not those of a layer: in programs and copies.
    config.addinivalue_line("filterwarnings", "ignore:RNN module weights are not part of single contiguous chunk")
    path = os.environ.get("UNROLL_GPU_REPORT")
    if path and not hasattr(config, "workerinput"):  # xdist's workers have that
        config.pluginmanager.register(Reports(path))


class Reports:
    """Writes each result to a file as it comes, a failure with its traceback."""

    def __init__(self, path):
        self.path = path

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        told = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        told["text"] = str(report.longrepr[2]) if report.skipped and report.longrepr else report.longreprtext
        with open(self.path, "a") as file:
            file.write(json.dumps(told) + "\n")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if REASON:
                item.add_marker(pytest.mark.skip(reason=REASON))


@pytest.fixture(autouse=True)
def _whole_float32():
    """Without TF32, which rounds what goes into float32 products to 10 bits.

    By default PyTorch lets cuDNN's layers do so and no other product: the original would be a thousand times less exact
    than ours, and a test of float32 could not fail.
    """
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer names for the same
        before = [backend.allow_tf32 for backend in backends]
        for backend in backends:
            backend.allow_tf32 = False
        yield
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
