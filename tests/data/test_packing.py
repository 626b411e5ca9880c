"""Records that share rows and steps give the losses and gradients of single records."""

import itertools
import random

import pytest
from helpers.packing import check_mixing_family, check_packed_family
from helpers.runs import log, run, stage, trainer_for, write_records
from helpers.tiny import tiny_model

from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import ExampleEncoder, example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.packing import LengthGroupedSampler, pack_rows
from sparsecut.schema import UserError

RNG = random.Random(1)
LENGTHS = [RNG.randrange(3, 30) for _ in range(203)]
IMAGES = [4 * (i % 3) for i in range(203)]


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their images."""
    return write_records(tmp_path)


def mixes_kinds(numbers: list[int]) -> bool:
    """Whether some of the records have images, and others none."""
    return len({bool(IMAGES[i]) for i in numbers}) > 1


def count_padded(order: list[int], step: int) -> int:
    """Tokens of all steps, padding included."""
    total = 0
    for start in range(0, len(order), step):
        total += step * max(LENGTHS[i] for i in order[start : start + step])
    return total


@pytest.mark.parametrize("max_images", [None, 8])
def test_rows_hold_every_record_once_within_their_limits(max_images):
    rows = pack_rows(LENGTHS, IMAGES, 40, max_images=max_images)
    assert sorted(itertools.chain(*rows)) == list(range(203))
    for row in rows:
        assert sum(LENGTHS[i] for i in row) <= 40
        assert not mixes_kinds(row)
        if max_images is not None:
            assert sum(IMAGES[i] for i in row) <= max_images
    if max_images is None:
        assert len(rows) < 1.15 * sum(LENGTHS) / 40  # little of the rows is left empty
    assert rows == pack_rows(LENGTHS, IMAGES, 40, max_images=max_images)


def test_an_order_holds_every_item_once_an_epoch_and_similar_ones_in_each_step():
    sampler = LengthGroupedSampler(LENGTHS, IMAGES, 8, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    first = epochs[0]
    assert first == epochs[2] != epochs[1]
    assert len(first) == len(sampler) == 208
    assert sorted(first[:203]) == list(range(203))
    assert first[203:] == first[:5]
    steps = [first[start : start + 8] for start in range(0, 208, 8)]
    assert sum(mixes_kinds(step) for step in steps) <= 2
    assert count_padded(first, 8) < 1.2 * sum(LENGTHS)
    random_order = list(LengthGroupedSampler(LENGTHS, IMAGES, 8, grouped=False))
    assert count_padded(random_order, 8) > 1.5 * sum(LENGTHS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_packed_rows_give_the_loss_and_gradients_of_the_records_alone(folder, name):
    check_packed_family(name, folder)


def test_a_language_model_that_would_mix_packed_records_is_refused(folder):
    check_mixing_family("bloom", folder)


def test_packed_and_grouped_stages_have_the_loss_of_single_records(folder):
    """All twelve records in one step, however they are arranged: the mean over all learned tokens,
    and as many tokens.
    """
    processor = tiny_model()[1]
    data = TrainingData(read_examples(folder / "data.json"), example_encoder(processor))
    num_rows = len(pack_rows(data.lengths, data.num_image_tokens, 30))
    assert num_rows < 9
    ways = {
        "single": (12, 1, {}),
        "accumulated": (4, 3, {"group": True}),
        "both": (1, num_rows, {"pack": 30, "group": True}),
    }
    losses, tokens = {}, {}
    for name, (batch_size, accumulate, changes) in ways.items():
        args = {
            "max_steps": 2,
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulate,
        }
        run(folder, stage(folder, args=args, **changes), output=str(folder / name))
        lines = log(folder, output=name)
        losses[name] = [line["loss"] for line in lines]
        tokens[name] = [line["tokens"] for line in lines]
    for name in ways:
        assert losses[name] == pytest.approx(losses["single"], abs=2e-5)
        assert tokens[name] == tokens["single"]


def test_grouping_by_the_trainers_own_argument_opens_no_image(folder, monkeypatch):
    model, processor = tiny_model()
    args = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 3}
    trainer = trainer_for(model, processor, folder, args=args)
    expected = [len(item["input_ids"]) for item in trainer.train_dataset]
    with monkeypatch.context() as patch:
        patch.setattr(ExampleEncoder, "encode_images", None)
        sampler = trainer._get_train_sampler()
    assert sampler.lengths == expected
    assert sampler.batch_size == 3
    assert sorted(sampler) == list(range(len(expected)))


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"pack": 8}, r"\d+ tokens.*pack=8"),
        ({"pack": 0}, "pack is 0"),
        ({"group": 3}, "group is 3"),
        ({"max_image_tokens": 4}, r"record \d+: .*8 image tokens.*max_image_tokens=4"),
    ],
)
def test_what_cannot_be_packed_is_refused(folder, changes, facts):
    with pytest.raises(UserError, match=facts):
        run(folder, stage(folder, **changes))
    assert not (folder / "out").exists()


def test_too_many_image_tokens_are_skipped_where_the_recipe_says_so(folder):
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    one = stage(folder, max_image_tokens=4, args={"max_steps": 1})
    run(folder, one | {"data": source})
    assert "8 image tokens" in (folder / "out" / "skipped.txt").read_text()
