"""Packed rows of upgraded models give the losses and gradients of the records alone."""

import pytest
import torch
from helpers.bases import randomize_fusion
from helpers.example_bases import build_example_base
from helpers.packing import compare_with_alone, pack_base_inputs
from helpers.runs import write_records

from sparsecut import upgrade
from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.packing import PackedDataset, check_packing, count_record_tokens
from sparsecut.schema import UserError

RECORDS = [[0, 5, 1], [6, 2, 10]]


@pytest.fixture(scope="module", params=["llava", "qwen"])
def upgraded(request, tmp_path_factory):
    """(model, its records as items), with shortcuts that have an effect."""
    base, processor = build_example_base(request.param)
    model, processor = upgrade(base, processor=processor)
    folder = write_records(tmp_path_factory.mktemp("records"))
    data = TrainingData(read_examples(folder / "data.json"), example_encoder(processor))
    return randomize_fusion(model).eval(), data


def test_packed_rows_have_the_loss_and_gradients_of_the_records_alone(upgraded):
    model, data = upgraded
    collator = Collator(data.encoder, count_positions=model.get_position_counter())
    rows = PackedDataset(data, RECORDS)
    check_packing(model, collator, rows)
    items = [data[number] for row in RECORDS for number in row]
    compare_with_alone(model, collator([rows[0], rows[1]]), collator(items))


def test_tokens_are_counted_without_the_images_pixels(upgraded):
    _, data = upgraded
    collator = Collator(data.encoder)
    lengths, image_tokens = count_record_tokens(data)
    placeholder = data.encoder.processor.image_token_id
    for number in (0, 5, 6):
        ids = collator([data[number]])["input_ids"][0]
        assert lengths[number] == len(ids)
        assert image_tokens[number] == (ids == placeholder).sum() > 0


def test_positions_that_go_on_are_found(upgraded):
    model, data = upgraded
    collator = Collator(data.encoder, count_positions=model.get_position_counter())

    def go_on(rows):
        batch = collator(rows)
        batch["position_ids"][:] = torch.arange(batch["input_ids"].shape[1])
        return batch

    go_on.encoder = data.encoder
    with pytest.raises(UserError, match="pack"):
        check_packing(model, go_on, PackedDataset(data, RECORDS))


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_bases_of_other_families_keep_packed_records_apart(name):
    model, packed, alone = pack_base_inputs(name)
    compare_with_alone(model, packed, alone)
