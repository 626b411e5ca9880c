"""One thread per test process, and the tiny model as a fixture."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from helpers.tiny import tiny_llava, tiny_model

torch.set_num_threads(1)


@pytest.fixture
def tiny():
    """(model, processor): a tiny SparseCut model with random weights."""
    return tiny_model()


@pytest.fixture
def llava():
    """(model, processor): a tiny pretrained LLaVA with random weights."""
    return tiny_llava()


def pytest_ignore_collect(collection_path, config):
    """Leave conformance, fuzz and without_extras out, unless the command line names them."""
    if collection_path.name not in ("conformance", "fuzz", "without_extras"):
        return None
    named = any(collection_path.name in argument for argument in config.args)
    return None if named else True


def pytest_collection_finish(session):
    """Spare what is imported from garbage collection, which every training run starts in full.

    It took more than half of the time of a tiny run.
    """
    gc.collect()
    gc.freeze()
