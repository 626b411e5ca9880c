"""The same records in every form, beside the same in LLaVA's."""

import base64

import torch
from helpers.records import encode_batch, write_data

from sparsecut.data.examples import Example, read_examples

NAMES = ("a.png", "sub/b.png")  # of the fixture `image_folder`
ASKED, ANSWERED = "what is it", "a cat"
PAIR = (("human", f"<image>\n{ASKED}"), ("gpt", ANSWERED))
TWO_TURNS = (*PAIR, ("human", "are you sure"), ("gpt", "yes"))
TWO_IMAGES = (("human", f"<image>\n<image>\n{ASKED}"), ("gpt", ANSWERED))
WITH_SYSTEM = (("system", "one"), *PAIR)
NO_IMAGE = (("human", ASKED), ("gpt", ANSWERED))
CAPTION = (("human", "<image>"), ("gpt", ANSWERED))


def _messages(content, *, system=None, answer=ANSWERED) -> list[dict]:
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _text(text: str = ASKED) -> dict:
    return {"type": "text", "text": text}


# Name -> (what LLaVA's form has, the record of images a and b).
FORMS = {
    "LLaVA": (
        PAIR,
        lambda a, b: {"image": a, "conversations": _turns(PAIR)},
    ),
    "LLaMA-Factory": (
        (("system", "one"), *TWO_IMAGES),
        lambda a, b: {"images": [a, b], "system": "one", "conversations": _turns(TWO_IMAGES)},
    ),
    "conversations of roles": (
        TWO_TURNS,
        lambda a, b: {
            "images": [a],
            "conversations": [
                {"role": "user", "content": f"<image>\n{ASKED}"},
                {"role": "assistant", "content": ANSWERED},
                {"role": "user", "content": "are you sure"},
                {"role": "assistant", "content": "yes"},
            ],
        },
    ),
    "messages of texts": (
        PAIR,
        lambda a, b: {"images": [a], "messages": _messages(f"<image>\n{ASKED}")},
    ),
    "messages without placeholders": (
        TWO_IMAGES,
        lambda a, b: {"images": [a, b], "messages": _messages(ASKED)},
    ),
    "messages of from and value": (
        PAIR,
        lambda a, b: {"image": a, "messages": _turns(PAIR)},
    ),
    "OpenAI": (
        WITH_SYSTEM,
        lambda a, b: {
            "messages": _messages(
                [{"type": "image_url", "image_url": {"url": a, "detail": "auto"}}, _text()],
                system="one",
                answer=[_text("a "), _text("cat")],
            )
        },
    ),
    "OpenAI responses": (
        PAIR,
        lambda a, b: {
            "messages": _messages(
                [{"type": "input_image", "image_url": a}, {"type": "input_text", "text": ASKED}]
            )
        },
    ),
    "TRL": (
        TWO_IMAGES,
        lambda a, b: {
            "images": [a, b],
            "messages": _messages([{"type": "image"}, {"type": "image"}, _text()]),
        },
    ),
    "TRL in a table": (
        PAIR,
        lambda a, b: {
            "image": a,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "text": None, "index": 0},
                        {"type": "text", "text": ASKED, "index": None},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": ANSWERED, "index": None}],
                },
            ],
        },
    ),
    "Qwen": (
        PAIR,
        lambda a, b: {"messages": _messages([{"type": "image", "image": a}, _text()])},
    ),
    "Qwen without types": (
        PAIR,
        lambda a, b: {"messages": _messages([{"image": a}, {"text": ASKED}])},
    ),
    "prompt and completion": (
        PAIR,
        lambda a, b: {"image": a, "prompt": ASKED, "completion": ANSWERED},
    ),
    "prompt and completion of messages": (
        PAIR,
        lambda a, b: {
            "images": [a],
            "prompt": [{"role": "user", "content": [{"type": "image"}, _text()]}],
            "completion": [{"role": "assistant", "content": [_text(ANSWERED)]}],
        },
    ),
    "The Cauldron": (
        TWO_TURNS,
        lambda a, b: {
            "images": [a],
            "texts": [
                {"user": ASKED, "assistant": ANSWERED, "source": "here"},
                {"user": "are you sure", "assistant": "yes", "source": "here"},
            ],
        },
    ),
    "question and answer": (
        PAIR,
        lambda a, b: {"image": a, "question": ASKED, "answer": ANSWERED},
    ),
    "question and answers": (
        PAIR,
        lambda a, b: {"image": a, "question": ASKED, "answers": ["b", ANSWERED, "c", ANSWERED]},
    ),
    "VQAv2": (
        PAIR,
        lambda a, b: {
            "image": a,
            "question": ASKED,
            "question_id": 3,
            "multiple_choice_answer": ANSWERED,
            "answers": [{"answer": "b", "answer_id": 1}, {"answer": "c", "answer_id": 2}],
        },
    ),
    "VQAv2's answers": (
        PAIR,
        lambda a, b: {
            "image": a,
            "question": ASKED,
            "answers": [
                {"answer": word, "answer_confidence": "yes"} for word in ("b", ANSWERED, ANSWERED)
            ],
        },
    ),
    "query and response": (
        (*NO_IMAGE, ("human", "are you sure"), ("gpt", "yes")),
        lambda a, b: {
            "query": "are you sure",
            "response": "yes",
            "history": [[ASKED, ANSWERED]],
        },
    ),
    "Alpaca": (
        (("human", f"<image>\none\n{ASKED}"), ("gpt", ANSWERED)),
        lambda a, b: {"image": a, "instruction": "one", "input": ASKED, "output": ANSWERED},
    ),
    "text alone": (
        NO_IMAGE,
        lambda a, b: {"instruction": ASKED, "input": "", "output": ANSWERED},
    ),
    "caption": (CAPTION, lambda a, b: {"image": a, "caption": ANSWERED}),
    "captions": (CAPTION, lambda a, b: {"image": a, "captions": [ANSWERED, "a dog"]}),
    "image and text": (CAPTION, lambda a, b: {"image": a, "text": ANSWERED}),
}


def make_pair(name: str, a, b) -> tuple[dict, dict]:
    """(the record in a form, the same in LLaVA's): `a` and `b` are what a record has of images."""
    turns, make = FORMS[name]
    number = "".join(text for _, text in turns).count("<image>")
    llava = {"id": "r", "image": [a, b][:number], "conversations": _turns(turns)}
    return {"id": "r", **make(a, b)}, llava


def make_data_url(data: bytes) -> str:
    """A file's bytes as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _turns(turns) -> list[dict]:
    return [{"from": who, "value": text} for who, text in turns]


def _encode(processor, example: Example) -> dict[str, torch.Tensor]:
    return encode_batch(processor, [example], [example.load_images()])


def assert_same(processor, example: Example, expected: Example) -> None:
    """The same messages and, for a model, the same tokens, labels and pixels."""
    assert example.messages == expected.messages
    batch, wanted = _encode(processor, example), _encode(processor, expected)
    assert batch.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(batch[key], value), key
    assert (batch["labels"] >= 0).any()


def read_expected(folder, name: str) -> Example:
    """The record of a form as LLaVA has it."""
    _, llava = make_pair(name, *NAMES)
    (expected,) = read_examples(write_data(folder, llava, name="llava.json"))
    return expected
