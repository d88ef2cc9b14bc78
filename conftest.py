"""What every test and docstring example takes for granted."""

import gc

import pytest
import torch
from torch import nn

import unroll

torch.set_num_threads(1)


def pytest_configure(config):
    # Said once by the original, of the kernel it chooses.
    config.addinivalue_line("filterwarnings", "ignore:LSTM with projections is not supported with oneDNN")


def pytest_collection_finish():
    # What was imported stays, and need not be looked through at each collection, of which graphs cause thousands.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _names(doctest_namespace):
    doctest_namespace |= {"torch": torch, "nn": nn, "unroll": unroll.unroll}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
