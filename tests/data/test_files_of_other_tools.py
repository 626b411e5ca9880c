"""Files as other tools write them: classes, bytes, gzip, lines, and the tables of spreadsheets."""

import gzip
import json

import datasets
import pandas
import pytest
from datasets import ClassLabel, Features, Image, List
from helpers.forms import NAMES
from helpers.records import write_data

from sparsecut.config.source import Source
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import read_examples, read_source
from sparsecut.data.images import ImageStore
from sparsecut.data.streaming import read_stream
from sparsecut.schema import UserError

CLASSES = ["a cat", "a dog"]
QUESTION = "what is it"


def get_texts(examples) -> list[list[str]]:
    return [[message["content"] for message in example.messages] for example in examples]


# ---- classes


@pytest.fixture
def pets(image_folder):
    """A table with two columns of classes, a list of classes, and images; one class is missing."""
    image = {"bytes": (image_folder / "a.png").read_bytes(), "path": None}
    names = {"kind": ClassLabel(names=CLASSES), "group": ClassLabel(names=["g", "h"])}
    features = Features({"img": Image(), **names, "answers": List(ClassLabel(names=CLASSES))})
    columns = {
        "img": [image] * 3,
        "kind": [1, 0, -1],
        "group": [0, 1, 1],
        "answers": [[0], [1], [1]],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def test_classes_have_names_in_every_kind_of_table(image_folder, pets):
    pets.to_parquet(image_folder / "pets.parquet")
    pets.save_to_disk(image_folder / "saved")
    (image_folder / "clone").mkdir()
    pets.to_parquet(image_folder / "clone" / "train-00000-of-00001.parquet")
    for name in ("pets.parquet", "saved", "clone"):
        keys = {"question": QUESTION, "columns": {"image": "img", "label": "kind"}}
        source = Source(str(image_folder / name), on_error="skip", **keys)
        problems = []
        examples = read_source(source, problems)
        assert get_texts(examples) == [
            [f"<image>\n{QUESTION}", CLASSES[1]],
            [f"<image>\n{QUESTION}", CLASSES[0]],
        ]
        assert [example.group for example in examples] == ["g", "h"]
        assert examples[0].load_images()[0].size == (10, 12) and len(problems) == 1
        streamed = [one for one in read_stream(source) if not isinstance(one, RecordError)]
        assert get_texts(streamed) == get_texts(examples)


def test_classes_are_answers_too(image_folder, pets):
    asked = pets.add_column("question", [QUESTION] * 3).remove_columns("kind")
    asked.to_parquet(image_folder / "asked.parquet")
    source = Source(str(image_folder / "asked.parquet"), columns={"image": "img"})
    assert [texts[1] for texts in get_texts(read_source(source, []))] == [
        CLASSES[i] for i in (0, 1, 1)
    ]


def test_a_readme_names_the_classes_of_a_table_of_text(tmp_path):
    (tmp_path / "train.csv").write_text("question,kind\nwhat,1\nwhich,a cat\n")
    names = "".join(f"          '{number}': {name}\n" for number, name in enumerate(CLASSES))
    head = "dataset_info:\n  features:\n  - name: question\n    dtype: string\n  - name: kind\n"
    kind = f"    dtype:\n      class_label:\n        names:\n{names}"
    (tmp_path / "README.md").write_text(f"---\n{head}{kind}---\n")
    examples = read_source(Source(str(tmp_path), columns={"answer": "kind"}), [])
    assert get_texts(examples) == [["what", CLASSES[1]], ["which", CLASSES[0]]]
    (tmp_path / "train.csv").write_text("question,kind\nwhat,2\n")
    with pytest.raises(RecordError, match=r"line 2: `kind` is 2.*a cat, a dog"):
        read_source(Source(str(tmp_path), columns={"answer": "kind"}), [])


@pytest.mark.parametrize(
    "record", [{"label": "a"}, {"caption": "a"}, {"captions": ["a", "b"]}, {"text": "a"}]
)
def test_a_source_asks_about_labels_and_captions(image_folder, record):
    path = write_data(image_folder, {**record, "image": "a.png"})
    (texts,) = get_texts(read_source(Source(str(path), question=QUESTION), []))
    assert texts == [f"<image>\n{QUESTION}", "a"]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"image": "a.png", "kind": "a"}, ["kind", "columns: {label"]),
        ({"image": "a.png", "question": "a", "answer": "b"}, ["`question`", "remove"]),
        ({"image": "a.png", "label": 3}, ["label=3"]),
    ],
)
def test_a_source_that_asks_without_need_is_refused(image_folder, record, wanted):
    path = write_data(image_folder, record)
    with pytest.raises(RecordError) as caught:
        read_source(Source(str(path), question=QUESTION), [])
    assert all(part in caught.value.problem for part in wanted)


def test_a_label_without_a_question_says_what_to_set(image_folder):
    path = write_data(image_folder, {"image": "a.png", "label": "a cat"})
    with pytest.raises(RecordError, match=r"record 0: .*a cat.*`question`"):
        read_examples(path)


# ---- bytes


def test_bytes_in_tables_stay_on_disk(image_folder):
    data = [(image_folder / name).read_bytes() for name in NAMES]
    rows = {"question": ["what"], "answer": ["a"]}
    pandas.DataFrame({**rows, "image": [data[0]]}).to_parquet(image_folder / "one.parquet")
    pandas.DataFrame({**rows, "images": [data]}).to_parquet(image_folder / "two.parquet")
    pandas.DataFrame({**rows, "jpg": [data[0]]}).to_parquet(image_folder / "other.parquet")
    (one,) = read_examples(image_folder / "one.parquet")
    (two,) = read_examples(image_folder / "two.parquet")
    other = Source(str(image_folder / "other.parquet"), columns={"image": "jpg"})
    (named,) = read_source(other, [])
    assert (one.images, two.images, named.images) == (
        ["0/0"],
        ["0/0/images", "0/1/images"],
        ["0/0/jpg"],
    )
    assert [two.store.read_bytes(name) for name in two.images] == data
    assert named.load_images()[0].size == one.load_images()[0].size == (10, 12)


@pytest.mark.parametrize("value", [b"\x89PNG", {"bytes": b"\x89PNG", "path": None}])
def test_an_image_in_another_column_of_a_table_is_not_left_out(image_folder, value):
    rows = [{"question": "what", "answer": "a", "picture": value}]
    datasets.Dataset.from_list(rows).to_parquet(image_folder / "data.parquet")
    with pytest.raises(RecordError, match=r"columns: \{image: picture\}"):
        read_examples(image_folder / "data.parquet")


# ---- texts

RECORDS = [{"question": "what", "answer": f"a {name}"} for name in ("cat", "dog")]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"
TABLE = "question,answer\nwhat,a cat\nwhat,a dog\n"
TEXTS = {
    "data.jsonl.gz": LINES,
    "data.json.gz": json.dumps(RECORDS),
    "data.CSV.GZ": TABLE,
    "data.tsv.gz": TABLE.replace(",", "\t"),
    "data.ndjson": LINES,
    "data.json": LINES,  # as `Dataset.to_json` and pandas name it
    "bom.json": "\ufeff" + LINES,
    "index.csv": ",question,answer\n0,what,a cat\n1,what,a dog\n",  # as pandas writes it
    "excel.csv": "sep=;\nquestion;answer;;\nwhat;a cat;;\nwhat;a dog;;\n;;;\n;;;\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_as_other_tools_write_them(tmp_path, name):
    is_packed = name.lower().endswith(".gz")
    data = TEXTS[name].encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if is_packed else data)
    examples = read_examples(tmp_path / name)
    assert get_texts(examples) == [["what", "a cat"], ["what", "a dog"]]
    assert examples[0].place.startswith(f"{tmp_path / name} ")


def test_damaged_and_unknown_archives_are_told(tmp_path):
    packed = gzip.compress(LINES.encode() * 100)
    for name, data in {
        "cut.jsonl.gz": packed[:-9],
        "no.jsonl.gz": b"{}",
        "bad.json.gz": packed[:12],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            read_examples(tmp_path / name)
    for name in ("data.zip", "data.jsonl.zst", "data.tar.gz", "data.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"{name}.*unpack it"):
            read_examples(tmp_path / name)
    with pytest.raises(UserError, match=r"data\.zip.*unpack it"):
        ImageStore(tmp_path / "data.zip")


def test_a_list_of_images_as_pandas_prints_it(image_folder):
    table = pandas.DataFrame({"images": [list(NAMES)], "question": ["what"], "answer": ["[1, 2]"]})
    table.to_csv(image_folder / "data.csv", index=False)
    (example,) = read_examples(image_folder / "data.csv")
    assert example.images == list(NAMES) and example.messages[1]["content"] == "[1, 2]"


def test_a_cell_without_a_column_is_one_bad_row(tmp_path):
    (tmp_path / "data.csv").write_text("question,answer,\nwhat,a,\nwhat,b,more\n")
    problems = []
    assert len(read_source(Source(str(tmp_path / "data.csv"), on_error="skip"), problems)) == 1
    assert "line 3: column 3 has no name" in str(problems[0])


def test_an_object_of_records_is_told_with_its_first_key(tmp_path):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"annotations": []}, indent=1))
    with pytest.raises(UserError, match='"annotations"'):
        read_examples(path)


def test_a_folder_of_another_tool_is_no_saved_data_set(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")  # LLaMA-Factory's list of files
    (tmp_path / "demo.json").write_text(json.dumps(RECORDS))
    assert len(read_source(Source(str(tmp_path)), [])) == 2
