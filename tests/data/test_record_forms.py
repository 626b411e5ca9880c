"""Forms of records: each is the example, the tokens, the labels and the pixels of LLaVA's."""

import io
import json

import numpy as np
import pytest
from helpers.forms import FORMS, NAMES, assert_same, make_data_url, make_pair, read_expected
from helpers.records import write_data
from helpers.tiny import tiny_model
from PIL import Image

from sparsecut.config.source import RECORD_KEYS, Source
from sparsecut.data import record_forms
from sparsecut.data.choices import INSTRUCTION
from sparsecut.data.encoding import example_encoder
from sparsecut.data.errors import RecordError
from sparsecut.data.examples import parse_record, read_examples, read_source
from sparsecut.data.images import ImageStore
from sparsecut.data.streaming import read_first_examples
from sparsecut.schema import UserError


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_record(image_folder, processor, name):
    record, _ = make_pair(name, *NAMES)
    path = write_data(image_folder, record, name="data.jsonl")
    (example,) = read_examples(path)
    assert_same(processor, example, read_expected(image_folder, name))
    assert example.id == "r" and example.place == f"{path} line 1"


INLINE = {
    "data URL": make_data_url,
    "base64": lambda data: make_data_url(data).partition(",")[2],
    "bytes": lambda data: data,
    "object": lambda data: {"bytes": data, "path": None},
    "PIL": lambda data: read_pil(data),
    "array": lambda data: np.asarray(read_pil(data)),
}


def read_pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", INLINE)
@pytest.mark.parametrize("name", ["LLaMA-Factory", "TRL", "Qwen", "OpenAI", "question and answer"])
def test_images_may_stand_in_the_record(image_folder, processor, name, kind):
    images = [INLINE[kind]((image_folder / one).read_bytes()) for one in NAMES]
    record, _ = make_pair(name, *images)
    example = parse_record(record, "here", ImageStore(image_folder))
    assert all(isinstance(image, bytes) for image in example.images)
    assert_same(processor, example, read_expected(image_folder, name))


# ---- what is refused


def write_messages(content, answer="a cat", **more) -> dict:
    turns = [{"role": "user", "content": content, **more}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


ANSWER = {"role": "assistant", "content": "a cat"}
SLOT = {"type": "image"}
TEXT = {"type": "text", "text": "what"}
NAMED = {"type": "image", "image": "a.png"}
QA = {"question": "what", "answer": "a cat"}
# A bad record, and what the error names.
BAD = {
    "fewer images than parts": (write_messages([SLOT, TEXT]), ["1 parts", "0"]),
    "more images than parts": (
        {**write_messages([SLOT, TEXT]), "images": ["a.png", "a.png"]},
        ["1 parts", "2"],
    ),
    "images twice": ({**write_messages([NAMED, TEXT]), "image": "a.png"}, ["1 images", "remove"]),
    "indexes": (
        {**write_messages([{**SLOT, "index": 1}, TEXT]), "image": "a.png"},
        ["index", "1"],
    ),
    "placeholder beside a part": (
        write_messages([NAMED, {"type": "text", "text": "<image> what"}]),
        ["turn 0", "<image>", "part"],
    ),
    "placeholder and parts in other turns": (
        {
            "messages": [
                *write_messages([NAMED, TEXT])["messages"],
                *write_messages("<image> and")["messages"],
            ]
        },
        ["<image>", "parts"],
    ),
    "too few placeholders": (
        {**write_messages("<image> what"), "images": ["a.png", "a.png"]},
        ["1 <image>", "2 images"],
    ),
    "LLaVA without placeholder": (
        {"image": "a.png", "conversations": write_messages("what")["messages"]},
        ["0 <image>", "1 images"],
    ),
    "an unknown part": (
        write_messages([{"type": "imgae", "image": "a.png"}]),
        ["turn 0", "part 0", "imgae", "'image'"],
    ),
    "a video": (write_messages([{"type": "video", "video": "a.mp4"}, TEXT]), ["part 0", "video"]),
    "a part of a number": (write_messages([3]), ["part 0", "3"]),
    "a part without text": (write_messages([{"type": "text", "text": None}]), ["part 0", "None"]),
    "an image of the assistant": (
        write_messages("what", answer=[NAMED]),
        ["turn 1", "assistant", "<image>"],
    ),
    "no parts": (write_messages([]), ["turn 0", "[]"]),
    "a tool": ({"messages": [{"role": "tool", "content": "x"}]}, ["turn 0", "tool"]),
    "a call": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}], "content": None}]},
        ["turn 0", "tool_calls"],
    ),
    "tools": ({**write_messages("what"), "tools": [{"name": "x"}]}, ["`tools`"]),
    "a thought": (
        {
            "messages": [
                {"role": "user", "content": "what"},
                {"role": "assistant", "content": "a", "reasoning_content": "b"},
            ]
        },
        ["turn 1", "reasoning_content"],
    ),
    "an answer that is not learned": (
        {"messages": [*write_messages("what")["messages"][:1], {**ANSWER, "weight": 0}]},
        ["turn 1", "weight"],
    ),
    "an answer that is not learned, in LLaVA's names": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "train": False},
            ]
        },
        ["turn 1", "train"],
    ),
    "two systems": (
        {
            "system": "one",
            "messages": [{"role": "system", "content": "x"}, *write_messages("what")["messages"]],
        },
        ["`system`", "system turn"],
    ),
    "a remote image": ({**QA, "image": "https://x.org/a.png"}, ["https", "download"]),
    "a remote part": (
        write_messages([{"type": "image_url", "image_url": {"url": "http://x.org/a.png"}}]),
        ["turn 0", "http", "download"],
    ),
    "a bucket": ({**QA, "image": "s3://x/a.png"}, ["s3", "download"]),
    "a data URL without base64": ({**QA, "image": "data:image/png,abc"}, ["base64"]),
    "broken base64": ({**QA, "image": "data:image/png;base64,abc"}, ["base64"]),
    "an object without an image": ({**QA, "image": {"width": 3}}, ["width", "bytes"]),
    "an image outside": ({**QA, "image": "file:///etc/passwd"}, ["/etc/passwd", "outside"]),
    "two images": ({**QA, "image": "a.png", "images": ["sub/b.png"]}, ["`image`", "`images`"]),
    "an image under another key": ({**QA, "picture": "a.png"}, ["picture", "image: picture"]),
    "bytes under another key": (
        {**QA, "picture": {"bytes": "data:image/png;base64,AAAA"}},
        ["picture", "image: picture"],
    ),
    "a URL that is empty": (
        write_messages([{"type": "image_url", "image_url": {"url": None}}, TEXT]),
        ["1 parts", "0"],
    ),
    "a number beyond the choices": (
        {**QA, "choices": ["a cat", "a dog"], "answer": 2},
        ["`answer`", "2", "`choices`"],
    ),
    "a letter beyond the choices": (
        {**QA, "options": "['a cat', 'a dog']", "answer": "C"},
        ["`answer`", "'C'", "`options`"],
    ),
    "a split without answers": ({**QA, "choices": ["a", "b"], "answer": -1}, ["-1", "test"]),
    "a choice or its number": (
        {**QA, "choices": ["1", "2"], "answer": "1"},
        ["`answer`", "'1'", "`choices`", "letter"],
    ),
    "choices that are no list": (
        {**QA, "choices": "a cat, a dog", "answer": "A"},
        ["`choices`", "a cat, a dog", "'A'"],
    ),
    "a choice that is an object": ({**QA, "choices": [{"x": 1}, "b"], "answer": 1}, ["`choices`"]),
    "as many questions as answers": (
        {"questions": ["a", "b"], "answers": ["c"]},
        ["`questions`", "`answers`", "each"],
    ),
    "turns that a preference goes on": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"value": "b"},
            "rejected": {},
        },
        ["DPOTrainer"],
    ),
    "a preference about a question": (
        {"question": "what", "chosen": "a", "rejected": "b"},
        ["answer: chosen"],
    ),
    "turns with a verdict": (
        {**write_messages("what"), "kto_tag": False},
        ["KTOTrainer", "kto_tag"],
    ),
    "boxes": (
        {
            **write_messages("<image> find <ref-object>"),
            "images": ["a.png"],
            "objects": {"ref": ["x"]},
        },
        ["<ref-object>", "`objects`"],
    ),
    "another tool's mark of an image": (
        {"image": "a.png", "question": "<image 1> what", "answer": "a"},
        ["<image 1>", "<image>"],
    ),
    "a file named in a text": (
        {"query": "<img>a.png</img> what", "response": "a"},
        ["<img>a.png</img>", "<image>"],
    ),
    "the number of an image": ({**QA, "image_id": 7}, ["image_id", "7"]),
    "an object as an answer": ({**QA, "answer": {"x": 1}}, ["`answer`", "x"]),
    "functions": ({**write_messages("what"), "functions": [{"name": "x"}]}, ["`functions`"]),
    "video": ({**QA, "videos": ["a.mp4"]}, ["`videos`"]),
    "an answer of yes": ({**QA, "answer": True}, ["`answer`", "True"]),
    "no answer": ({"question": "what", "answers": [None, ""]}, ["`answers`"]),
    "an answer with an image": ({**QA, "answer": "<image>"}, ["`answer`", "<image>"]),
    "an empty question": ({**QA, "question": " "}, ["`question`", "empty"]),
    "texts of texts": ({"texts": ["what"]}, ["`texts`", "user"]),
    "texts without an answer": ({"texts": [{"user": "what"}]}, ["assistant", "0", "None"]),
    "history": (
        {"query": "what", "response": "a", "history": [["b"]]},
        ["history", "question, answer"],
    ),
    "preferences": (
        {"prompt": "what", "chosen": "a", "rejected": "b"},
        ["DPOTrainer", "completion: chosen"],
    ),
    "preferences without a prompt": (
        {"chosen": write_messages("a")["messages"], "rejected": write_messages("a")["messages"]},
        ["DPOTrainer", "messages: chosen"],
    ),
    "unpaired preferences": (
        {"prompt": "what", "completion": "a", "label": False},
        ["KTOTrainer", "label"],
    ),
    # of no known form: the keys, the nearest form, what is missing, an example
    "a question alone": (
        {"question": "what", "id": 3},
        ["question (a text)", "id (a number)", "lacks", '"answer": '],
    ),
    "a misspelt answer": ({"question": "what", "anwser": "a"}, ["answer: anwser"]),
    "other names": ({"frage": "was", "antwort": "a"}, ["frage", "antwort", "question: ..."]),
    "an answer": ({"image": "a.png", "label": 3}, ["image (a text)", "label (a number)", "lacks"]),
    "turns under another key": (
        {"message": write_messages("what")["messages"]},
        ["message (a list of objects", "messages: message", '"role": "user"'],
    ),
    "nothing": ({}, ["none", "question"]),
    "a list": ([], ["a list", "conversations"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_are_named_with_what_to_do(image_folder, name):
    record, facts = BAD[name]
    path = write_data(image_folder, record, name="data.jsonl")
    with pytest.raises(RecordError) as caught:
        read_examples(path)
    assert caught.value.where == f"{path} line 1"
    for fact in facts:
        assert fact in caught.value.problem


GOOD = {
    "empty columns beside": (
        {**QA, "system": "", "history": [], "tools": None, "images": [], "audio": None},
        "what",
        "a cat",
    ),
    "a choice by its text": (
        {"question": "how many", "choices": ["2", "3"], "answer": "3"},
        "how many",
        "3",
    ),
    "parts that a table has filled": (
        write_messages([{"type": "text", "text": "what", "image_url": {"url": None}}]),
        "what",
        "a cat",
    ),
    "an answer like a list": ({"question": "where", "answer": "[0.1, 0.4]"}, "where", "[0.1, 0.4]"),
    "a prompt like a list": ({"prompt": "[1, 2]", "completion": "['a']"}, "[1, 2]", "['a']"),
    "a user's turn that is not learned": (write_messages("what", train=False), "what", "a cat"),
    "a text with other marks": ({"question": "<|image_pad|>", "answer": "a"}, "<|image_pad|>", "a"),
    "a number of choices": (
        {**QA, "choices": ["a cat", "a dog"], "answer": 1, "hint": "look"},
        f"look\nwhat\nA. a cat\nB. a dog\n{INSTRUCTION}",
        "B",
    ),
    "a letter of choices that Python printed": (
        {**QA, "options": "['a cat', \"a dog's\"]", "answer": "A"},
        f"what\nA. a cat\nB. a dog's\n{INSTRUCTION}",
        "A",
    ),
    "choices with labels": (
        {**QA, "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": "B"},
        f"what\nA. a\nB. b\n{INSTRUCTION}",
        "B",
    ),
    "choices in columns": (
        {**QA, "A": "a cat", "B": "a dog", "answer": "B"},
        f"what\nA. a cat\nB. a dog\n{INSTRUCTION}",
        "B",
    ),
    "an answer of its own": ({**QA, "choices": ["a dog"]}, "what", "a cat"),
    "a number": ({"question": "how many", "answer": 3}, "how many", "3"),
    "answers as an object": (
        {"question": "what", "answers": {"text": ["b", "a", "a"], "answer_start": [1, 2, 2]}},
        "what",
        "a",
    ),
    "as common": ({"question": "what", "answers": ["b", "a"]}, "what", "b"),
    "the first form": (
        {**write_messages("one"), "text": "two", **QA, "chosen": "x", "rejected": "y"},
        "one",
        "a cat",
    ),
    "a key without value": ({"conversations": None, "messages": None, **QA}, "what", "a cat"),
    "an object of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["what", "a"]}},
        "what",
        "a",
    ),
    "a text of JSON": (
        {"messages": json.dumps(write_messages("what")["messages"]), "images": "[]"},
        "what",
        "a cat",
    ),
    "weights of 1": (write_messages("what", weight=1), "what", "a cat"),
    "a developer": ({**write_messages("what"), "system": None}, "what", "a cat"),
}


@pytest.mark.parametrize("name", GOOD)
def test_records_that_need_no_change(image_folder, name):
    record, asked, answered = GOOD[name]
    (example,) = read_examples(write_data(image_folder, record))
    assert [message["content"] for message in example.messages] == [asked, answered]
    assert example.images == []


def test_the_most_common_answer_and_facts_of_a_record(image_folder):
    record = {**QA, "id": 7, "group": "g", "level": 2, "image": f"file://{image_folder / 'a.png'}"}
    (example,) = read_examples(write_data(image_folder, record))
    assert (example.id, example.group, example.level) == ("7", "g", "2")
    assert np.array_equal(example.load_images()[0], ImageStore(image_folder).load("a.png"))


def test_an_image_in_a_record_has_the_limit_of_its_source(image_folder):
    url = make_data_url(bytes(2**20 + 1))
    path = write_data(image_folder, {**QA, "image": url})
    assert len(read_source(Source(str(path), max_mib=2), [])) == 1
    with pytest.raises(RecordError, match="1 MiB"):
        read_source(Source(str(path), max_mib=1), [])


# ---- other names

GERMAN = {"frage": "what", "antwort": "a cat", "bild": "a.png", "art": "g"}
COLUMNS = {"question": "frage", "answer": "antwort", "image": "bild", "group": "art"}


def test_columns_name_the_keys_of_records(image_folder, processor):
    path = write_data(image_folder, GERMAN, {"frage": "is it", "antwort": "no", "art": None})
    one, two = read_source(Source(str(path), columns=COLUMNS), [])
    plain = write_data(image_folder, {"image": "a.png", **QA}, name="plain.json")
    assert_same(processor, one, read_examples(plain)[0])
    assert one.group == "g" and two.images == [] and two.group is None


@pytest.mark.parametrize(
    "columns, facts",
    [
        ({**COLUMNS, "image": "bidl"}, ["'bild'", "image: bild"]),
        ({**COLUMNS, "level": "stufe"}, ["`level`", "'stufe'", "frage, antwort, bild, art"]),
        ({**COLUMNS, "answer": "antwrot"}, ["`answer`", "'antwrot'", "'antwort'"]),
        ({"questoin": "frage"}, ["'questoin'", "'question'"]),
        ({"question": "frage", "answer": "frage"}, ["'frage'", "several"]),
        ({"question": 3}, ["columns.question", "3"]),
    ],
)
def test_wrong_columns_are_refused(image_folder, columns, facts):
    path = str(write_data(image_folder, GERMAN))
    with pytest.raises(UserError) as caught:
        read_source(Source(path, columns=columns), [])
    for fact in facts:
        assert fact in str(caught.value)


def test_every_key_of_a_form_may_have_another_name():
    keys = {"id", "image", "images", "audio", "audios", "group", "level", "system", "history"}
    keys |= {"label", "choices", "options", "hint"}
    for form in record_forms.FORMS:
        keys.update(form.keys)
    assert (keys | {"input"}) - {"chosen", "rejected"} == set(RECORD_KEYS)


@pytest.mark.parametrize("form", [form for form in record_forms.FORMS if form.example])
def test_the_example_in_an_error_is_a_record_of_its_form(image_folder, form):
    (image_folder / "0.png").write_bytes((image_folder / "a.png").read_bytes())
    (example,) = read_examples(write_data(image_folder, form.example))
    assert form.fits(form.example) and len(example.load_images()) == 1


def test_a_stream_with_a_misspelt_column_is_refused_before_it_begins(image_folder, processor):
    path = write_data(image_folder, *[GERMAN] * 3, name="data.jsonl")
    encoder = example_encoder(processor)
    source = Source(str(path), columns=COLUMNS, streaming=True)
    assert len(read_first_examples(source, encoder)) == 3
    source = Source(str(path), columns={**COLUMNS, "level": "stufe"}, streaming=True)
    with pytest.raises(UserError, match=r"'stufe'.*bild"):
        read_first_examples(source, encoder)


def test_questions_and_as_many_answers_are_turns(image_folder):
    record = {"image": "a.png", "questions": ["what", "is it"], "answers": '["a cat", "no"]'}
    (example,) = read_examples(write_data(image_folder, record))
    contents = [message["content"] for message in example.messages]
    assert contents == ["<image>\nwhat", "a cat", "is it", "no"] and example.images == ["a.png"]
