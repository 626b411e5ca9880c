"""Packed rows give the losses and gradients of the records alone, or the model is refused."""

import pytest
import torch
from helpers.base_configs import IMAGE
from helpers.bases import randomize_fusion
from helpers.families import family_language
from helpers.tiny import tiny_model, tiny_tokenizer
from helpers.upgrade_checks import build_upgraded

from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.native_encoding import PER_TOKEN
from sparsecut.data.native_packing import pack_batch
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
    items = [data[i] for i in (0, 5, 1, 6, 2, 10)]
    compare_with_alone(model, collator([rows[0], rows[1]]), collator(items))


def check_mixing_family(name: str, folder) -> None:
    """A language model that would mix packed records is refused."""
    model, processor = build_with_language(name)
    encoder = example_encoder(processor)
    data = TrainingData(read_examples(folder / "data.json"), encoder)
    with pytest.raises(UserError, match=r"a record changes the outputs of the next one.*pack"):
        check_packing(model, Collator(encoder), PackedDataset(data, [[0, 1]]))


def compare_with_alone(model, packed_batch: dict, alone_batch: dict) -> None:
    """A batch of rows has the loss and the gradients of a batch of its records."""
    packed_loss, packed = compute_gradients(model, packed_batch)
    loss, alone = compute_gradients(model, alone_batch)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert (packed - alone).abs().max() < 1e-5 * max(1.0, alone.abs().max().item())


def pack_base_inputs(name: str):
    """(upgraded model, the inputs of its two prompts in one row, the same in two rows)."""
    _, model, inputs = build_upgraded(name)
    is_token = inputs["attention_mask"] > 0
    lengths = is_token.sum(-1).tolist()
    padded = dict(inputs)
    for key in PER_TOKEN:
        if key in inputs:
            padded[key] = torch.zeros_like(inputs[key])
            for row, length in enumerate(lengths):
                padded[key][row, :length] = inputs[key][row][is_token[row]]
    ids = padded["input_ids"]
    is_target = (padded["attention_mask"] > 0) & (ids != IMAGE)
    padded["labels"] = ids.masked_fill(~is_target, -100)
    packed = pack_batch(padded, [2], 0, model.get_position_counter())
    return randomize_fusion(model).eval(), packed, padded
