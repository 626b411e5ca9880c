"""Training data and batches: padding, order of images, workers, and checks before training."""

import tarfile

import pytest
import torch
from helpers.records import make_record, make_turns, write_data
from helpers.tiny import tiny_model
from torch.utils.data import DataLoader

from sparsecut.data.collator import Collator
from sparsecut.data.dataset import TrainingData
from sparsecut.data.encoding import example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples
from sparsecut.data.images import ImageStore
from sparsecut.data.length_limits import Limits
from sparsecut.data.validation import check_examples
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def test_a_broken_image_is_found_when_images_are_opened(image_folder, tiny):
    path = write_data(image_folder, make_record(), make_record(image="broken.png"))
    encoder, examples = example_encoder(tiny[1]), read_examples(path)
    assert len(check_examples(examples, encoder)) == 2
    with pytest.raises(RecordError, match=r"broken.png") as caught:
        check_examples(examples, encoder, open_images=True)
    assert caught.value.where == f"{path} record 1"
    problems = []
    good = check_examples(examples, encoder, open_images=True, problems=problems)
    assert good == examples[:1] and len(problems) == 1


def test_a_record_longer_than_the_model_takes_is_named(image_folder, tiny):
    path = write_data(image_folder, make_record())
    encoder = example_encoder(tiny[1], limits=Limits(model_limit=8))
    with pytest.raises(RecordError, match=r"record 0: .*\b8\b.*max_length"):
        check_examples(read_examples(path), encoder)


def test_batches_pad_on_the_right_and_stack_images_in_order(image_folder, tiny):
    two_images = make_turns(("human", "<image><image> is it"), ("gpt", "a cat"))
    path = write_data(
        image_folder,
        make_record(image=["a.png", "sub/b.png"], conversations=two_images),
        make_record(
            image=None, conversations=make_turns(("human", "are you sure"), ("gpt", "yes"))
        ),
        make_record(image="sub/b.png"),
    )
    model, processor = tiny
    encoder = example_encoder(processor)
    data, collate = TrainingData(read_examples(path), encoder), Collator(encoder)
    items = [data[i] for i in range(3)]
    batch = collate(items)
    store = ImageStore(image_folder)
    a, b = (processor.pixels([store.load(name)]) for name in ("a.png", "sub/b.png"))
    assert torch.equal(batch["pixel_values"], torch.cat([a, b, b]))
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row, :length].all()
        assert not batch["attention_mask"][row, length:].any()
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"].long())
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][batch["input_ids"] == processor.image_token_id] == -100).all()
    assert "pixel_values" not in collate([items[1]])
    assert torch.isfinite(model(**batch).loss)
    with pytest.raises(UserError, match="labels are masked"):
        collate([{**items[1], "labels": torch.full_like(items[1]["labels"], -100)}])


def test_items_are_the_same_in_workers(image_folder, tiny):
    with tarfile.open(image_folder / "images.tar", "w") as archive:
        archive.add(image_folder / "a.png", "a.png")
        archive.add(image_folder / "sub/b.png", "sub/b.png")
    records = [make_record(image=name) for name in ["a.png", "sub/b.png"] * 4]
    examples = read_examples(write_data(image_folder, *records), image_folder / "images.tar")
    encoder = example_encoder(tiny[1])
    data = TrainingData(examples, encoder)
    collator = Collator(encoder)
    here = list(DataLoader(data, batch_size=2, collate_fn=collator))
    workers = list(DataLoader(data, batch_size=2, num_workers=2, collate_fn=collator))
    for one, two in zip(here, workers, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_record_passes_a_worker_as_it_is(image_folder, tiny, num_workers):
    path = write_data(image_folder, make_record(), make_record(image="broken.png"))
    encoder = example_encoder(tiny[1])
    data = TrainingData(read_examples(path), encoder)
    collator = Collator(encoder, defer_errors=True)
    good, bad = DataLoader(data, batch_size=1, num_workers=num_workers, collate_fn=collator)
    assert "error" not in good
    assert isinstance(bad["error"], RecordError) and bad["error"].where == f"{path} record 1"
    with pytest.raises(RecordError):
        Collator(encoder)(data.__getitems__([0, 1]))
