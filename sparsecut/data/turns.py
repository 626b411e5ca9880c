"""The turns of a conversation, from every way in which records write them.

A turn is `{"from", "value"}` or `{"role", "content"}`. Its content is a text, or a list of parts:
texts and images. An image part holds its image, or stands for one of the record's `image` or
`images`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..schema import UserError, nearest
from .errors import show_value
from .image_values import ImageValue, find_image_value, parse_image
from .texts import check_text

IMAGE = "<image>"  # the placeholder in a record's text
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
ROLE_NAMES = tuple(ROLES)  # a list from a file has no hash, and may be compared
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython", "tool_response")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
LEARNED_KEYS = ("weight", "loss", "train")  # of a turn that other tools leave out of the loss
TEXT_PARTS = ("text", "input_text", "output_text")
IMAGE_PARTS = ("image", "image_url", "input_image")


# What stands for an image in the texts of others: DeepSeek, Qwen, MMMU, Phi, InternLM and Gemma.
OTHER_MARKS = re.compile(
    r"<image[ _]?\d+>|<image_placeholder>|<\|image(_\d+|_pad)?\|>|<ImageHere>|<start_of_image>"
    r"|\[IMG\]|<img>[^<>\n]*</img>"
)
OTHER_FILES = re.compile(r"<img>[^<>\n]*\.\w{3,4}</img>")  # Qwen-VL's first form names the file


class Slot(NamedTuple):
    """An image part without its image: one of the record's images is meant, the next or `index`."""

    index: int | None = None


class Turn(NamedTuple):
    """One turn.

    Attributes:
        role: user, assistant or system.
        content: Its text, with `<image>` for every image.
        images: Its image parts, in order; none where images are named by placeholders alone.
    """

    role: str
    content: str
    images: Sequence[ImageValue | Slot] = ()


def parse_turns(turns: Any, key: str, max_bytes: int) -> list[Turn]:
    """Return the turns that stand in a list; UserError where it holds anything else."""
    if not isinstance(turns, list):
        raise UserError(f"`{key}` holds {show_value(turns)}, but a list of turns is needed")
    return [_parse_turn(turn, f"turn {i}", max_bytes) for i, turn in enumerate(turns)]


def _parse_turn(turn: Any, place: str, max_bytes: int) -> Turn:
    speaker, content = None, None
    if isinstance(turn, dict):
        speaker = turn.get("role") if turn.get("from") is None else turn["from"]
        content = turn.get("content") if turn.get("value") is None else turn["value"]
        if len(turn) > 2 or speaker not in ROLE_NAMES:
            _check_rest(turn, speaker, place)
    if not isinstance(speaker, str) or speaker not in ROLES:
        hint = nearest(speaker, ROLES) if isinstance(speaker, str) else ""
        raise UserError(
            f"{place} is from {show_value(speaker)}{hint}; allowed are human, gpt and system, or"
            " user, assistant and system"
        )
    return make_turn(ROLES[speaker], content, place, max_bytes, speaker=speaker)


def _check_rest(turn: dict, speaker: Any, place: str) -> None:
    """Raise UserError where a turn has what would change the text, or what is learned of it."""
    called = [key for key in TOOL_KEYS if turn.get(key)]
    if called or (isinstance(speaker, str) and speaker in TOOL_ROLES):
        raise UserError(
            f"{place} belongs to a call of a tool (`{called[0] if called else speaker}`), which is"
            " not trained on; remove the record, or write the call and its result as text"
        )
    if not isinstance(speaker, str) or ROLES.get(speaker) != "assistant":
        return
    for key in THOUGHT_KEYS if turn.get("from") is None else ():
        if turn.get(key):
            raise UserError(
                f"{place} has a thought in `{key}`; write it into the content as the model's chat"
                " template does, for example <think>...</think>, or remove it"
            )
    for key in LEARNED_KEYS:
        if turn.get(key) in (0, False):
            raise UserError(
                f"{place} has {key} {turn[key]!r}, but every answer is learned; remove the key, or"
                " move the answers that are not to be learned into the question"
            )


def make_turn(
    role: str, content: Any, place: str, max_bytes: int, *, speaker: str | None = None
) -> Turn:
    """Check what a turn holds.

    Args:
        role: user, assistant or system.
        content: A text or a list of parts.
        place: Where it stands in the record, for errors.
        max_bytes: Bytes that one of its images may take.
        speaker: The role as the record has it.

    Raises:
        UserError: The content is empty, or not for this role.
    """
    images: list[ImageValue | Slot] = []
    text = content
    if isinstance(content, list):
        text, images = _join_parts(content, place, max_bytes)
    if not isinstance(text, str) or not text.strip():
        what = "answer" if role == "assistant" else "text"
        raise UserError(
            f"{place} has an empty {what} ({show_value(content)}); write it or remove the record"
        )
    check_text(text, place)
    if role != "user" and IMAGE in text:
        raise UserError(
            f"{place} is from {speaker or role} and holds {IMAGE}; images belong to human turns"
        )
    return Turn(role, text, images)


# ---- parts


def _join_parts(parts: list, place: str, max_bytes: int) -> tuple[str, list[ImageValue | Slot]]:
    """One text; an image is the placeholder on a line of its own, as the server writes it."""
    texts, images = [], []
    for number, part in enumerate(parts):
        where = f"{place}, part {number},"
        kind = _get_kind(part, where)
        if kind == "text":
            texts.append(_read_text(part, where))
            continue
        images.append(_read_image(part, where, max_bytes))
        texts.append(IMAGE if number + 1 == len(parts) else f"{IMAGE}\n")
    text = "".join(texts)
    if images and text.count(IMAGE) != len(images):
        raise UserError(
            f"{place} holds {IMAGE} in a text beside parts that are images; remove it, because each"
            " part stands where its image is"
        )
    return text, images


def _get_kind(part: Any, where: str) -> str:
    """Either text or image."""
    if isinstance(part, str):
        return "text"
    if not isinstance(part, dict):
        raise UserError(
            f"{where} is {show_value(part)}, but an object such as"
            ' {"type": "text", "text": "..."}'
            " is needed"
        )
    kind = part.get("type")
    if kind is None:  # as Qwen writes it: the key says what it is
        if find_image_value(part) is not None:
            return "image"
        kind = "text" if part.get("text") is not None else None
    if kind in TEXT_PARTS:
        return "text"
    if kind in IMAGE_PARTS:
        return "image"
    allowed = (*TEXT_PARTS, *IMAGE_PARTS)
    raise UserError(
        f"{where} is of type {show_value(kind)}{nearest(kind, allowed)}, but parts are text or"
        f" image: {', '.join(allowed)}"
    )


def _read_text(part: str | dict, where: str) -> str:
    text = part if isinstance(part, str) else part.get("text")
    if not isinstance(text, str):
        raise UserError(f"{where} has the text {show_value(text)}, but a text is needed")
    return text


def _read_image(part: dict, where: str, max_bytes: int) -> ImageValue | Slot:
    value = find_image_value(part)
    if value is not None:
        return parse_image(value, where, max_bytes)
    index = part.get("index")
    is_number = isinstance(index, int) and not isinstance(index, bool)
    return Slot(index if is_number else None)


# ---- turns and images together


def join_turns(
    turns: list[Turn], images: list[ImageValue], *, images_first: bool
) -> tuple[list[dict[str, str]], list[ImageValue]]:
    """Return the messages of an example, and its images in the order of their placeholders.

    Args:
        turns: The turns.
        images: The images of the record's `image` or `images`.
        images_first: Whether images come before the first question where no text places them.

    Raises:
        UserError: Roles do not alternate, or the turns and the images do not belong together.
    """
    _check_roles([turn.role for turn in turns])
    parts: list[ImageValue | Slot] = []
    for turn in turns:
        parts += turn.images
    num_placed = sum(turn.content.count(IMAGE) for turn in turns)
    if parts:
        _check_parts(parts, num_placed)
        images = _fill_slots(parts, images)
    elif images and images_first and not num_placed:
        _refuse_other_marks(turns, OTHER_MARKS)
        turns = _put_first(turns, len(images))
        num_placed = len(images)
    elif not num_placed:
        _refuse_other_marks(turns, OTHER_FILES)
    if num_placed != len(images):
        raise UserError(
            f"the text has {num_placed} {IMAGE} but the record names {len(images)} images; write"
            f" one {IMAGE} for each image"
        )
    return [{"role": turn.role, "content": turn.content} for turn in turns], images


def _refuse_other_marks(turns: list[Turn], marks: re.Pattern) -> None:
    """Raise UserError where a text marks an image as another tool does, which would be learned."""
    for turn in turns:
        found = marks.search(turn.content)
        if found is not None:
            raise UserError(
                f"a text holds {show_value(found[0])}, which marks an image for another tool; write"
                f" {IMAGE} in its place, and name the images in `images`, in the same order"
            )


def _check_roles(roles: list[str]) -> None:
    if "system" in roles[1:]:
        raise UserError("a system turn stands after the first turn; put it first or remove it")
    turns = [role for role in roles if role != "system"]
    if "assistant" not in turns:
        raise UserError(
            "there is no gpt turn, so there is no answer to train on or compare with; add one"
        )
    expected = ["user", "assistant"] * (len(turns) // 2)
    if turns != expected:
        raise UserError(
            f"turns are {', '.join(turns)}, but human and gpt must alternate, human first and gpt"
            " last"
        )


def _check_parts(parts: list, num_placed: int) -> None:
    if num_placed != len(parts):
        raise UserError(
            f"the texts of some turns hold {IMAGE}, and other turns have parts that are images;"
            " write all images as parts, or all as placeholders"
        )


def _fill_slots(parts: list[ImageValue | Slot], images: list[ImageValue]) -> list[ImageValue]:
    """The images of all parts, where some stand for the record's `image` or `images`."""
    slots = [part for part in parts if isinstance(part, Slot)]
    if images and not slots:
        raise UserError(
            f"the record has {len(images)} images in `image` or `images`, and its parts hold"
            f" {len(parts)} images of their own; remove one of the two"
        )
    if len(slots) != len(images):
        raise UserError(
            f"{len(slots)} parts stand for an image of the record, but `image` or `images` has"
            f" {len(images)}; give one image for each such part"
        )
    indexes = [slot.index for slot in slots]
    if None in indexes:
        indexes = list(range(len(slots)))
    if sorted(indexes) != list(range(len(images))):
        raise UserError(
            f"the parts' `index` are {show_value(indexes)}, but each of the {len(images)} images is"
            " needed once; correct or remove them"
        )
    waiting = iter(indexes)
    return [images[next(waiting)] if isinstance(part, Slot) else part for part in parts]


def _put_first(turns: list[Turn], number: int) -> list[Turn]:
    """The turns with placeholders before the first question, each on a line of its own."""
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    text = turns[first].content  # of a caption there is none
    content = "\n".join([*[IMAGE] * number, *([text] if text else [])])
    return [*turns[:first], turns[first]._replace(content=content), *turns[first + 1 :]]
