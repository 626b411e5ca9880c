"""Records, pictures and batches: the same from every format, and bad input ends in one sentence
that names the record.
"""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers.tiny import tiny_model
from PIL import Image
from torch.utils.data import DataLoader

from sparsecut.config.recipe import Source
from sparsecut.data.dataset import (
    Collator,
    TrainingData,
    check_examples,
    choose,
    read_examples,
    read_source,
)
from sparsecut.data.examples import Example
from sparsecut.data.images import Pictures


def record(**changes):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "cat"}]
    return {"id": "r", "image": "a.png", "conversations": turns, **changes}


def turns(*pairs):
    return [{"from": who, "value": text} for who, text in pairs]


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures: a.png and sub/b.png are good, broken.png is not."""
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(["a.png", "sub/b.png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def write(folder, *records, name="data.json"):
    path = folder / name
    lines = [json.dumps(r) for r in records]
    path.write_text("\n".join(lines) if name.endswith("l") else "[" + ",".join(lines) + "]")
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_the_same_records_from_every_format(folder, name):
    records = [
        record(group="g", level="low"),
        record(
            id="two",
            image=["a.png", "sub/b.png"],
            conversations=turns(("human", "<image><image> Same?"), ("gpt", "no")),
        ),
        record(
            id="text",
            image=None,
            conversations=turns(("system", "Hi"), ("human", "2+2?"), ("gpt", "4")),
        ),
    ]
    if name.endswith("parquet"):
        for r in records:  # a Parquet column has one type
            r["image"] = [r["image"]] if isinstance(r["image"], str) else r["image"]
        path = folder / name
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path = write(folder, *records, name=name)
    one, two, text = read_examples(path)
    assert (one.images, one.group, one.level) == (["a.png"], "g", "low") and two.images == [
        "a.png",
        "sub/b.png",
    ]
    assert [m["role"] for m in text.messages] == [
        "system",
        "user",
        "assistant",
    ] and text.images == []
    assert [p.size for p in two.pictures()] == [(10, 12)] * 2 and text.pictures() == []
    assert one.source == f"{path} {'line 1' if name.endswith('l') else 'record 0'}"


def test_parquet_may_hold_the_pictures_themselves(folder):
    stored = {"bytes": (folder / "a.png").read_bytes(), "path": "a.png"}
    broken = {"bytes": b"nothing", "path": "b.png"}
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([record(image=stored), record(image=broken)]), path
    )
    good, bad = read_examples(path)
    assert np.array_equal(good.pictures()[0], Pictures(folder).open("a.png"))
    with pytest.raises(
        ValueError, match=r"data.parquet record 1: the picture stored in the record is broken"
    ):
        bad.pictures()


@pytest.mark.parametrize("name", ["p.tar", "p.tar.gz", "p.tgz"])
def test_archives_give_the_folders_pictures(folder, name):
    with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as archive:
        archive.add(folder / "a.png", "./a.png")
        archive.add(folder / "sub", "sub")
    pictures = Pictures(folder / name)
    assert "a.png" in pictures and "sub/b.png" in pictures and "sub" not in pictures
    for picture in ("a.png", "sub/b.png"):
        assert np.array_equal(pictures.open(picture), Pictures(folder).open(picture))


def test_archives_that_cannot_be_used_are_refused(folder, monkeypatch):
    (folder / "bad.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"bad.tar cannot be read as a tar archive"):
        Pictures(folder / "bad.tar")
    monkeypatch.setattr("sparsecut.data.images.MEMORY_LIMIT", 100)
    with tarfile.open(folder / "big.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("empty"), io.BytesIO())
        archive.add(folder / "a.png", "a.png")
    with pytest.raises(ValueError, match=r"holds more than .* unpack it once"):
        Pictures(folder / "big.tar.gz")
    with pytest.raises(ValueError, match="there are no pictures at"):
        Pictures(folder / "nowhere")


def test_photographs_are_seen_upright(tmp_path):
    from sparsecut.imaging import open_image

    wide = np.zeros((8, 16, 3), dtype=np.uint8)
    wide[:, :8] = 250  # white on the left, as the camera held sideways stored it
    exif = Image.Exif()
    exif[274] = 6  # to be turned a quarter clockwise
    Image.fromarray(wide).save(tmp_path / "a.jpg", exif=exif, quality=95)
    for picture in (Pictures(tmp_path).open("a.jpg"), open_image(tmp_path / "a.jpg")):
        turned = np.asarray(picture)
        assert turned.shape == (16, 8, 3) and turned[:8].mean() > 230 > 20 > turned[8:].mean()


@pytest.mark.parametrize(
    "bad, sentence",
    [
        (
            record(image="c.png"),
            "there is no picture c.png in .*; add it or correct the record's `image`",
        ),
        (
            record(image=["a.png", "a.png"]),
            "the text has 1 <image> but the record names 2 pictures",
        ),
        (record(image=None), "the text has 1 <image> but the record names 0 pictures"),
        (record(image=3), "`image` holds 3, but a picture's name"),
        (
            record(conversations=turns(("human", "<image> What?"), ("gpt", " "))),
            "turn 1 has an empty answer",
        ),
        (record(conversations=turns(("human", ""), ("gpt", "cat"))), "turn 0 has an empty text"),
        (record(conversations=turns(("human", "<image> What?"))), "there is no gpt turn"),
        (
            record(conversations=turns(("robot", "Hi"), ("gpt", "cat"))),
            "turn 0 is from 'robot'.*; allowed are human, gpt and system",
        ),
        (
            record(conversations=turns(("gpt", "cat"), ("human", "<image>"))),
            "human and gpt must alternate, human first",
        ),
        (
            record(conversations=turns(("human", "<image>"), ("gpt", "a"), ("gpt", "b"))),
            "must alternate",
        ),
        (
            record(conversations=turns(("human", "<image>"), ("gpt", "a"), ("system", "b"))),
            "a system turn stands after",
        ),
        (
            record(conversations=turns(("human", "Hi"), ("gpt", "<image>"))),
            "turn 1 is from gpt and holds <image>",
        ),
        (record(conversations="cat"), "a record is an object with `conversations`"),
        ("cat", "a record is an object with `conversations`, but this is a text without"),
    ],
)
def test_every_bad_record_is_named(folder, bad, sentence):
    path = write(folder, record(), bad, record(id="last"), name="data.jsonl")
    with pytest.raises(ValueError, match=rf"^{path} line 2: .*{sentence}"):
        read_examples(path)
    problems = []
    assert [e.id for e in read_examples(path, problems=problems)] == ["r", "last"]
    assert [error.where for error in problems] == [f"{path} line 2"]


def test_malformed_files_are_named_with_the_place(folder):
    (folder / "x.jsonl").write_text(json.dumps(record()) + "\n\n{'id': 1}\n" + json.dumps(record()))
    with pytest.raises(ValueError, match=r"x.jsonl line 3: malformed JSON at column 2"):
        read_examples(folder / "x.jsonl")
    problems = []
    assert len(read_examples(folder / "x.jsonl", problems=problems)) == 2 and len(problems) == 1
    (folder / "x.json").write_text('[{"id": 1},\n {"id" 2}]')
    with pytest.raises(ValueError, match=r"x.json line 2 column 8: malformed JSON"):
        read_examples(folder / "x.json")
    (folder / "y.json").write_text(json.dumps(record()))
    with pytest.raises(
        ValueError, match=r"y.json holds an object, but a list of records is needed"
    ):
        read_examples(folder / "y.json")
    (folder / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x.parquet cannot be read as Parquet"):
        read_examples(folder / "x.parquet")
    for name in ("missing.json", "a.png"):
        with pytest.raises(
            ValueError,
            match=(
                r"is not a file of records; give an existing file that ends in .json, .jsonl,"
                r" .parquet"
            ),
        ):
            read_examples(folder / name)


def test_a_broken_picture_is_found_when_pictures_are_opened(folder):
    path = write(folder, record(), record(image="broken.png"))
    processor, examples = tiny_model()[1], read_examples(path)
    assert len(check_examples(examples, processor)) == 2
    with pytest.raises(
        ValueError, match=r"data.json record 1: the picture broken.png in .* is broken"
    ):
        check_examples(examples, processor, open_pictures=True)
    problems = []
    assert (
        check_examples(examples, processor, open_pictures=True, problems=problems) == examples[:1]
        and len(problems) == 1
    )
    with pytest.raises(
        ValueError, match=r"record 0: the record has \d+ tokens, but the language model takes 8"
    ):
        check_examples(examples, processor, limit=8)


def test_sources_choose_by_id(folder):
    path = str(
        write(
            folder,
            *(
                record(id=f"{s}.{k}.{i}")
                for s in ("train", "dev")
                for k in ("name", "tone")
                for i in range(20)
            ),
        )
    )
    examples = read_source(Source(path, where="^train", hold_out=r"7$", group=r"\.(\w+)\."), [])
    assert len(examples) == 36 and {e.group for e in examples} == {"name", "tone"}
    few, many = (choose(examples, keep=n) for n in (5, 9))
    assert [e for e in many if e in few] == few == sorted(
        few, key=examples.index
    ) and few != examples[:5]
    with pytest.raises(
        ValueError, match=r"gives no record to use: of 80 good ones, none is left by where='\^test'"
    ):
        read_source(Source(path, where="^test"), [])
    with pytest.raises(ValueError, match="record 80"):
        read_source(Source(str(write(folder, *[record()] * 80, record(image="no.png")))), [])
    problems = []
    read_source(Source(path, on_error="skip"), problems)
    assert len(problems) == 1


def test_batches_pad_on_the_right_and_stack_pictures_in_order(folder):
    path = write(
        folder,
        record(
            image=["a.png", "sub/b.png"],
            conversations=turns(("human", "<image><image> is it"), ("gpt", "a cat")),
        ),
        record(image=None, conversations=turns(("human", "are you sure"), ("gpt", "yes"))),
        record(image="sub/b.png"),
    )
    model, processor = tiny_model()
    data, collate = TrainingData(read_examples(path), processor), Collator(processor)
    items = [data[i] for i in range(3)]
    batch = collate(items)
    a, b = (processor.pixels([Pictures(folder).open(name)]) for name in ("a.png", "sub/b.png"))
    assert torch.equal(batch["pixel_values"], torch.cat([a, b, b]))
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (
            batch["input_ids"].shape[1] - length
        )
        assert torch.equal(batch["input_ids"][row, :length], item["input_ids"].long())
        assert (batch["labels"][row, length:] == -100).all()
        assert (batch["input_ids"][row, length:] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][batch["input_ids"] == processor.image_token_id] == -100).all()
    assert "pixel_values" not in collate([items[1]])
    assert torch.isfinite(model(**batch).loss)
    with pytest.raises(ValueError, match="no item of the batch has a token to learn"):
        collate([{**items[1], "labels": torch.full_like(items[1]["labels"], -100)}])


def test_items_are_the_same_in_workers(folder):
    with tarfile.open(folder / "p.tar", "w") as archive:
        archive.add(folder / "a.png", "a.png")
        archive.add(folder / "sub/b.png", "sub/b.png")
    examples = read_examples(
        write(folder, *(record(image=name) for name in ["a.png", "sub/b.png"] * 4)),
        folder / "p.tar",
    )
    processor = tiny_model()[1]
    data = TrainingData(examples, processor)
    batches = [
        list(DataLoader(data, batch_size=2, num_workers=n, collate_fn=Collator(processor)))
        for n in (0, 2)
    ]
    for one, two in zip(*batches, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert isinstance(examples[0], Example)
