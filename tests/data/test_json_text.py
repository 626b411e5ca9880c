"""Lists of records, read element by element: one broken element is one bad record."""

import json
import random

import pytest
from helpers.records import make_record

from sparsecut.config.recipe import Source
from sparsecut.data import json_text
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples, read_source
from sparsecut.data.json_text import iterate_elements
from sparsecut.data.streaming import read_stream
from sparsecut.schema import UserError

HALF = "\\ud83d"  # of a surrogate pair, as JSON writes it
TURNS = '"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "x"}]'
ASKS = (
    '{"id": "b", "conversations": [{"from": "human", "value": "%s"},'
    ' {"from": "gpt", "value": "x"}]}'
)

BAD_TEXTS = {
    "no hash": '{"id": "b", "conversations": [{"from": ["human"], "value": "What?"}]}',
    "nested": '{"id": "b", "conversations": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "nested less": '{"id": "b", "conversations": [{"from": ' + "[" * 700 + "]" * 700 + "}]}",
    "nested id": '{"id": ' + "[" * 700 + "]" * 700 + f", {TURNS}}}",
    "name of 300": f'{{"id": "b", "image": "{"n" * 300}.png", {TURNS}}}'.replace("W", "<image> W"),
    "name of 30000": f'{{"id": "b", "image": "{"n" * 30_000}", {TURNS}}}',
    "NUL in a name": f'{{"id": "b", "image": "a\\u0000.png", {TURNS}}}'.replace("W", "<image> W"),
    "NUL in a text": ASKS % "What\\u0000?",
    "half a pair": ASKS % HALF,
    "half a pair in an id": f'{{"id": "{HALF}", {TURNS}}}',
    "half a pair in a group": f'{{"group": "{HALF}", {TURNS}}}',
    "half a pair in a name": f'{{"image": "{HALF}", {TURNS}}}'.replace("W", "<image> W"),
    "no UTF-8": (ASKS % "caf#").encode().replace(b"#", b"\xe9"),
    "digits": f'{{"id": {"9" * 5000}, {TURNS}}}',
    "NaN": f'{{"id": NaN, {TURNS}}}',
    "Infinity": f'{{"id": "b", "score": -Infinity, {TURNS}}}',
    "a key twice": f'{{"id": "b", "id": "c", {TURNS}}}',
    "a key twice inside": ASKS.replace('"from": "gpt"', '"from": "gpt", "from": "human"') % "What?",
    "a list as id": f'{{"id": ["b"], {TURNS}}}',
    "raw NUL": "\0\0\0\0",
    "a raw control character": ASKS % "\1",
    "an open string": '{"id": "b, "conversations": []}',
    "open brackets": '{"id": "b", "conversations": [{"from": ',
    "no colon": '{"id" "b"}',
    "a word": "record",
    "a number": "5",
    "nothing": "null",
}


def to_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize("layout", ["lines", "list", "list of lines", "pretty list"])
@pytest.mark.parametrize("name", BAD_TEXTS)
def test_one_bad_record_is_named_and_the_others_survive(image_folder, name, layout):
    first, last = make_record(id="first"), make_record(id="last")
    indent = 2 if layout == "pretty list" else None
    parts = [json.dumps(first, indent=indent).encode(), to_bytes(BAD_TEXTS[name])]
    parts.append(json.dumps(last, indent=indent).encode())
    path = image_folder / ("x.jsonl" if layout == "lines" else "x.json")
    if layout == "lines":
        path.write_bytes(b"\n".join(parts))
    else:
        between = b", " if layout == "list" else b",\n"
        path.write_bytes(b"[\n" + between.join(parts) + b"\n]")
    problems = []
    examples = read_source(Source(str(path), on_error="skip"), problems)
    assert [example.id for example in examples] == ["first", "last"]
    place = f"{path} line 2" if layout == "lines" else f"{path} record 1"
    assert problems[0].where == place
    str(problems[0]).encode()  # it can be written
    assert len(str(problems[0])) < 600
    with pytest.raises(RecordError) as caught:
        read_examples(path)
    assert caught.value.where == place
    streamed = list(read_stream(Source(str(path), on_error="skip")))
    ids = [example.id for example in streamed if not isinstance(example, RecordError)]
    assert (ids[0], ids[-1]) == ("first", "last")


def test_errors_name_the_line_and_column_of_the_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('[{"a": 1},\n  {"a": 2,\n   "b" 3},  {"c" 4}]')
    errors = [str(value) for _, value in iterate_elements(path, 1000)][1:]
    assert "line 3 column 8" in errors[0] and "line 3 column 18" in errors[1]


@pytest.mark.parametrize(
    "text, facts",
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"[", "line 1.* no end"),
        (b'[{"a": 1},\n', "line 2.* no end"),
        (b'[{"a": 1}\n,{"a": "', "line 2.* no end"),
        (b"[1]\n[2]", "line 2.*more text"),
        (b'{"a": 1}\n', "line 1.*object.*a line"),
        (b'{"a":\n1}\n{"a": 2}', "line 1.*object.*a line"),
        (b"\xff\xfe[\0", "UTF-8"),
    ],
)
def test_a_file_without_a_whole_list_is_refused_with_its_line(tmp_path, text, facts):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(UserError, match=rf"x\.json.*{facts}"):
        list(iterate_elements(path, 1000))


@pytest.mark.parametrize("chunk", [3, 100, 2**20])
@pytest.mark.parametrize("indent", [None, 0, 2])
def test_a_list_is_read_as_json_reads_it(tmp_path, monkeypatch, chunk, indent):
    monkeypatch.setattr(json_text, "CHUNK", chunk)
    generator = random.Random(0)
    values = [1, -2.5e3, 'a,]}"\\', [], {}, None, True]
    for _ in range(100):
        text = "".join(generator.choice('ab"\\{}[],:\n é😀') for _ in range(40))
        values.append({text: [text, {"b": text}], "n": generator.random()})
    path = tmp_path / "x.json"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding=encoding)
        assert [value for _, value in iterate_elements(path, 10_000)] == values


def test_an_element_that_is_too_long_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(json_text, "CHUNK", 64)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([1, {"a": "\\]" * 5000, "b": [2]}, {"c": 3}]))
    first, error, last = [value for _, value in iterate_elements(path, 1000)]
    assert (first, last) == (1, {"c": 3})
    assert isinstance(error, UserError) and "max_mib" in str(error)


def test_a_mark_before_a_list_is_no_part_of_it(image_folder):
    path = image_folder / "x.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([make_record()]).encode())
    assert [example.id for example in read_examples(path)] == ["r"]


def test_a_record_without_an_id_is_named_by_its_place(image_folder):
    path = image_folder / "x.json"
    path.write_text(json.dumps([make_record(id=None), make_record(id=7)]))
    assert [example.id for example in read_examples(path)] == [f"{path} record 0", "7"]
