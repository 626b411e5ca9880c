"""The texts of a record: which characters they may hold, and rows that came as columns."""

from __future__ import annotations

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


def list_rows(value: Any) -> Any:
    """Return a list of objects where it came as a text of JSON, or as an object of lists.

    Tables of text hold the first, and `datasets` the second. Any other value comes back as it is.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value, start=(1, 1))
        except UserError:
            return value
    if isinstance(value, dict) and value:
        columns = list(value.values())
        lengths = {len(column) if isinstance(column, list) else None for column in columns}
        if None not in lengths and len(lengths) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return value
