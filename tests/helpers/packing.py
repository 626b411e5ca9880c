"""Packed rows give the losses and gradients of the records alone, or the model is refused."""

import pytest
import torch
from helpers.families import family_language
from helpers.tiny import tiny_model, tiny_tokenizer

from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.packing import PackedDataset, check_packing
from sparsecut.schema import UserError


def build_with_language(name: str):
    """The tiny model with a language model of a family."""
    return tiny_model(language=family_language(name, vocab_size=len(tiny_tokenizer())))


def compute_gradients(model, batch: dict) -> tuple[float, torch.Tensor]:
    """The loss of a batch and the gradients of all parameters."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients)


def check_packed_family(name: str, folder) -> None:
    """Packed rows give the loss and gradients of the records alone."""
    model, processor = build_with_language(name)
    encoder = example_encoder(processor)
    data, collator = TrainingData(read_examples(folder / "data.json"), encoder), Collator(encoder)
    rows = PackedDataset(data, [[0, 5, 1], [6, 2, 10]])
    check_packing(model, collator, rows)
    packed_loss, packed = compute_gradients(model, collator([rows[0], rows[1]]))
    items = [data[i] for i in (0, 5, 1, 6, 2, 10)]
    loss, alone = compute_gradients(model, collator(items))
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert (packed - alone).abs().max() < 1e-5 * max(1.0, alone.abs().max().item())


def check_mixing_family(name: str, folder) -> None:
    """A language model that would mix packed records is refused."""
    model, processor = build_with_language(name)
    encoder = example_encoder(processor)
    data = TrainingData(read_examples(folder / "data.json"), encoder)
    with pytest.raises(UserError, match=r"a record changes the outputs of the next one.*pack"):
        check_packing(model, Collator(encoder), PackedDataset(data, [[0, 1]]))
