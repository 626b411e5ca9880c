"""JSON Lines files: one JSON value a line, in UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..schema import UserError, write_text_file
from .errors import RecordError
from .json_text import parse_json
from .record_texts import open_text


def iterate_lines(
    path: Path, *, skip_partial: bool = False, max_bytes: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not blank.

    Args:
        path: A JSON Lines file.
        skip_partial: Leave out a last line without a line end, as an interrupted write leaves it.
        max_bytes: A longer line is not held in memory: it comes cut to one byte more.
    """
    size = -1 if max_bytes is None else max_bytes + 1
    number = 0
    with open_text(path) as file:
        while line := file.readline(size):
            number += 1
            is_partial = skip_partial and not line.endswith(b"\n")
            if line.strip() and not is_partial:
                yield number, line
            while len(line) == size and not line.endswith(b"\n"):
                line = file.readline(size)  # the rest of a line that is too long


def parse_line(line: bytes, *, strict: bool = False):
    """Return the JSON value of a line; UserError says where the line is malformed.

    Args:
        line: The line.
        strict: Refuse what is no JSON although Python reads it (`parse_json`). Our own files hold
            NaN where a number is not known.
    """
    try:
        text = line.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} of the line is not UTF-8 text") from None
    return parse_json(text, strict=strict)


def read_json_lines(path: Path, *, skip_partial: bool = False) -> list:
    """Return the values of a JSON Lines file.

    Args:
        path: The file.
        skip_partial: Leave out a last line without a line end, as an interrupted write leaves it.

    Raises:
        RecordError: A line is malformed.
    """
    values = []
    for number, line in iterate_lines(path, skip_partial=skip_partial):
        try:
            values.append(parse_line(line))
        except UserError as error:
            raise RecordError(f"{path} line {number}", str(error)) from None
    return values


def write_json_lines(path: Path, values: Iterable) -> Path:
    """Replace a file by one with a line for each value, and return its path.

    The file changes at once: an interruption leaves the old file or the new one.
    """
    return write_text_file(path, _format_lines(values))


def append_json_lines(path: Path, values: Iterable) -> None:
    """Add a line for each value to the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_format_lines(values))


def _format_lines(values: Iterable) -> str:
    text = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
    # Half a surrogate pair, which no file can hold, becomes what JSON writes for it.
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
