"""Which form a record has, by its keys; other names of keys; what to write where it has none."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from PIL import Image

from ..config.source import Source
from ..schema import UserError, nearest
from .errors import show_value
from .image_values import is_cell
from .record_forms import FORMS, IMAGE_NAMES, Form, has_key

KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    bytes: "bytes",
    dict: "an object",
    list: "a list",
    type(None): "nothing",
}
MOST_KEYS = 20  # of a record, that an error shows
ASKING = ("conversations", "messages", "texts", "question", "query", "instruction", "prompt")
# What the question of a source asks for, and the answers that go with other questions.
ANSWERING = ("label", "answer", "caption", "captions", "text")
CLOSE = 0.7  # how similar a key is that was meant for another


class Columns:
    """What a source says about its records: other names of keys, and a question about them all.

    Attributes:
        names: Key -> the name that records have for it.
        question: What is asked about every image that has a label or a caption.
        all_names: All these names.
        unseen: Names that no record has had so far.
        found: Keys of the records so far.
    """

    def __init__(self, names: Mapping[str, str], question: str | None = None):
        self.names = dict(names)
        self.question = question
        self.all_names = frozenset(self.names.values())
        self.unseen = set(self.all_names)
        self.found: dict[str, None] = {}

    def rename(self, record: dict) -> dict:
        """Return the record with its values under the keys of forms."""
        values = {key: record[name] for key, name in self.names.items() if name in record}
        others = {key: record[key] for key in record if key not in self.all_names}
        if self.unseen:
            self.unseen.difference_update(record)
            if len(self.found) < MOST_KEYS:
                self.found.update(dict.fromkeys(record))
        renamed = {**others, **values}
        return renamed if self.question is None else ask_about(renamed, self.question)

    def check_seen(self, what: str) -> None:
        """Raise UserError where no record had one of the names.

        Args:
            what: The records, for the error.
        """
        for key, name in self.names.items():
            if name in self.unseen and self.found:
                raise UserError(
                    f"columns says that `{key}` is {name!r}, but none of {what} has it"
                    f"{nearest(name, self.found)}; their keys are"
                    f" {', '.join(map(str, self.found))}"
                )


def get_columns(source: Source) -> Columns | None:
    """Return what a source says about its records, None where it says nothing."""
    if not source.columns and source.question is None:
        return None
    return Columns(source.columns, source.question)


def ask_about(record: dict, question: str) -> dict:
    """Return a record of an image and its label or caption as a question and its answer.

    Raises:
        UserError: It has none of these, or a question or turns of its own.
    """
    own = [key for key in ASKING if record.get(key) is not None]
    if own:
        raise UserError(f"the record has `{own[0]}` of its own; remove `question` from its source")
    key = next((key for key in ANSWERING if _holds_text(record.get(key))), None)
    if key is None:
        shown = show_value(", ".join(map(str, record)))
        raise UserError(
            f"`question` of the source asks for {', '.join(ANSWERING)}, but the record has the keys"
            f" {shown} with label={show_value(record.get('label'))}; name the answer's column, as"
            " `columns: {label: ...}` does, or remove `question`"
        )
    answer = record[key][0] if isinstance(record[key], list) else record[key]
    rest = {name: value for name, value in record.items() if name not in ANSWERING}
    return {**rest, "question": question, "answer": answer}


def _holds_text(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _holds_text(value[0])
    return isinstance(value, str) and bool(value.strip())


def choose_form(record: Any, columns: Columns | None = None) -> Form:
    """Return the form of a record.

    Args:
        record: The record, under the keys of forms.
        columns: Other names that were given for keys.

    Raises:
        UserError: It has none. The error has the record's keys, the nearest form, what is missing
            for it, and an example.
    """
    if not isinstance(record, dict):
        example = _show_example(FORMS[0])
        raise UserError(
            f"a record is an object with keys such as `conversations`, but this is"
            f" {_name_kind(record)}; one such record: {example}"
        )
    for form in FORMS:
        if form.fits(record):
            return form
    raise UserError(_describe_unknown(record, columns))


def _describe_unknown(record: dict, columns: Columns | None) -> str:
    keys = [key for key in record if record[key] is not None]
    shown = ", ".join(f"{key} ({_name_kind(record[key])})" for key in keys[:MOST_KEYS])
    if isinstance(record.get("label"), str) and has_key(record, "image"):
        return (
            f"the record has an image and the label {show_value(record['label'])}, but no question"
            f" (its keys are {shown}); set `question` of the source, such as question: What is it?"
        )
    form = _find_nearest_form(record, columns.names if columns else ())
    missing = [key for key in form.keys if not has_key(record, key)]
    parts = [
        f"the record is of no known form: its keys are {shown or 'none'}",
        f"The nearest form is {form.name}, which lacks {' and '.join(missing)}",
        *_suggest_columns(record, missing, columns),
        f"One such record: {_show_example(form)}",
    ]
    return ". ".join(parts)


def _suggest_columns(record: dict, missing: list[str], columns: Columns | None) -> list[str]:
    for key in missing:
        name = columns.names.get(key) if columns else None
        if name is not None:
            return [f"`columns` says that `{key}` is {name!r}{nearest(name, record)}"]
    free = [name for name in record if isinstance(name, str) and not _is_needed(name)]
    guesses = {}
    for key in missing:
        close = difflib.get_close_matches(key, free, n=1, cutoff=CLOSE)
        guesses[key] = close[0] if close else "..."
    pairs = ", ".join(f"{key}: {name}" for key, name in guesses.items())
    options = " ".join(f"--column {key}={name}" for key, name in guesses.items())
    return [
        "Where the records have another name for it, write"
        f" `columns: {{{pairs}}}` in a recipe, or {options} on the command line"
    ]


def _is_needed(name: str) -> bool:
    return name in IMAGE_NAMES or any(name in form.keys for form in FORMS)


def _find_nearest_form(record: dict, named: Collection[str]) -> Form:
    """The form of whose keys the record has the most; keys that look alike count a little less."""
    names = [name for name in record if isinstance(name, str)]
    best, best_score = FORMS[0], 0.0
    if not _has_turns(record):  # so it is rather a question and an answer
        best = next(form for form in FORMS if form.name == "question and answer")
    for form in FORMS:
        scores = [1.0 if key in named else _score_key(record, names, key) for key in form.keys]
        score = sum(scores) / len(scores)
        if score > best_score and form.example:
            best, best_score = form, score
    return best


def _score_key(record: dict, names: list[str], key: str) -> float:
    if has_key(record, key):
        return 1.0
    return 0.9 if difflib.get_close_matches(key, names, n=1, cutoff=CLOSE) else 0.0


def _has_turns(record: dict) -> bool:
    """Whether a list of objects stands somewhere."""
    values: Iterable = record.values()
    return any(isinstance(value, list) and isinstance((value or [0])[0], dict) for value in values)


def _name_kind(value: Any) -> str:
    if is_cell(value):
        return "an image" if len(value) == 1 else f"{len(value)} images"
    if isinstance(value, list) and value:
        inner = KINDS.get(type(value[0]), "a value").split()[-1]
        return f"a list of {inner}s" if inner in ("text", "number", "object", "list") else "a list"
    if isinstance(value, dict) and value:
        return f"an object with {show_value(list(value))}"
    if isinstance(value, Image.Image):
        return "an image"
    return KINDS.get(type(value)) or type(value).__name__


def _show_example(form: Form) -> str:
    return json.dumps(form.example)
