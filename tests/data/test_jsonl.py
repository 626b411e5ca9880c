"""JSON Lines files: what is written is read, and broken lines are named."""

import pytest

from sparsecut.data.errors import RecordError
from sparsecut.data.jsonl import append_json_lines, read_json_lines, write_json_lines

VALUES = [{"text": "a\u2028b ä"}, {"number": 0.1}, [1, None]]


def test_what_is_written_is_read(tmp_path):
    path = write_json_lines(tmp_path / "x.jsonl", VALUES[:1])
    append_json_lines(path, VALUES[1:])
    assert read_json_lines(path) == VALUES
    write_json_lines(path, VALUES[1:])
    assert read_json_lines(path) == VALUES[1:]
    assert list(tmp_path.iterdir()) == [path]


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf1\n\n{"a" 2}\n')
    with pytest.raises(RecordError) as caught:
        read_json_lines(path)
    assert caught.value.where == f"{path} line 3"
    path.write_bytes(b"1\n\xff\n")
    with pytest.raises(RecordError, match=r"line 2: .*UTF-8"):
        read_json_lines(path)


def test_a_line_that_was_cut_off_may_be_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('1\n{"text": "ä'.encode()[:-1])
    assert read_json_lines(path, skip_partial=True) == [1]
    with pytest.raises(RecordError, match="line 2"):
        read_json_lines(path)
