"""One tiny model behind one server, shared by all tests of the package."""

import pytest
import torch
from helpers.tiny import tiny_model

from sparsecut.serving.engine import Engine


@pytest.fixture(scope="session")
def engine():
    """An engine whose model gives different answers to different questions."""
    model, processor = tiny_model()
    with torch.no_grad():  # else the shortcuts add nothing
        for path in model.fusion.paths:
            path.linear_2.weight.normal_(0, 2)
        for weight in model.language_model.model.layers.parameters():
            weight *= 2 if weight.dim() == 2 else 1
    engine = Engine(model, processor, max_batch=8, max_queue=40)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def client(engine):
    """OpenAI's client of a server of that engine, with the page."""
    from helpers.clients import start_server  # skips where a library is missing

    from sparsecut.serving.web import add_page

    with start_server(engine, add_page) as client:
        yield client
