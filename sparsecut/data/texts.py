"""The texts of a record: which characters they may hold, and rows that came as columns."""

from __future__ import annotations

import ast
from typing import Any

from ..schema import UserError
from .json_text import parse_json


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


LONGEST_LITERAL = 100_000  # characters of a list as Python prints it


def list_items(value: Any) -> Any:
    """Return a list where it came as a text, of JSON or as Python prints it.

    Tables of text hold such texts. Any other value comes back as it is.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value, start=(1, 1))
    except UserError:
        pass
    try:
        items = ast.literal_eval(value.strip()) if len(value) <= LONGEST_LITERAL else None
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
    return items if isinstance(items, list) else value


def list_rows(value: Any) -> Any:
    """Return a list of objects where it came as a text, or as an object of lists.

    Tables of text hold the first, and `datasets` the second. Any other value comes back as it is:
    a text such as "[1, 2]" is a text.
    """
    if isinstance(value, str):
        items = list_items(value)
        is_rows = isinstance(items, list) and all(isinstance(item, dict) for item in items)
        value = items if is_rows else value
    if isinstance(value, dict) and value:
        columns = list(value.values())
        lengths = {len(column) if isinstance(column, list) else None for column in columns}
        if None not in lengths and len(lengths) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value
