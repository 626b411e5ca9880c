"""WebDataset archives: images by their numbers, ids by folder and key, and what is no sample."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pytest
import soundfile
from helpers.records import make_turns
from PIL import Image
from pyarrow import parquet

from sparsecut.config.recipe import Source
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import Example, read_examples, read_source
from sparsecut.data.streaming import read_stream


def make_image(level: int) -> bytes:
    """An image file whose pixels all have one level of grey."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()


def make_json(num_images: int = 1) -> bytes:
    turns = make_turns(("human", "<image>" * num_images + " What?"), ("gpt", "grey"))
    return json.dumps({"conversations": turns}).encode()


def write_archive(path, *members: tuple[str, bytes], links: dict[str, str] | None = None):
    """An archive of (name, content), with hard links at its end."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
    return path


def read_both_ways(path) -> list[list[Example]]:
    """The examples as an indexed source and as a stream give them."""
    streamed = read_stream(Source(str(path), streaming=True))
    return [read_examples(path), list(streamed)]


def read_levels(example: Example) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in example.load_images()]


def make_sound(level: float) -> bytes:
    """A WAV file whose samples all have one level."""
    file = io.BytesIO()
    soundfile.write(file, np.full(1600, level, np.float32), 16_000, "FLOAT", format="WAV")
    return file.getvalue()


def test_audio_members_belong_to_their_sample(tmp_path):
    turns = make_turns(("human", "<audio> <audio> What?"), ("gpt", "loud"))
    record = json.dumps({"conversations": turns}).encode()
    path = write_archive(
        tmp_path / "a.tar",
        ("a.json", record),
        ("a.1.wav", make_sound(0.5)),
        ("a.0.WAV", make_sound(0.25)),
        ("b.json", make_json()),
        ("b.wav", make_sound(0.5)),  # beside an image it is passed over
        ("b.png", make_image(7)),
    )
    for sounding, seen in read_both_ways(path):
        assert (sounding.medium, seen.medium) == ("audio", "image")
        clips = sounding.load_images()
        assert [float(clip.samples[0]) for clip in clips] == [0.25, 0.5]
        assert read_levels(seen) == [7]


def test_an_audio_column_of_a_table_holds_files_or_bytes(tmp_path):
    (tmp_path / "b.wav").write_bytes(make_sound(0.5))
    audio = [{"bytes": make_sound(0.25), "path": "gone.wav"}, {"bytes": None, "path": "b.wav"}]
    table = {"audio": audio, "question": ["<audio> What?"] * 2, "answer": ["quiet", "loud"]}
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(table), path)
    examples = read_examples(path, tmp_path)
    assert [example.medium for example in examples] == ["audio"] * 2
    levels = [float(example.load_images()[0].samples[0]) for example in examples]
    assert levels == [0.25, 0.5]


ORDERS = [
    # archive order -> the levels that are expected
    (["a.10.png", "a.2.png", "a.11.png", "a.1.png", "a.0.png"], [0, 1, 2, 10, 11]),
    (["a.010.png", "a.9.PNG", "a.8.jpeg"], [8, 9, 10]),
    (["a.2.png", "a.png", "a.1.tiff"], [0, 1, 2]),
    (["a.img10.png", "a.img9.png"], [9, 10]),
    (["a.left1.png", "a.left0.png", "a.right1.png", "a.right0.png"], [0, 1, 0, 1]),
]


@pytest.mark.parametrize("names, expected", ORDERS)
def test_images_of_a_sample_come_by_their_numbers(tmp_path, names, expected):
    members = []
    for name in names:
        digits = "".join(character for character in name if character.isdigit())
        members.append((name, make_image(int(digits or 0))))
    path = write_archive(tmp_path / "x.tar", ("a.json", make_json(len(names))), *members)
    for (example,) in read_both_ways(path):
        assert read_levels(example) == expected


def test_names_without_numbers_keep_the_archive_s_order(tmp_path):
    members = [("a.question.png", make_image(50)), ("a.answer.png", make_image(40))]
    path = write_archive(tmp_path / "x.tar", *members, ("a.json", make_json(2)))
    for (example,) in read_both_ways(path):
        assert read_levels(example) == [50, 40]


@pytest.mark.parametrize(
    "folder, expected",
    [("./", ""), ("", ""), ("v1.0/", "v1.0/"), ("./v1.0/./b.c/", "v1.0/b.c/"), ("/top/", "top/")],
)
def test_ids_are_folder_and_key_so_that_records_can_be_held_out(tmp_path, folder, expected):
    members = []
    for name in ("keep", "test"):
        members += [(f"{folder}{name}.json", make_json()), (f"{folder}{name}.png", make_image(1))]
    path = write_archive(tmp_path / "x.tar", *members)
    for examples in read_both_ways(path):
        assert [example.id for example in examples] == [expected + "keep", expected + "test"]
        assert [read_levels(example) for example in examples] == [[1], [1]]
    (kept,) = read_source(Source(str(path), hold_out="test$"), [])
    assert kept.id == expected + "keep"


def test_files_that_no_one_packed_on_purpose_are_passed_over(tmp_path):
    members = [
        ("._a.json", b"\0\5\26\7"),
        ("a.json", make_json()),
        ("._a.png", b"\0\5\26\7"),
        ("a.png", make_image(1)),
        (".DS_Store", b"x"),
        ("__MACOSX/a.json", b"x"),
        ("__MACOSX/._a.png", b"x"),
        ("b/__MACOSX/c.json", b"x"),
    ]
    path = write_archive(tmp_path / "x.tar", *members)
    for (example,) in read_both_ways(path):
        assert (example.id, read_levels(example)) == ("a", [1])


@pytest.mark.parametrize("suffix", ["tiff", "TIF", "JPG", "JpEg", "PNG", "webp", "BMP", "gif"])
def test_every_kind_of_image_is_found_in_any_case(tmp_path, suffix):
    path = write_archive(
        tmp_path / "x.TAR", ("A.JSON", make_json()), (f"A.{suffix}", make_image(3))
    )
    for (example,) in read_both_ways(path):
        assert read_levels(example) == [3]


def test_a_sample_that_links_elsewhere_or_holds_a_name_twice_is_one_bad_record(tmp_path):
    members = [("a.json", make_json()), ("a.png", make_image(1)), ("b.json", make_json())]
    path = write_archive(tmp_path / "x.tar", *members, links={"b.png": "/etc/hostname"})
    problems = []
    assert [e.id for e in read_examples(path, problems=problems)] == ["a"]
    assert ["link" in str(error) for error in problems] == [True]
    twice = [("a.json", make_json()), ("a.png", make_image(1)), ("a.png", make_image(2))]
    with pytest.raises(RecordError, match=r"sample a: a\.png .*twice"):
        read_examples(write_archive(tmp_path / "y.tar", *twice))


def test_a_key_of_bytes_that_are_not_utf8_can_be_written(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    path = write_archive(
        tmp_path / "x.tar", (f"{name}.json", make_json()), (f"{name}.png", make_image(4))
    )
    for (example,) in read_both_ways(path):
        assert example.id.encode() == b"caf\\xe9"
        assert read_levels(example) == [4]


def write_ids(folder, *ids: str) -> str:
    records = []
    for name in ids:
        turns = make_turns(("human", "What?"), ("gpt", "grey"))
        records.append({"id": name, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


def test_a_choice_by_ids_that_does_nothing_is_told(tmp_path, caplog):
    path = write_ids(tmp_path, "train.1", "train.2", "dev.1")
    assert len(read_source(Source(path, hold_out="^dev"), [])) == 2
    assert not caplog.records
    assert len(read_source(Source(path, hold_out="^test"), [])) == 3
    assert "'^test'" in caplog.text and "train.1" in caplog.text


def test_ids_of_several_records_are_told(tmp_path, caplog):
    path = write_ids(tmp_path, "a", "b", "a")
    assert len(read_source(Source(path), [])) == 3
    assert "1 ids" in caplog.text and "'a'" in caplog.text


def test_a_text_beside_an_image_is_its_caption(tmp_path):
    facts = json.dumps({"status": "success", "width": 8}).encode()
    members = [
        ("a.jpg", make_image(7)),
        ("a.txt", b" grey \n"),
        ("b.json", facts),
        ("b.png", make_image(9)),
        ("b.txt", b"dark"),
        ("c.json", make_json()),
        ("c.png", make_image(3)),
        ("c.txt", b"unused"),
    ]
    path = write_archive(tmp_path / "x.tar", *members)
    for one, two, three in read_both_ways(path):
        assert [message["content"] for message in one.messages] == ["<image>", "grey"]
        assert [message["content"] for message in two.messages] == ["<image>", "dark"]
        assert three.messages[1]["content"] == "grey"
        assert [read_levels(example) for example in (one, two, three)] == [[7], [9], [3]]
        assert one.id == "a"
    bad = write_archive(tmp_path / "bad.tar", ("a.txt", b"\xff"), ("a.png", make_image(1)))
    with pytest.raises(RecordError, match=r"sample a: .*\.txt is not UTF-8"):
        read_examples(bad)
    none = write_archive(tmp_path / "none.tar", ("a.png", make_image(1)))
    with pytest.raises(RecordError, match=r"0 \.json .*\.txt"):
        read_examples(none)


def test_samples_of_other_forms_have_the_images_of_the_archive(tmp_path):
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "no"}]
    record = {"messages": turns, "images": ["a.0.png", "a.1.png"]}
    asked = {"question": "what", "answer": "grey"}
    members = [
        ("a.json", json.dumps(record).encode()),
        ("a.1.png", make_image(20)),
        ("a.0.png", make_image(10)),
        ("b.json", json.dumps(asked).encode()),
        ("b.png", make_image(30)),
    ]
    path = write_archive(tmp_path / "x.tar", *members)
    for one, two in read_both_ways(path):
        assert one.messages[0]["content"] == "<image>\n<image>\nsame"
        assert two.messages[0]["content"] == "<image>\nwhat"
        assert (read_levels(one), read_levels(two)) == ([10, 20], [30])
