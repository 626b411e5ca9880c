"""Forms of records in tables that hold their images: the same tokens, labels and pixels."""

import pickle

import datasets
import pytest
from helpers.forms import FORMS, NAMES, assert_same, make_pair, read_expected
from helpers.tiny import tiny_model

from sparsecut.config.source import Source
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples, read_source
from sparsecut.data.streaming import read_stream


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


def list_parts(messages: list[dict]) -> list[dict]:
    """Messages whose contents are all lists where one is: a column has one type."""
    if not any(isinstance(message.get("content"), list) for message in messages):
        return messages
    listed = []
    for message in messages:
        content = message["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        listed.append({**message, "content": parts})
    return listed


def write_table(folder, record: dict, suffix: str):
    """One record as a file that `datasets` writes, with a column of each key."""
    for key in ("messages", "prompt", "completion"):
        if isinstance(record.get(key), list):
            record = {**record, key: list_parts(record[key])}
    table = datasets.Dataset.from_list([record])
    if suffix == "parquet":
        table.to_parquet(folder / "data.parquet")
    else:
        table.save_to_disk(folder / "data")
    return folder / ("data.parquet" if suffix == "parquet" else "data")


@pytest.mark.parametrize("suffix", ["parquet", "saved"])
@pytest.mark.parametrize("name", FORMS)
def test_forms_in_tables_that_hold_their_images(image_folder, processor, name, suffix):
    images = [{"bytes": (image_folder / one).read_bytes(), "path": None} for one in NAMES]
    record, _ = make_pair(name, *images)
    (example,) = read_examples(write_table(image_folder, record, suffix))
    assert_same(processor, example, read_expected(image_folder, name))


def test_image_columns_of_any_name_stay_on_disk(image_folder, processor):
    """Images come by name, in this process and in another, and by way of a stream as bytes."""
    data = [(image_folder / name).read_bytes() for name in NAMES]
    records = [
        {"frage": "what is it", "antwort": "a cat", "bild/er": [one, two], "mask": one}
        for one, two in [[{"bytes": image, "path": None} for image in data]]
    ]
    datasets.Dataset.from_list(records).to_parquet(image_folder / "data.parquet")
    columns = {"question": "frage", "answer": "antwort", "images": "bild/er"}
    source = Source(str(image_folder / "data.parquet"), columns=columns)
    (example,) = read_source(source, [])
    assert example.images == ["0/0/bild/er", "0/1/bild/er"]
    expected = read_expected(image_folder, "messages without placeholders")
    assert_same(processor, example, expected)
    assert_same(processor, pickle.loads(pickle.dumps(example)), expected)
    assert [example.store.read_bytes(name) for name in example.images] == data
    assert example.store.find_file(example.images[0]) == image_folder / "data.parquet"
    (streamed,) = read_stream(source)
    assert streamed.images == data
    assert_same(processor, streamed, expected)


def test_a_table_names_files_beside_it(image_folder, processor):
    images = [{"bytes": None, "path": name} for name in NAMES]
    (example,) = read_examples(write_table(image_folder, make_pair("TRL", *images)[0], "parquet"))
    assert_same(processor, example, read_expected(image_folder, "TRL"))
    missing = {"question": "what", "answer": "b", "images": [{"bytes": None, "path": "no.png"}]}
    datasets.Dataset.from_list([missing]).to_parquet(image_folder / "bad.parquet")
    with pytest.raises(RecordError, match=r"bad.parquet record 0: .*no\.png"):
        read_examples(image_folder / "bad.parquet")


def test_mixed_forms_in_one_table(image_folder):
    """Keys of the other records are empty."""
    rows = [make_pair(name, *NAMES)[0] for name in ("caption", "question and answer", "LLaVA")]
    keys = {key: None for row in rows for key in row}
    table = datasets.Dataset.from_list([{**keys, **row} for row in rows])
    table.to_parquet(image_folder / "data.parquet")
    examples = read_examples(image_folder / "data.parquet")
    assert [example.messages[0]["content"] for example in examples] == [
        "<image>",
        "<image>\nwhat is it",
        "<image>\nwhat is it",
    ]
