"""Forms of records: each is the example, the tokens, the labels and the pixels of LLaVA's."""

import numpy as np
import pytest
import torch
from helpers.forms import FORMS, make_data_url, make_pair
from helpers.records import encode_batch, write_data
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.data.examples import Example, parse_record, read_examples
from sparsecut.data.images import ImageStore

NAMES = ("a.png", "sub/b.png")


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


def encode(processor, example: Example) -> dict[str, torch.Tensor]:
    return encode_batch(processor, [example], [example.load_images()])


def assert_same(processor, example: Example, expected: Example) -> None:
    """The same messages and, for a model, the same tokens, labels and pixels."""
    assert example.messages == expected.messages
    batch, wanted = encode(processor, example), encode(processor, expected)
    assert batch.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(batch[key], value), key
    assert (batch["labels"] >= 0).any()


def read_expected(folder, name: str) -> Example:
    """The record of a form as LLaVA has it."""
    _, llava = make_pair(name, *NAMES)
    (expected,) = read_examples(write_data(folder, llava, name="llava.json"))
    return expected


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_record(image_folder, processor, name):
    record, _ = make_pair(name, *NAMES)
    path = write_data(image_folder, record, name="data.jsonl")
    (example,) = read_examples(path)
    assert_same(processor, example, read_expected(image_folder, name))
    assert example.id == "r" and example.place == f"{path} line 1"


INLINE = {
    "data URL": make_data_url,
    "base64": lambda data: make_data_url(data).partition(",")[2],
    "bytes": lambda data: data,
    "object": lambda data: {"bytes": data, "path": None},
    "PIL": lambda data: read_pil(data),
    "array": lambda data: np.asarray(read_pil(data)),
}


def read_pil(data: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", INLINE)
@pytest.mark.parametrize("name", ["LLaMA-Factory", "TRL", "Qwen", "OpenAI", "question and answer"])
def test_images_may_stand_in_the_record(image_folder, processor, name, kind):
    images = [INLINE[kind]((image_folder / one).read_bytes()) for one in NAMES]
    record, _ = make_pair(name, *images)
    example = parse_record(record, "here", ImageStore(image_folder))
    assert all(isinstance(image, bytes) for image in example.images)
    assert_same(processor, example, read_expected(image_folder, name))
