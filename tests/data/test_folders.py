"""Folders of records: saved splits, images with metadata or in class folders, cloned data sets."""

import json

import datasets
import pytest
from helpers.shards import write_shards

from sparsecut.config.source import Source
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import Example, read_source
from sparsecut.data.streaming import read_stream
from sparsecut.schema import UserError

TURNS = [{"from": "human", "value": "<image>\nwhat"}, {"from": "gpt", "value": "a cat"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tests' twelve records in every kind of file."""
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder)
    return folder


@pytest.fixture
def images(made, tmp_path):
    """A folder with images in train/cat, train/dog and test/cat."""
    for place in ("train/cat/0.png", "train/cat/1.png", "train/dog/2.png", "test/cat/4.png"):
        target = tmp_path / "pets" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((made / target.name).read_bytes())
    return tmp_path / "pets"


def read(path, **keys):
    """The examples of a source, the same from a stream, with their images opened."""
    examples = read_source(Source(str(path), **keys), [])
    streamed = list(read_stream(Source(str(path), streaming=True, **keys)))
    assert all(isinstance(example, Example) for example in streamed)
    assert [e.messages for e in streamed] == [e.messages for e in examples]
    for one, other in zip(examples, streamed, strict=True):
        assert [i.size for i in one.load_images()] == [i.size for i in other.load_images()]
    return examples


def test_a_saved_dict_of_splits(made, tmp_path):
    saved = datasets.load_from_disk(str(made / "saved"))
    parts = {"train": saved.select(range(8)), "test": saved.select(range(8, 12))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict", num_shards={"train": 3, "test": 1})
    assert len(read(tmp_path / "dict", split="train")) == 8
    assert [e.id for e in read(tmp_path / "dict", split="test")] == saved["id"][8:]
    with pytest.raises(UserError, match="train, test"):
        read_source(Source(str(tmp_path / "dict")), [])
    with pytest.raises(UserError, match=r"tset.*did you mean 'test'"):
        read_source(Source(str(tmp_path / "dict"), split="tset"), [])
    assert len(read(tmp_path / "dict" / "train")) == 8
    with pytest.raises(UserError, match="split"):
        read_source(Source(str(made / "saved"), split="train"), [])


def test_class_folders_ask_the_question_of_the_source(images):
    examples = read(images, split="train", question="What is it?")
    answers = [example.messages[1]["content"] for example in examples]
    assert sorted(answers) == ["cat", "cat", "dog"]
    assert examples[0].messages[0]["content"].endswith("What is it?")
    assert {e.id.split("/")[-2] for e in examples} == {"cat", "dog"}
    chosen = read_source(Source(str(images), split="train", question="?", hold_out="dog"), [])
    assert len(chosen) == 2
    with pytest.raises(UserError, match="`question`"):
        read_source(Source(str(images), split="train"), [])
    with pytest.raises(UserError, match="train, test"):
        read_source(Source(str(images), question="?"), [])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_names_the_images_of_its_folder(images, kind):
    records = [
        {"file_name": "cat/0.png", "conversations": TURNS},
        {"file_name": "dog/2.png", "conversations": TURNS},
    ]
    folder = images / "train"
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    elif kind == "csv":
        flat = {
            key: [json.dumps(r[key]) if key != "file_name" else r[key] for r in records]
            for key in TURN_KEYS
        }
        datasets.Dataset.from_dict(flat).to_csv(folder / "metadata.csv")
    else:
        datasets.Dataset.from_list(records).to_parquet(folder / "metadata.parquet")
    examples = read(images, split="train")
    assert [example.images for example in examples] == [["cat/0.png"], ["dog/2.png"]]


TURN_KEYS = ("file_name", "conversations")


def test_several_file_columns_and_labels_of_metadata(images):
    two = [{"from": "human", "value": "<image><image>which"}, {"from": "gpt", "value": "left"}]
    record = {"left_file_name": "cat/0.png", "right_file_name": "dog/2.png", "conversations": two}
    (images / "train" / "metadata.jsonl").write_text(json.dumps(record))
    (example,) = read(images / "train")
    assert example.images == ["cat/0.png", "dog/2.png"]
    record = {"file_name": "cat/0.png", "label": "a tabby"}
    (images / "train" / "metadata.jsonl").write_text(json.dumps(record))
    (example,) = read(images / "train", question="What is it?")
    assert example.messages[1]["content"] == "a tabby"
    (images / "train" / "metadata.jsonl").write_text(json.dumps({"name": "0.png"}))
    with pytest.raises(RecordError, match=r"metadata\.jsonl line 1.*file_name"):
        read_source(Source(str(images / "train")), [])


def test_a_cloned_data_set_with_configurations(made, tmp_path):
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    (clone / ".git").mkdir()
    (clone / ".git" / "x.jsonl").write_text("{}")
    saved = datasets.load_from_disk(str(made / "saved"))
    for number in range(2):
        name = f"train-0000{number}-of-00002.parquet"
        saved.shard(2, number).to_parquet(clone / "data" / name)
    (clone / "vqa.jsonl").write_text(
        json.dumps({"conversations": [TURNS[0] | {"value": "hi"}, TURNS[1]]})
    )
    assert len(read(clone / "data")) == 12
    configs = (
        "---\nconfigs:\n- config_name: pictures\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n- config_name: vqa\n  data_files: vqa.jsonl\n---\n# Title\n"
    )
    (clone / "README.md").write_text(configs)
    assert len(read(clone, name="pictures", split="train")) == 12
    assert len(read(clone, name="vqa")) == 1
    with pytest.raises(UserError, match=r"pictures, vqa.*`name`"):
        read_source(Source(str(clone)), [])
    with pytest.raises(UserError, match="did you mean 'pictures'"):
        read_source(Source(str(clone), name="picture"), [])
    with pytest.raises(UserError, match=r"train.*`split`"):
        read_source(Source(str(clone), name="vqa", split="valid"), [])


def test_pointers_of_git_lfs_are_told(made, images, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("train-00000-of-00001.parquet", "train.jsonl", "train.csv", "train.tar"):
        (clone / name).write_text(pointer)
        with pytest.raises(UserError, match=f"{name}.*git lfs pull"):
            read_source(Source(str(clone)), [])
        (clone / name).unlink()
    (images / "train" / "cat" / "0.png").write_text(pointer)
    first = read_source(Source(str(images), split="train", question="?"), [])[0]
    with pytest.raises(RecordError, match="git lfs pull"):
        first.load_images()


def test_what_has_no_effect_or_is_no_data_is_refused(made, tmp_path):
    for key in ("name", "split", "revision"):
        with pytest.raises(UserError, match=f"^{key} is 'x'"):
            read_source(Source(str(made / "data.json"), **{key: "x"}), [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        read_source(Source(str(tmp_path / "empty")), [])
    (tmp_path / "empty" / "a.txt").write_text("text")
    with pytest.raises(UserError, match="empty"):
        read_source(Source(str(tmp_path / "empty")), [])
