"""Records that share rows and steps: packed rows give the losses and gradients of the records
alone, orders hold every record once.
"""

import itertools
import random

import pytest
from helpers.packing import check_mixing_family, check_packed_family
from helpers.runs import log, run, stage, write_records
from helpers.tiny import tiny_model

from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.examples import read_examples
from sparsecut.data.packing import LengthGroupedSampler, pack_rows

RNG = random.Random(1)
LENGTHS = [RNG.randrange(3, 30) for _ in range(203)]
IMAGES = [4 * (i % 3) for i in range(203)]


@pytest.fixture
def folder(tmp_path):
    """A folder with data.json, texts.json and their pictures."""
    write_records(tmp_path)
    return tmp_path


@pytest.mark.parametrize("max_images", [None, 8])
def test_rows_hold_every_record_once_within_their_limits(max_images):
    rows = pack_rows(LENGTHS, IMAGES, 40, max_images=max_images)
    assert sorted(itertools.chain(*rows)) == list(range(203))
    assert all(sum(LENGTHS[i] for i in row) <= 40 for row in rows)
    assert all(len({bool(IMAGES[i]) for i in row}) == 1 for row in rows)
    assert max_images is None or all(sum(IMAGES[i] for i in row) <= max_images for row in rows)
    assert max_images or len(rows) < 1.15 * sum(LENGTHS) / 40  # little of the rows is left empty
    assert rows == pack_rows(LENGTHS, IMAGES, 40, max_images=max_images)


def test_an_order_holds_every_item_once_an_epoch_and_is_alike_in_each_step():
    order = LengthGroupedSampler(LENGTHS, IMAGES, 8, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        epochs.append(list(order))
    assert epochs[0] == epochs[2] != epochs[1]
    assert len(epochs[0]) == len(order) == 208
    assert sorted(epochs[0][:203]) == list(range(203)) and epochs[0][203:] == epochs[0][:5]
    steps = [epochs[0][at : at + 8] for at in range(0, 208, 8)]
    mixed = [step for step in steps if len({bool(IMAGES[i]) for i in step}) > 1]
    assert len(mixed) <= 2
    assert sum(max(LENGTHS[i] for i in step) * 8 for step in steps) < 1.2 * sum(LENGTHS)
    plain = list(LengthGroupedSampler(LENGTHS, IMAGES, 8, grouped=False))
    assert sum(
        max(LENGTHS[i] for i in plain[at : at + 8]) * 8 for at in range(0, 208, 8)
    ) > 1.5 * sum(LENGTHS)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_packed_rows_give_the_loss_and_gradients_of_the_records_alone(folder, name):
    check_packed_family(name, folder)


def test_a_language_model_that_would_mix_packed_records_is_refused(folder):
    check_mixing_family("bloom", folder)


def test_packed_and_grouped_stages_have_the_loss_of_single_records(folder):
    """All twelve records in one step, however they are arranged: the mean over all learned tokens,
    and as many tokens seen.
    """
    processor = tiny_model()[1]
    data = TrainingData(read_examples(folder / "data.json"), example_encoder(processor))
    num_rows = len(pack_rows(data.lengths, data.num_image_tokens, 30))
    ways = {
        "single": (12, 1, {}),
        "accumulated": (4, 3, {"group": True}),
        "packed": (num_rows, 1, {"pack": 30}),
        "both": (1, num_rows, {"pack": 30, "group": True}),
    }
    seen = {}
    for name, (size, accumulate, more) in ways.items():
        args = {
            "max_steps": 2,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulate,
        }
        run(folder, stage(folder, args=args, **more), output=str(folder / name))
        seen[name] = [(line["loss"], line["tokens"]) for line in log(folder, output=name)]
    assert num_rows < 9
    for lines in seen.values():
        for (loss, tokens), (expected, as_many) in zip(lines, seen["single"], strict=True):
            assert loss == pytest.approx(expected, abs=2e-5) and tokens == as_many


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"pack": 8}, r"the record has \d+ tokens, but pack=8 makes rows of so many; raise pack"),
        ({"pack": 0}, "pack is 0, but at least 1 token is needed"),
        ({"group": 3}, "group is 3, but must be true or false"),
        (
            {"max_image_tokens": 4},
            r"record \d+: the record has 8 image tokens, but max_image_tokens=4",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_sentence(folder, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        run(folder, stage(folder, **changes))
    assert not (folder / "out").exists()


def test_too_many_image_tokens_are_skipped_where_the_recipe_says_so(folder):
    source = {"path": str(folder / "data.json"), "on_error": "skip"}
    run(folder, stage(folder, max_image_tokens=4) | {"data": source})
    assert "has 8 image tokens" in (folder / "out" / "skipped.txt").read_text()
