"""JSON Lines files: one JSON value a line, in UTF-8."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..schema import UserError, write_text_file
from .errors import RecordError


def iterate_lines(path: Path, *, skip_partial: bool = False) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of every line that is not blank.

    Args:
        path: A JSON Lines file.
        skip_partial: Leave out a last line without a line end, as an interrupted write leaves it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            is_partial = skip_partial and not line.endswith(b"\n")
            if line.strip() and not is_partial:
                yield number, line


def parse_line(line: bytes):
    """Return the JSON value of a line; UserError says where the line is malformed."""
    try:
        return json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"byte {error.start + 1} of the line is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(f"malformed JSON at column {error.colno}, {error.msg}") from None


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
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
