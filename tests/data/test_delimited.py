"""CSV and TSV files of records."""

import csv
import json

import pytest

from sparsecut.data.access import DEFAULT_ACCESS, Access
from sparsecut.data.delimited import read_delimited
from sparsecut.schema import UserError

HEADER = "id,image,question,answer\n"


def read(path, text, *, access=DEFAULT_ACCESS):
    """Line numbers and records of a file; errors stand for rows that cannot be read."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = []
    for place, record in read_delimited(path, access):
        try:
            rows.append((int(place.rpartition(" ")[2]), record()))
        except UserError as error:
            rows.append((int(place.rpartition(" ")[2]), error))
    return rows


def test_quotes_breaks_marks_and_empty_cells(tmp_path):
    text = "\ufeff" + HEADER + '1,a.png,"one, ""two""\nthree",yes\r\n\n2,,what,no\n'
    assert read(tmp_path / "a.csv", text) == [
        (2, {"id": "1", "image": "a.png", "question": 'one, "two"\nthree', "answer": "yes"}),
        (5, {"id": "2", "question": "what", "answer": "no"}),
    ]


def test_lists_of_images_and_turns_are_json_but_texts_are_not(tmp_path):
    turns = [{"from": "human", "value": "<image><image> x"}, {"from": "gpt", "value": "[y]"}]
    with (tmp_path / "a.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerows([["images", "conversations", "note"]])
        writer.writerow([json.dumps(["a.png", "b.png"]), json.dumps(turns), '["x"]'])
        writer.writerow(["[broken", json.dumps(turns), ""])
    (_, good), (_, bad) = read(tmp_path / "a.tsv", (tmp_path / "a.tsv").read_bytes())
    assert good == {"images": ["a.png", "b.png"], "conversations": turns, "note": '["x"]'}
    assert isinstance(bad, UserError) and "images" in str(bad)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ("1,a.png,q\n2,b.png,q,a\n", "3 cells"),
        ("1,a.png,q,a,b\n2,b.png,q,a\n", "5 cells"),
        ('1,a.png,"q"x,a\n2,b.png,q,a\n', "line 2"),
        (b"1,a.png,\xff,a\n2,b.png,q,a\n", "question"),
    ],
)
def test_a_bad_row_is_one_bad_record(tmp_path, rows, wanted):
    rows = rows if isinstance(rows, bytes) else rows.encode()
    (line, bad), (_, good) = read(tmp_path / "a.csv", HEADER.encode() + rows)
    assert line == 2 and wanted in str(bad) and good["id"] == "2"


def test_a_quote_that_never_ends_and_a_row_that_is_too_long(tmp_path):
    ((line, bad),) = read(tmp_path / "a.csv", HEADER + '1,a.png,"q,a\n2,b.png,q,a\n')
    assert line == 2 and "never ends" in str(bad)
    limit = csv.field_size_limit()
    long = "x" * 300_000
    ((_, record),) = read(tmp_path / "b.csv", f"{HEADER}1,a.png,{long},a\n")
    assert record["question"] == long and csv.field_size_limit() == limit
    text = f"{HEADER}1,a.png,{long * 4},a\n2,b.png,q,a\n"
    (_, bad), (line, good) = read(tmp_path / "c.csv", text, access=Access(max_mib=1))
    assert "MiB" in str(bad) and line == 3 and good["id"] == "2"


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_of_spreadsheets(tmp_path, delimiter):
    text = f"{HEADER}1,a.png,q,a\n".replace(",", delimiter)
    assert read(tmp_path / "a.csv", text)[0][1]["answer"] == "a"


@pytest.mark.parametrize("header", [",\n", "id,id\n", "\n", '"id\n'])
def test_a_header_that_names_no_columns_is_refused(tmp_path, header):
    with pytest.raises(UserError, match=r"a\.csv.*columns"):
        read(tmp_path / "a.csv", header + "1,2,3\n")
    with pytest.raises(UserError, match="columns"):
        read(tmp_path / "empty.csv", "")
    with pytest.raises(UserError, match="UTF-16"):
        read(tmp_path / "b.csv", (HEADER + "1,a,b,c\n").encode("utf-16"))
