"""One thread per test process, and the tiny model as a fixture."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers.tiny import tiny_model

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """(model, processor): a tiny SparseCut model with random weights."""
    return tiny_model()
