"""Names that the examples in docstrings take for granted."""

import pytest
import torch
from torch import nn

import unroll


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace |= {"torch": torch, "nn": nn, "unroll": unroll.unroll}
