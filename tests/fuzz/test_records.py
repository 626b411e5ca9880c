"""A record of anything is an example, or an error of that record: the others are read."""

import io
import json
import tarfile

from helpers.fuzzing import draw_changed, draw_damaged
from hypothesis import strategies as st
from PIL import Image

from sparsecut.data.examples import read_examples
from sparsecut.schema import UserError

RECORD = {
    "id": "b",
    "image": ["red.png", "red.png"],
    "group": "one",
    "conversations": [
        {"from": "system", "value": "be short"},
        {"from": "human", "value": "<image>\nwhat <image>"},
        {"from": "gpt", "value": "red"},
    ],
}
KEYS = st.sampled_from(["id", "image", "images", "messages", "conversations", "from", "x"])


def write_good(name: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nis it"}, {"from": "gpt", "value": "yes"}]
    return {"id": name, "image": "red.png", "conversations": turns}


def encode(values) -> bytes:
    return json.dumps(values).encode("utf-8")


def make_tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def make_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(file, "PNG")
    return file.getvalue()


def test_changed_records(fuzz, tmp_path):
    """One record of three is changed: the first and the last are always read."""
    (tmp_path / "red.png").write_bytes(make_png())
    first, last = write_good("a"), write_good("c")

    def check(example):
        changed, suffix = example
        path = tmp_path / f"records{suffix}"
        records = [first, changed, last]
        separator = b"\n" if suffix == ".jsonl" else b", "
        content = separator.join(encode(record) for record in records)
        path.write_bytes(content if suffix == ".jsonl" else b"[" + content + b"]")
        problems = []
        examples = read_examples(path, problems=problems)
        ids = [example.id for example in examples]
        assert (ids[0], ids[-1]) == ("a", "c")
        assert len(examples) + len(problems) == 3
        for example in examples:
            try:
                images = example.load_images()
            except UserError:
                continue
            assert len(images) == str(example.messages).count("<image>")
        for problem in problems:
            assert path.name in str(problem)

    fuzz(check, st.tuples(draw_changed(RECORD, words=KEYS), st.sampled_from([".json", ".jsonl"])))


def test_damaged_files(fuzz, tmp_path):
    (tmp_path / "red.png").write_bytes(make_png())
    records = [write_good("a"), RECORD, write_good("c")]
    contents = {
        ".json": encode(records),
        ".jsonl": b"\n".join(map(encode, records)),
        ".tar": make_tar(
            {
                "a.json": encode(write_good("a")),
                "a.png": make_png(),
                "b.json": encode(RECORD["conversations"]),
                "b.0.png": make_png(),
                "b.1.png": make_png(),
            }
        ),
        ".parquet": make_table(records, tmp_path / "whole.parquet"),
    }

    def check(example):
        suffix, content = example
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(content)
        problems = []
        try:
            examples = read_examples(path, problems=problems)
        except UserError:
            return
        for example in examples:
            try:
                example.load_images()
            except UserError:
                continue

    kinds = st.sampled_from(list(contents))
    fuzz(check, kinds.flatmap(lambda kind: st.tuples(st.just(kind), draw_damaged(contents[kind]))))


def make_table(records: list[dict], path) -> bytes:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records[:1] + records[2:]), path)
    return path.read_bytes()
