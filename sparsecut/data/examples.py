"""Records in LLaVA's conversation format, read from files and checked as far as text goes.

A record is `{"id", "image": name or list of names, "conversations": [{"from": "human" | "gpt" |
"system", "value"}]}`, with one `<image>` in a human turn for every image. `group` and `level` are
optional and kept for scoring.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.recipe import Source
from ..config.yaml_io import expand_path
from ..schema import UserError, nearest
from .access import DEFAULT_ACCESS, Access, get_access
from .errors import RecordError, show_value
from .images import ImageStore, decode_image
from .readers import find_files, open_image_store, read_records

logger = logging.getLogger(__name__)

LONGEST_NAME = 4096  # characters of a path
TYPE_NAMES = {dict: "an object", list: "a list", str: "a text"}

IMAGE = "<image>"  # the placeholder in a record's text
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        id: The record's id.
        images: Names of the images in `store`, or their encoded bytes.
        messages: {"role", "content"} of every turn, with `<image>` in user contents.
        group: A category; scores are given for each.
        level: A level of difficulty; scores are given for each.
        source: Where the record stands, such as "train.jsonl line 7".
        store: Opens the images that have names.
        skip: Whether the record is left out, in place of an error, where an image is broken.
    """

    id: str
    images: list[str | bytes]
    messages: list[dict[str, str]]
    group: str | None = None
    level: str | None = None
    source: str = ""
    store: ImageStore | None = field(default=None, repr=False, compare=False)
    skip: bool = field(default=False, repr=False, compare=False)

    @property
    def place(self) -> str:
        """Where the record stands, or its id where that is not known."""
        return self.source or self.id

    def get_messages(self, image_token: str) -> list[dict[str, str]]:
        """Return the messages with a processor's placeholder in place of `<image>`."""
        messages = []
        for message in self.messages:
            content = message["content"].replace(IMAGE, image_token)
            messages.append({**message, "content": content})
        return messages

    def load_images(self) -> list[Image.Image]:
        """Return the images in RGB, in order; RecordError where one is missing or broken."""
        try:
            return [self._load_image(image) for image in self.images]
        except UserError as error:
            raise RecordError(self.place, str(error)) from None

    def _load_image(self, image: str | bytes) -> Image.Image:
        return decode_image(image) if isinstance(image, bytes) else self.store.load(image)

    def check_images(self) -> None:
        """Raise RecordError unless every image is there and may be read; none is opened."""
        try:
            for name in self.images:
                if isinstance(name, str):
                    self.store.check(name)
        except UserError as error:
            raise RecordError(self.place, str(error)) from None


def read_source(source: Source, problems: list[RecordError]) -> list[Example]:
    """Return the examples of a recipe's source.

    Args:
        source: The files, and which of their records are chosen.
        problems: With on_error "skip", the errors of bad records are appended.

    Raises:
        RecordError: A record is bad, and the source says on_error "stop".
        UserError: A file is missing or broken, or no record is left.
    """
    path = expand_path(source.path)
    images = expand_path(source.images) if source.images else None
    examples = read_examples(
        path,
        images,
        problems=problems if source.on_error == "skip" else None,
        access=get_access(source),
    )
    _warn_of_ids(source, examples)
    selected = select_examples(
        examples, where=source.where, hold_out=source.hold_out, keep=source.keep
    )
    if not examples:
        last = f"; {len(problems)} were skipped, the last: {problems[-1]}" if problems else ""
        raise UserError(f"{source.path} holds no good record{last}")
    if not selected:
        raise UserError(
            f"{source.path} gives no record to use: of {len(examples)} good ones, none is left by"
            f" where={source.where!r} and hold_out={source.hold_out!r}; ids look like"
            f" {show_value([example.id for example in examples[:3]])}"
        )
    if source.group:
        selected = [_add_group(example, source.group) for example in selected]
    return selected


def _warn_of_ids(source: Source, examples: list[Example]) -> None:
    """Tell where ids do not do what choosing by ids is for."""
    counts = Counter(example.id for example in examples)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        logger.warning(
            "%s: %d ids are of several records, such as %s; `where`, `hold_out` and `keep` cannot"
            " tell these apart",
            source.path,
            len(repeated),
            show_value(repeated[0]),
        )
    if source.hold_out and not any(re.search(source.hold_out, name) for name in counts):
        logger.warning(
            "%s: hold_out=%r matches none of %d ids, so nothing is held out; ids look like %s",
            source.path,
            source.hold_out,
            len(counts),
            show_value(list(counts)[:3]),
        )


def _add_group(example: Example, pattern: str) -> Example:
    """The example with the group that the pattern's parentheses match in its id."""
    match = re.search(pattern, example.id)
    if example.group or match is None:
        return example
    return replace(example, group=match[1])


def read_examples(
    path: str | Path,
    images: str | Path | None = None,
    *,
    problems: list[RecordError] | None = None,
    access: Access = DEFAULT_ACCESS,
) -> list[Example]:
    """Return all records of a file, or of all files that a pattern names, as examples.

    Args:
        path: A file or a pattern.
        images: A folder or tar archive of the images. None stands for the file's own folder or,
            where it holds its images itself, the file.
        problems: Errors of bad records are appended. Without it the first one is raised.
        access: What records may reach.

    Raises:
        RecordError: A record is bad.
        UserError: A file is missing or broken.
    """
    examples = []
    shared_store = None if images is None else ImageStore(images, access)
    for file in find_files(path):
        store = shared_store or open_image_store(file, access)
        records = read_records(file, images_by_name=images is None, access=access)
        for place, record in records:
            try:
                example = parse_record(record, place, store, skip=problems is not None)
                example.check_images()
                examples.append(example)
            except RecordError as error:
                if problems is None:
                    raise
                problems.append(error)
    return examples


def select_examples(
    examples: list[Example],
    *,
    where: str | None = None,
    hold_out: str | None = None,
    keep: int | None = None,
) -> list[Example]:
    """Return some of the examples, in file order.

    `keep` chooses by a hash of the ids. So the choice is random, but the same for every seed and
    machine. A smaller choice lies inside a larger one.

    Args:
        examples: The examples to choose among.
        where: A regular expression that an id must contain.
        hold_out: A regular expression that an id must not contain.
        keep: At most so many.
    """
    selected = [example for example in examples if _matches(example, where, hold_out)]
    if keep is None or keep >= len(selected):
        return selected
    digests = [hashlib.sha1(example.id.encode()).digest() for example in selected]
    order = sorted(range(len(selected)), key=lambda i: (digests[i], i))
    return [selected[i] for i in sorted(order[:keep])]


def _matches(example: Example, where: str | None, hold_out: str | None) -> bool:
    if where and not re.search(where, example.id):
        return False
    return not (hold_out and re.search(hold_out, example.id))


def parse_record(record: Any, place: str, store: ImageStore, *, skip: bool = False) -> Example:
    """Check a record and return it as an example.

    Args:
        record: The record, or a function that reads it.
        place: Where it stands.
        store: Opens its images.
        skip: Whether it may be left out later, where an image is broken.

    Raises:
        RecordError: The record cannot be read or has not LLaVA's format.
    """
    try:
        record = record() if callable(record) else record
        _check_keys(record)
        messages = [_parse_turn(turn, i) for i, turn in enumerate(record["conversations"])]
        _check_roles([message["role"] for message in messages])
        images = _parse_images(record.get("image"))
        _check_placeholders(messages, images)
        record_id, group, level = (_get_text(record, key) for key in ("id", "group", "level"))
    except UserError as error:
        raise RecordError(place, str(error)) from None
    return Example(
        id=place if record_id is None else record_id,
        images=images,
        messages=messages,
        group=group,
        level=level,
        source=place,
        store=store,
        skip=skip,
    )


def _check_keys(record: Any) -> None:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(
            f"a record is an object with a list of `conversations`, but this is"
            f" {TYPE_NAMES.get(type(record)) or show_value(record)} without; see LLaVA's format"
        )


def _parse_turn(turn: Any, number: int) -> dict[str, str]:
    role, text = None, None
    if isinstance(turn, dict):
        role, text = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise UserError(
            f"turn {number} is from {show_value(role)}{hint}; allowed are human, gpt and system"
        )
    if not isinstance(text, str) or not text.strip():
        what = "answer" if ROLES[role] == "assistant" else "text"
        raise UserError(
            f"turn {number} has an empty {what} ({show_value(text)}); write it or remove the record"
        )
    check_text(text, f"turn {number}")
    if ROLES[role] != "user" and IMAGE in text:
        raise UserError(
            f"turn {number} is from {role} and holds {IMAGE}; images belong to human turns"
        )
    return {"role": ROLES[role], "content": text}


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


def _parse_images(value: Any) -> list[str | bytes]:
    if value is None:
        return []
    images = value if isinstance(value, list) else [value]
    return [_parse_image(image) for image in images]


def _parse_image(image: Any) -> str | bytes:
    if isinstance(image, dict):  # an Image column of `datasets`
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | bytes) or not image:
        raise UserError(
            f"`image` holds {show_value(image)}, but an image's name or a list of names is needed"
        )
    if isinstance(image, str):
        check_text(image, "`image`")
        if len(image) > LONGEST_NAME:
            raise UserError(
                f"`image` holds a name of {len(image):,} characters, but no path is longer than"
                f" {LONGEST_NAME:,}; correct it"
            )
    return image


def _check_placeholders(messages: list[dict[str, str]], images: list[str | bytes]) -> None:
    number = sum(message["content"].count(IMAGE) for message in messages)
    if number != len(images):
        raise UserError(
            f"the text has {number} {IMAGE} but the record names {len(images)} images; write one"
            f" {IMAGE} for each image"
        )


def _get_text(record: dict, key: str) -> str | None:
    value = record.get(key)
    if isinstance(value, list | dict):
        raise UserError(f"`{key}` holds {show_value(value)}, but a text or a number is needed")
    if isinstance(value, str):
        check_text(value, f"`{key}`")
    return None if value is None else str(value)


def check_text(text: str, what: str) -> None:
    """Raise UserError for a text that tokenizers and files cannot hold.

    Args:
        text: The text.
        what: What it is, for the error.
    """
    if "\0" in text:
        raise UserError(f"{what} holds a NUL character; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half a surrogate pair ({text[error.start]!r}), which is no character;"
            " remove it"
        ) from None
