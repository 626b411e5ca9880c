"""Questions with choices: these are written under the question, and a letter is learned.

The prompt is that of LLaVA's multiple-choice data: hint, question, "A. ..." for each choice, and
the request for a letter.
"""

from __future__ import annotations

import string
from typing import Any

from ..schema import UserError
from .errors import show_value
from .texts import list_items, list_rows

LETTERS = string.ascii_uppercase
CHOICE_KEYS = ("choices", "options")
INSTRUCTION = "Answer with the option's letter from the given choices directly."


def ask_with_choices(record: dict, question: str, answer: Any, key: str) -> tuple[str, Any]:
    """Return what is asked and answered, with the record's choices where it has any.

    Where the answer is a choice's text, or a text of its own, both come back as they are.

    Args:
        record: The record; `choices` or `options` is a list, or columns A, B, ... hold them.
        question: Its question.
        answer: Its answer: a choice's number from 0, its letter or its text.
        key: Where the answer stands, for errors.

    Raises:
        UserError: It is not known which choice is meant, or there is none such.
    """
    where, choices = _list_choices(record)
    if isinstance(answer, list | dict | bool):
        return question, answer
    if not choices:
        _refuse_unread(record, answer, key)
        return question, answer
    number = _find_number(choices, answer, where, key)
    if number is None:
        return question, answer
    hint = record.get("hint")
    lines = [str(hint)] if hint is not None and str(hint).strip() else []
    lines.append(question)
    for letter, choice in zip(LETTERS, choices, strict=False):
        lines.append(f"{letter}. {choice}")
    return "\n".join([*lines, INSTRUCTION]), LETTERS[number]


def _list_choices(record: dict) -> tuple[str, list[str]]:
    """The key of the choices and their texts, none where the record has no choices."""
    for key in CHOICE_KEYS:
        value = list_rows(list_items(record.get(key)))
        if isinstance(value, list) and value:
            texts = [_read_choice(choice, key) for choice in value]
            if len(texts) > len(LETTERS):
                raise UserError(f"`{key}` holds {len(texts)} choices, but letters end at 26")
            return key, texts
    texts = []
    for letter in LETTERS:
        if record.get(letter) is None:
            break
        texts.append(_read_choice(record[letter], letter))
    return "A, B, ...", texts if len(texts) > 1 else []


def _refuse_unread(record: dict, answer: Any, key: str) -> None:
    """Raise UserError where an answer stands for a choice, and the choices are no list."""
    for name in CHOICE_KEYS:
        value = record.get(name)
        is_text = isinstance(value, str) and not isinstance(list_items(value), list)
        if is_text and value.strip() and (_is_number(str(answer)) or _is_letter(str(answer))):
            raise UserError(
                f"`{key}` is {answer!r} and `{name}` holds {show_value(value)}, but a list of"
                " choices is needed; write one, or the chosen text as the answer"
            )


def _is_number(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal()


def _is_letter(text: str) -> bool:
    return len(text.strip()) == 1 and text.strip() in LETTERS


def _read_choice(choice: Any, key: str) -> str:
    if isinstance(choice, dict):  # with the label that it has, as ARC writes it
        choice = choice.get("text")
    if isinstance(choice, bool) or not isinstance(choice, str | int | float):
        raise UserError(f"`{key}` holds {show_value(choice)}, but a choice is a text")
    return str(choice)


def _find_number(choices: list[str], answer: Any, where: str, key: str) -> int | None:
    """The number of the choice that an answer stands for, None where it is a text."""
    text = str(answer).strip()
    is_number, is_letter = _is_number(text), _is_letter(text)
    named = choices.index(text) if text in choices else None
    counted = None
    if is_number or is_letter:
        counted = int(text) if is_number else LETTERS.index(text)
        counted = counted if 0 <= counted < len(choices) else None
    if named is not None:
        if counted not in (None, named):
            raise UserError(
                f"`{key}` is {answer!r}, which is one of `{where}` and stands for another"
                f" ({choices[counted]!r}) by its place; write the letter of the one that is meant,"
                " or remove these"
            )
        return None
    if counted is None and (is_number or is_letter):
        raise UserError(
            f"`{key}` is {answer!r}, but `{where}` has {len(choices)} choices; give one's number"
            f" (from 0), its letter or its text. Splits for tests often have no answers"
        )
    return counted
