"""The forms of records: which keys each has, and how it becomes turns and images.

A record has the first form in `FORMS` whose keys it has; a key without a value counts as absent.
What is no known form is answered with the nearest one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..schema import UserError
from .choices import ask_with_choices
from .errors import show_value
from .image_values import ImageValue, find_image_value, is_cell, parse_images
from .texts import list_items, list_rows
from .turns import Turn, join_turns, make_turn, parse_turns

IMAGE_NAMES = ("image", "images")
MEDIA_KEYS = ("audio", "audios", "video", "videos")
TOOL_LISTS = ("tools", "functions")
VERDICTS = ("label", "kto_tag")  # whether an answer is good, beside the turns of these keys
JUDGED = ("messages", "conversations", "completion")
LISTED = (
    "answers",
    "captions",
    "questions",
)  # keys whose text may be a list, as tables of text hold it
BOXES = ("<bbox>", "<ref-object>")  # what stands in a text for one of `objects`
# Keys under which other tools name an image.
OTHER_IMAGE_KEYS = (
    *("image_id", "img_id", "image_path", "img_path", "image_file", "image_url", "file_name"),
    *("filename", "img", "picture", "photo"),
)
FILE_ENDS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

Convert = Callable[[dict, int], list[Turn]]  # a record, and bytes that an image may take


@dataclass(frozen=True)
class Form:
    """What one record may look like.

    Attributes:
        name: Its name.
        keys: The keys that it needs; `image` stands for `images` too.
        convert: Makes turns of a record.
        example: One such record.
        images_first: Whether images come before the first question where no text places them.
    """

    name: str
    keys: tuple[str, ...]
    convert: Convert
    example: dict
    images_first: bool = True

    def fits(self, record: dict) -> bool:
        """Whether a record has the keys."""
        return all(has_key(record, key) for key in self.keys)


def has_key(record: dict, key: str) -> bool:
    """Whether a record has a value for a key of a form."""
    if key == "image":
        return record.get("image") is not None or record.get("images") is not None
    return record.get(key) is not None


def convert_record(
    record: dict, form: Form, max_bytes: int
) -> tuple[list[dict[str, str]], list[ImageValue]]:
    """Return the messages and the images of a record.

    Args:
        record: The record.
        form: Its form.
        max_bytes: Bytes that one image may take.

    Raises:
        UserError: The record is wrong.
    """
    _refuse_others(record)
    turns = _add_system(record, form.convert(record, max_bytes), max_bytes)
    _refuse_boxes(record, turns)
    images = _read_images(record, max_bytes)
    messages, images = join_turns(turns, images, images_first=form.images_first)
    if form.images_first and not images:
        _refuse_hidden_image(record)
    return messages, images


def _refuse_others(record: dict) -> None:
    """Raise UserError where a record has more than texts and images: it would be learned in
    part.
    """
    for key in MEDIA_KEYS:
        if not _is_empty(record.get(key)):
            raise UserError(
                f"the record has `{key}`, which records are not trained on with; remove the record"
                " or, where its texts and images are enough, the key"
            )
    for key in TOOL_LISTS:
        if not _is_empty(record.get(key)):
            raise UserError(
                f"the record has `{key}`, and calls of tools are not trained on; remove the record,"
                " or write the tools as text"
            )
    for key in VERDICTS:
        if isinstance(record.get(key), bool) and any(has_key(record, other) for other in JUDGED):
            raise UserError(
                f"the record has answers and `{key}` true or false: such data says which answers"
                " are good, and is for TRL's KTOTrainer. To learn the good answers, keep the"
                f" records with {key} true and remove the key"
            )


def _refuse_boxes(record: dict, turns: list[Turn]) -> None:
    """Raise UserError where texts hold places for boxes, which would be learned as they are."""
    for mark in BOXES:
        if not _is_empty(record.get("objects")) and any(mark in turn.content for turn in turns):
            raise UserError(
                f"a text holds {mark}, which stands for one of the record's `objects`; write these"
                " into the text, and remove `objects`"
            )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and value in ("", "[]", [], {}))


def _add_system(record: dict, turns: list[Turn], max_bytes: int) -> list[Turn]:
    system = record.get("system")
    if _is_empty(system):
        return turns
    if turns and turns[0].role == "system":
        raise UserError("the record has `system` and a system turn; remove one of them")
    return [make_turn("system", system, "`system`", max_bytes), *turns]


def _read_images(record: dict, max_bytes: int) -> list[ImageValue]:
    found = {key: parse_images(record.get(key), key, max_bytes) for key in IMAGE_NAMES}
    one, several = found.values()
    if one and several and one != several:
        raise UserError(
            f"the record has `image` ({len(one)}) and `images` ({len(several)}), and it is not"
            " known which are meant; remove one of them"
        )
    return one or several


def _refuse_hidden_image(record: dict) -> None:
    """Raise UserError where an image stands under a key that is not read."""
    for key, value in record.items():
        if key in IMAGE_NAMES:
            continue
        is_object = isinstance(value, dict) and ("bytes" in value or "path" in value)
        is_image = isinstance(value, bytes) or (is_object and find_image_value(value) is not None)
        is_image = is_image or is_cell(value)
        is_file = isinstance(value, str) and value.lower().endswith(FILE_ENDS) and " " not in value
        is_named = key in OTHER_IMAGE_KEYS and not _is_empty(value)
        if is_image or is_file or is_named:
            raise UserError(
                f"the record has no image, but {key!r} holds {show_value(value)}; if that is its"
                f" image, write `columns: {{image: {key}}}`, and otherwise remove it"
            )


# ---- conversations


def _convert_conversations(record: dict, max_bytes: int) -> list[Turn]:
    return _parse_all(record, "conversations", max_bytes)


def _convert_messages(record: dict, max_bytes: int) -> list[Turn]:
    return _parse_all(record, "messages", max_bytes)


def _parse_all(record: dict, key: str, max_bytes: int) -> list[Turn]:
    turns = parse_turns(list_rows(record[key]), key, max_bytes)
    if turns and turns[-1].role == "user" and has_key(record, "chosen"):
        _refuse_preference(record, max_bytes)  # LLaMA-Factory's, whose turns end with the question
    return turns


def _convert_texts(record: dict, max_bytes: int) -> list[Turn]:
    rows = list_rows(record["texts"])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            f"`texts` holds {show_value(rows)}, but a list of objects with `user` and `assistant`"
            " is needed"
        )
    turns = []
    for number, row in enumerate(rows):
        for role in ("user", "assistant"):
            place = f"`{role}` of text {number}"
            turns.append(make_turn(role, row.get(role), place, max_bytes))
    return turns


# ---- prompts and answers


def _make_pair(question: str, answer: str) -> Convert:
    def convert(record: dict, max_bytes: int) -> list[Turn]:
        asked = _read_plain(record[question], question)
        asked, given = ask_with_choices(record, asked, record[answer], answer)
        given = read_answer(given, answer)
        turns = [
            make_turn("user", asked, f"`{question}`", max_bytes),
            make_turn("assistant", given, f"`{answer}`", max_bytes),
        ]
        return [*_read_history(record, max_bytes), *turns]

    return convert


def _convert_questions(record: dict, max_bytes: int) -> list[Turn]:
    """Questions and as many answers, as OCR-VQA has them, are the turns of one conversation."""
    asked, given = (list_items(record[key]) for key in ("questions", "answers"))
    are_lists = isinstance(asked, list) and isinstance(given, list)
    if not are_lists or len(asked) != len(given):
        raise UserError(
            f"`questions` holds {show_value(asked)} and `answers` {show_value(given)}, but two"
            " lists with an answer for each question are needed"
        )
    turns = []
    for number, (question, answer) in enumerate(zip(asked, given, strict=True)):
        for role, text in (("user", question), ("assistant", answer)):
            plain = _read_plain(text, "questions" if role == "user" else "answers")
            turns.append(make_turn(role, plain, f"pair {number}", max_bytes))
    return turns


def _convert_instruction(record: dict, max_bytes: int) -> list[Turn]:
    """Alpaca's: the input follows the instruction on a line of its own, as LLaMA-Factory has it."""
    given = record.get("input")
    if not _is_empty(given):
        asked = _read_plain(record["instruction"], "instruction")
        record = {**record, "instruction": f"{asked}\n{_read_plain(given, 'input')}"}
    answer = "output" if has_key(record, "output") else "response"
    return _make_pair("instruction", answer)(record, max_bytes)


def _read_history(record: dict, max_bytes: int) -> list[Turn]:
    """Earlier turns: `history` is a list of [question, answer]."""
    history = list_items(record.get("history"))
    if _is_empty(history):
        return []
    turns = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"`history` holds {show_value(pair)}, but lists of [question, answer] are needed"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(make_turn(role, text, f"`history` {number}", max_bytes))
    return turns


def _read_plain(value: Any, key: str) -> Any:
    """A text, or a number as text."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and math.isfinite(value)):
        raise UserError(f"`{key}` holds {show_value(value)}, but a text is needed")
    return str(value)


def read_answer(value: Any, key: str) -> str:
    """Return the answer that is learned: of several, the one that most people gave.

    Args:
        value: A text, a number, a list of these or of objects with `answer` or `text`, or an object
            with such a list.
        key: Where it stands, for errors.

    Raises:
        UserError: There is no answer.
    """
    value = list_rows(value)
    if key in LISTED:  # a single answer such as "[0.1, 0.4]" is a text
        value = list_items(value)
    value = _take_answer(value)
    if not isinstance(value, list):
        return _read_plain(value, key)
    answers = []
    for item in map(_take_answer, value):
        if not _is_empty(item):
            answers.append(_read_plain(item, key))
    if not answers:
        raise UserError(f"`{key}` holds no answer ({show_value(value)}); add one")
    return Counter(answers).most_common(1)[0][0]  # the first one where several are as common


def _take_answer(value: Any) -> Any:
    """What an object has under `answer` or `text`; any other value as it is."""
    if isinstance(value, dict):
        return value.get("answer", value.get("text", value))
    return value


def _convert_prompt(record: dict, max_bytes: int) -> list[Turn]:
    """TRL's prompt and completion, which are texts or lists of messages."""
    turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        value = list_rows(record[key])
        if isinstance(value, list):
            turns += parse_turns(value, key, max_bytes)
        else:
            turns.append(make_turn(role, _read_plain(value, key), f"`{key}`", max_bytes))
    return turns


def _refuse_preference(record: dict, max_bytes: int) -> list[Turn]:
    asked = {"prompt": "completion", "question": "answer", "query": "response"}
    key = next((asked[key] for key in asked if has_key(record, key)), "messages")
    raise UserError(
        "the record has `chosen` and `rejected`: such data says which of two answers is better, and"
        " is for TRL's DPOTrainer, which takes our models. To learn the chosen answers here, write"
        f" `columns: {{{key}: chosen}}`"
    )


def _make_caption(key: str) -> Convert:
    def convert(record: dict, max_bytes: int) -> list[Turn]:
        value = record[key]
        if key in LISTED:
            value = list_items(value)
        if isinstance(value, list) and value:
            value = value[0]
        caption = make_turn("assistant", _read_plain(value, key), f"`{key}`", max_bytes)
        return [Turn("user", ""), caption]

    return convert


# ---- the forms

ASKED, ANSWERED = "What is in the image?", "a cat"
EXAMPLE_IMAGE = {"image": "0.png"}


def _pair_form(question: str, answer: str, given: Any = ANSWERED) -> Form:
    example = {**EXAMPLE_IMAGE, question: ASKED, answer: given}
    return Form(
        f"{question} and {answer}", (question, answer), _make_pair(question, answer), example
    )


def _caption_form(key: str, given: Any = "a cat on a mat") -> Form:
    example = {**EXAMPLE_IMAGE, key: given}
    return Form(f"image and {key}", ("image", key), _make_caption(key), example)


def _list_instruction_forms() -> list[Form]:
    forms = []
    for answer in ("output", "response"):
        asked = {"instruction": "Answer in one word.", "input": ASKED}
        example = {**EXAMPLE_IMAGE, **asked, answer: ANSWERED}
        keys = ("instruction", answer)
        forms.append(Form(f"instruction and {answer}", keys, _convert_instruction, example))
    return forms


FORMS = (  # a record has the first one that fits
    Form(
        "conversations",
        ("conversations",),
        _convert_conversations,
        {
            **EXAMPLE_IMAGE,
            "conversations": [
                {"from": "human", "value": f"<image>\n{ASKED}"},
                {"from": "gpt", "value": ANSWERED},
            ],
        },
        images_first=False,
    ),
    Form(
        "messages",
        ("messages",),
        _convert_messages,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "0.png"},
                        {"type": "text", "text": ASKED},
                    ],
                },
                {"role": "assistant", "content": ANSWERED},
            ]
        },
    ),
    Form(
        "texts",
        ("texts",),
        _convert_texts,
        {"images": ["0.png"], "texts": [{"user": ASKED, "assistant": ANSWERED}]},
    ),
    Form(
        "prompt and completion",
        ("prompt", "completion"),
        _convert_prompt,
        {**EXAMPLE_IMAGE, "prompt": ASKED, "completion": ANSWERED},
    ),
    Form("preferences", ("chosen", "rejected"), _refuse_preference, {}),
    _pair_form("question", "answer"),
    _pair_form("question", "multiple_choice_answer"),
    _pair_form("question", "answers", [ANSWERED, ANSWERED, "a dog"]),
    Form(
        "questions and answers",
        ("questions", "answers"),
        _convert_questions,
        {**EXAMPLE_IMAGE, "questions": [ASKED, "Is it black?"], "answers": [ANSWERED, "yes"]},
    ),
    _pair_form("query", "response"),
    *_list_instruction_forms(),
    _pair_form("prompt", "response"),
    _caption_form("caption"),
    _caption_form("captions", ["a cat on a mat", "a cat"]),
    _caption_form("text"),
)
