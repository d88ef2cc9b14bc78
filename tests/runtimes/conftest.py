"""Tests of runtimes, whose own carelessness may show in whatever test runs when Python collects what they left."""

from pathlib import Path

import pytest

LEFT = ("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for left in LEFT:
                item.add_marker(pytest.mark.filterwarnings(left))
