"""A compiled model is compiled once for every shape of batch."""

import pytest
import torch
from helpers.runs import trainer_for, write_records
from helpers.tiny import tiny_model

from sparsecut.data.collator import Collator
from sparsecut.data.encoding import example_encoder


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their images."""
    write_records(tmp_path)
    return tmp_path


def test_a_compiled_model_is_compiled_no_more_once_its_shapes_are_known(folder):
    model, processor = tiny_model()
    trainer = trainer_for(model, processor, folder)
    compiled, graphs = Collator(example_encoder(processor), pad_to=32), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(
        lambda **batch: model(**batch, use_cache=False).loss, backend=backend, dynamic=False
    )
    seen = []
    for rows in ((0, 1), (2, 3), (1, 2), (0, 3)):  # one image each
        step(**compiled([trainer.train_dataset[i] for i in rows]))
        seen.append(len(graphs))
    assert seen[0] >= 1 and seen[1:] == [seen[0]] * 3
    torch._dynamo.reset()
