"""Records in LLaVA's conversation format, read from JSON, JSON Lines or Parquet, each checked as
far as text goes.

A record is `{"id", "image": name or list of names, "conversations": [{"from": "human" | "gpt" | "system", "value"}]}`, with one
`<image>` in a human turn for every picture. `group` and `level` are optional and kept for scoring.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ..config.recipe import Source
from ..config.yaml_io import expand_path
from ..schema import UserError, nearest
from .errors import RecordError
from .images import Pictures, open_bytes
from .readers import files_of, read_records, store_of

IMAGE = "<image>"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Example:
    """One conversation: messages [{"role", "content"}] with `<image>` in user contents, and its
    pictures' names (or bytes).

    source says where it stands, as in "train.jsonl line 7"; `pictures` opens what `images` names.
    skip: a broken picture is no error.
    """

    id: str
    images: list[str | bytes]
    messages: list[dict[str, str]]
    group: str | None = None
    level: str | None = None
    source: str = ""
    store: Pictures | None = field(default=None, repr=False, compare=False)
    skip: bool = field(default=False, repr=False, compare=False)

    @property
    def place(self) -> str:
        """Where the record stands, or its id where that is not known."""
        return self.source or self.id

    def pictures(self) -> list[Image.Image]:
        """The pictures in RGB, in order; ValueError naming the record where one is missing or
        broken.
        """
        try:
            return [
                open_bytes(i) if isinstance(i, bytes) else self.store.open(i) for i in self.images
            ]
        except UserError as error:
            raise RecordError(self.place, str(error)) from None

    def check_pictures(self) -> None:
        """Raise ValueError unless every picture is there; none is opened."""
        for name in self.images:
            if isinstance(name, str) and name not in self.store:
                raise RecordError(
                    self.place,
                    f"there is no picture {name} in {self.store.path}; add it or correct the"
                    " record's `image`",
                )


def read_source(source: Source, problems: list[RecordError]) -> list[Example]:
    """Examples of a recipe's source; with on_error "skip", sentences about bad records are appended
    to `problems`.
    """
    notes = problems if source.on_error == "skip" else None
    examples = read_examples(
        expand_path(source.path),
        expand_path(source.images) if source.images else None,
        problems=notes,
    )
    chosen = choose(examples, where=source.where, hold_out=source.hold_out, keep=source.keep)
    if source.group:
        chosen = [e if e.group else replace(e, group=_caught(source.group, e.id)) for e in chosen]
    if not chosen:
        raise UserError(
            f"{source.path} gives no record to use: of {len(examples)} good ones, none is left by"
            f" where={source.where!r} and hold_out={source.hold_out!r}; ids look like"
            f" {[e.id for e in examples[:3]]}"
        )
    return chosen


def read_examples(
    path: str | Path, images: str | Path | None = None, *, problems: list[RecordError] | None = None
) -> list[Example]:
    """All records of a file, or of all that a pattern names, as examples.

    images: folder or tar archive of the pictures; None for the file's own folder or, where it holds
    them itself, the file. Raises ValueError at the first bad record, or, where a list of problems
    is given, notes a sentence there and goes on.
    """
    examples = []
    for file in files_of(path):
        store = store_of(file) if images is None else Pictures(images)
        for place, record in read_records(file, kept=images is None):
            try:
                example = example_from(record, place, store, skip=problems is not None)
                example.check_pictures()
                examples.append(example)
            except RecordError as error:
                if problems is None:
                    raise
                problems.append(error)
    return examples


def choose(
    examples: list[Example],
    *,
    where: str | None = None,
    hold_out: str | None = None,
    keep: int | None = None,
) -> list[Example]:
    """Examples whose id contains `where` and not `hold_out` (regular expressions), at most `keep`
    of them, in file order.

    The choice of `keep` goes by a hash of the ids: random, but the same for every seed and machine,
    and a smaller one lies inside a larger one.
    """
    chosen = [
        e
        for e in examples
        if (not where or re.search(where, e.id)) and not (hold_out and re.search(hold_out, e.id))
    ]
    if keep is None or keep >= len(chosen):
        return chosen
    order = sorted(
        range(len(chosen)), key=lambda i: (hashlib.sha1(chosen[i].id.encode()).digest(), i)
    )
    return [chosen[i] for i in sorted(order[:keep])]


def _caught(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def example_from(record, place: str, store, *, skip: bool = False) -> Example:
    """Check a record, or what a function reads as one, and return it as an example.

    Raises:
        RecordError: Where the record cannot be read or has not LLaVA's format.
    """
    try:
        record = record() if callable(record) else record
        return _checked_example(record, place, store, skip)
    except UserError as error:
        raise RecordError(place, str(error)) from None


def _checked_example(record, place: str, store, skip: bool) -> Example:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise UserError(
            f"a record is an object with `conversations`, but this is {_kind(record)} without; see"
            " LLaVA's format"
        )
    messages = [_message(turn, i) for i, turn in enumerate(record["conversations"])]
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if "system" in [m["role"] for m in messages[1:]]:
        raise UserError("a system turn stands after the first turn; put it first or remove it")
    if "assistant" not in roles:
        raise UserError(
            "there is no gpt turn, so there is nothing to learn or to compare with; add the answer"
        )
    if (
        any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles))
        or roles[-1] == "user"
    ):
        raise UserError(
            f"turns are {', '.join(roles)}, but human and gpt must alternate, human first and gpt"
            " last"
        )
    images = [_image(i) for i in _listed(record.get("image"))]
    places = sum(m["content"].count(IMAGE) for m in messages)
    if places != len(images):
        raise UserError(
            f"the text has {places} {IMAGE} but the record names {len(images)} pictures; write one"
            f" {IMAGE} for each picture"
        )
    group, level = (
        None if record.get(key) is None else str(record[key]) for key in ("group", "level")
    )
    return Example(str(record.get("id", place)), images, messages, group, level, place, store, skip)


def _message(turn, number: int) -> dict[str, str]:
    role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
    if role not in ROLES:
        raise UserError(
            f"turn {number} is from {role!r}{nearest(role, ROLES)}; allowed are human, gpt and"
            " system"
        )
    if not isinstance(text, str) or not text.strip():
        empty = "answer" if ROLES[role] == "assistant" else "text"
        raise UserError(
            f"turn {number} has an empty {empty} ({text!r}); write it or remove the record"
        )
    if ROLES[role] != "user" and IMAGE in text:
        raise UserError(
            f"turn {number} is from {role} and holds {IMAGE}; pictures belong to human turns"
        )
    return {"role": ROLES[role], "content": text}


def _image(image) -> str | bytes:
    if isinstance(image, dict):  # an Image column of `datasets`
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, str | bytes) or not image:
        raise UserError(
            f"`image` holds {image!r}, but a picture's name or a list of names is needed"
        )
    return image


def _listed(value) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _kind(value) -> str:
    return {dict: "an object", list: "a list", str: "a text"}.get(type(value), repr(value))
