"""Records: the same from every format, and every bad one is named with its place."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.records import make_record, make_turns, write_data

from sparsecut.config.recipe import Source
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples, read_source, select_examples
from sparsecut.data.images import ImageStore
from sparsecut.schema import UserError


def write_parquet(path, records: list[dict]):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_the_same_records_from_every_format(image_folder, name):
    records = [
        make_record(group="g", level="low"),
        make_record(
            id="two",
            image=["a.png", "sub/b.png"],
            conversations=make_turns(("human", "<image><image> Same?"), ("gpt", "no")),
        ),
        make_record(
            id="text",
            image=None,
            conversations=make_turns(("system", "Hi"), ("human", "2+2?"), ("gpt", "4")),
        ),
    ]
    if name.endswith("parquet"):
        records[0]["image"] = ["a.png"]  # a Parquet column has one type
        path = write_parquet(image_folder / name, records)
    else:
        path = write_data(image_folder, *records, name=name)
    one, two, text = read_examples(path)
    assert (one.images, one.group, one.level) == (["a.png"], "g", "low")
    assert two.images == ["a.png", "sub/b.png"]
    assert text.images == []
    assert [m["role"] for m in text.messages] == ["system", "user", "assistant"]
    assert [image.size for image in two.load_images()] == [(10, 12)] * 2
    assert text.load_images() == []
    assert one.place == f"{path} {'line 1' if name.endswith('l') else 'record 0'}"


def test_parquet_may_hold_the_images_themselves(image_folder):
    stored = {"bytes": (image_folder / "a.png").read_bytes(), "path": "a.png"}
    broken = {"bytes": b"nothing", "path": "b.png"}
    records = [make_record(image=stored), make_record(image=broken)]
    good, bad = read_examples(write_parquet(image_folder / "data.parquet", records))
    assert np.array_equal(good.load_images()[0], ImageStore(image_folder).load("a.png"))
    with pytest.raises(RecordError, match=r"data.parquet record 1: .*broken"):
        bad.load_images()


BAD_RECORDS = [
    (make_record(image="c.png"), "c.png"),
    (make_record(image=["a.png", "a.png"]), "1 <image> .* 2 images"),
    (make_record(image=None), "1 <image> .* 0 images"),
    (make_record(image=3), "`image` holds 3"),
    (
        make_record(conversations=make_turns(("human", "<image> What?"), ("gpt", " "))),
        "turn 1 .*answer",
    ),
    (make_record(conversations=make_turns(("human", ""), ("gpt", "cat"))), "turn 0 .*text"),
    (make_record(conversations=make_turns(("human", "<image> What?"))), "no gpt turn"),
    (
        make_record(conversations=make_turns(("robot", "Hi"), ("gpt", "cat"))),
        "turn 0 .*'robot'.*human, gpt",
    ),
    (
        make_record(conversations=make_turns(("gpt", "cat"), ("human", "<image>"))),
        "assistant, user",
    ),
    (
        make_record(conversations=make_turns(("human", "<image>"), ("gpt", "a"), ("gpt", "b"))),
        "user, assistant, assistant",
    ),
    (
        make_record(conversations=make_turns(("human", "<image>"), ("gpt", "a"), ("system", "b"))),
        "system turn",
    ),
    (
        make_record(conversations=make_turns(("human", "Hi"), ("gpt", "<image>"))),
        "turn 1 .*gpt .*<image>",
    ),
    (make_record(conversations="cat"), "`conversations`"),
    ("cat", "`conversations`.* a text"),
]


@pytest.mark.parametrize("bad, facts", BAD_RECORDS)
def test_every_bad_record_is_named(image_folder, bad, facts):
    path = write_data(image_folder, make_record(), bad, make_record(id="last"), name="data.jsonl")
    with pytest.raises(RecordError, match=facts) as caught:
        read_examples(path)
    assert caught.value.where == f"{path} line 2"
    problems = []
    assert [e.id for e in read_examples(path, problems=problems)] == ["r", "last"]
    assert [error.where for error in problems] == [f"{path} line 2"]


def test_a_malformed_line_is_one_bad_record(image_folder):
    line = json.dumps(make_record())
    (image_folder / "x.jsonl").write_text(f"{line}\n\n{{'id': 1}}\n{line}")
    with pytest.raises(RecordError, match=r"x.jsonl line 3: .*column 2"):
        read_examples(image_folder / "x.jsonl")
    problems = []
    assert len(read_examples(image_folder / "x.jsonl", problems=problems)) == 2
    assert len(problems) == 1


@pytest.mark.parametrize(
    "name, content, facts",
    [
        ("x.json", b'[\n {"id" 2}]', "x.json record 0: .*line 2 column 8"),
        ("x.json", b'{"id": 1}', "x.json .*an object.*a list.*one record a line"),
        ("x.json", b"\xff", "x.json .*UTF-8"),
        ("x.parquet", b"nothing", "x.parquet .*Parquet"),
        ("x.txt", b"nothing", r"x.txt .*\.json, \.jsonl.*\.parquet"),
    ],
)
def test_malformed_files_are_refused(image_folder, name, content, facts):
    (image_folder / name).write_bytes(content)
    with pytest.raises(UserError, match=facts):
        read_examples(image_folder / name)
    with pytest.raises(UserError, match=r"missing.json"):
        read_examples(image_folder / "missing.json")


@pytest.fixture
def many(image_folder):
    """A file of 80 records, which are train or dev, and about a name or a tone."""
    ids = []
    for split in ("train", "dev"):
        for kind in ("name", "tone"):
            ids += [f"{split}.{kind}.{i}" for i in range(20)]
    return str(write_data(image_folder, *[make_record(id=one) for one in ids]))


def test_sources_choose_by_id(many):
    examples = read_source(Source(many, where="^train", hold_out=r"7$", group=r"\.(\w+)\."), [])
    assert len(examples) == 36 and {e.group for e in examples} == {"name", "tone"}
    few, more = (select_examples(examples, keep=number) for number in (5, 9))
    assert [e for e in more if e in few] == few == sorted(few, key=examples.index)
    assert few != examples[:5]
    with pytest.raises(UserError, match=r"80 .*where='\^test'"):
        read_source(Source(many, where="^test"), [])


def test_bad_records_of_a_source_stop_or_are_skipped(image_folder):
    path = str(write_data(image_folder, *[make_record()] * 80, make_record(image="no.png")))
    with pytest.raises(RecordError, match="record 80"):
        read_source(Source(path), [])
    problems = []
    assert len(read_source(Source(path, on_error="skip"), problems)) == 80
    assert len(problems) == 1
