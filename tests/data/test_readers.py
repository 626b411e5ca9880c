"""Files of records of every kind, and patterns of files."""

import pytest
from helpers.shards import write_shards

from sparsecut.data.examples import read_examples
from sparsecut.data.readers import find_files
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


def read_pixels(examples) -> dict:
    """The bytes of every example's images, by its id without a folder."""
    pixels = {}
    for example in examples:
        name = example.id.rpartition("/")[2]
        pixels[name] = [image.tobytes() for image in example.load_images()]
    return pixels


@pytest.mark.parametrize(
    "path", ["part-*.jsonl", "shard-*.tar", "shard-{0..2}.tar", "saved", "table.parquet", "arrow"]
)
def test_every_kind_of_file_gives_the_same_examples(folder, path):
    expected = read_examples(folder / "data.json")
    file = next((folder / "saved").glob("*.arrow")) if path == "arrow" else folder / path
    examples = read_examples(file)
    assert {e.id: e.messages for e in examples} == {e.id: e.messages for e in expected}
    assert read_pixels(examples) == read_pixels(expected)
    for example in examples:
        assert not any(isinstance(image, bytes) for image in example.images)  # they stay on disk


def test_patterns_name_files_in_order(folder):
    for pattern in ("shard-*.tar", "shard-{0..2}.tar"):
        names = [file.name for file in find_files(folder / pattern)]
        assert names == ["shard-0.tar", "shard-1.tar", "shard-2.tar"]


@pytest.mark.parametrize(
    "pattern, facts",
    [
        ("shard-{0..3}.tar", "shard-3.tar"),
        ("shard-{3..0}.tar", "3 down to 0"),
        ("nowhere-*.jsonl", r"nowhere-\*.jsonl"),
    ],
)
def test_files_that_are_missing_are_named(folder, pattern, facts):
    with pytest.raises(UserError, match=facts):
        find_files(folder / pattern)
