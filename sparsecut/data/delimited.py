"""CSV and TSV files: a header that names columns, then one record a row."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..schema import UserError
from .access import Access, check_excess
from .errors import show_value
from .json_text import parse_json
from .record_texts import find_suffix, open_text
from .texts import list_items

SUFFIXES = {".csv": ",", ".tsv": "\t"}  # and what stands between the cells
OTHER_DELIMITERS = (";", "\t", "|")  # of a .csv file, as spreadsheets of some countries write it
# Columns whose cells may hold lists, written as JSON.
STRUCTURED = ("image", "images", "file_name", "file_names", "conversations", "messages", "texts")
LISTS_OF_NAMES = ("image", "images", "file_name", "file_names")
SEPARATOR = re.compile(
    r"\"?sep=(.)\"?\s*"
)  # a first line that tells a spreadsheet what separates cells
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_delimited(path: Path, access: Access) -> Iterator[tuple[str, Any]]:
    """Yield where each row begins, and a function that returns its record.

    A cell without text is left out of the record, and a row without text is passed over.

    Raises:
        UserError: The header cannot be used, so that no record can be read.
    """
    with open_text(path) as file:
        if file.read(2) in UTF16_MARKS:
            raise UserError(f"{path} is UTF-16 text; save it as CSV in UTF-8")
        file.seek(0)
        lines = _Lines(file, access)
        limit = csv.field_size_limit()
        names, delimiter = _read_header(path, lines)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        while True:
            first = lines.number + 1
            lines.num_bytes = 0
            # Other code may count on the limit, and nothing of it runs between these two lines.
            csv.field_size_limit(max(access.max_bytes, limit))
            try:
                row: list | UserError = next(reader)
            except StopIteration:
                return
            except (csv.Error, UserError) as error:
                row = _explain(error, lines.number)
            finally:
                csv.field_size_limit(limit)
            if isinstance(row, UserError) or _has_text(names, row):
                yield f"{path} line {first}", partial(_parse_row, names, row)


class _Lines:
    """Lines of a file as text, one after another.

    Attributes:
        number: Lines that were read.
        num_bytes: Bytes of the lines since it was set to 0; more than allowed are refused.
    """

    def __init__(self, file, access: Access):
        self.file = file
        self.max_bytes = access.max_bytes
        self.number = 0
        self.num_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline(self.max_bytes + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.num_bytes += len(line)
        size = len(line)
        while size > self.max_bytes and not line.endswith(b"\n"):
            line = self.file.readline(self.max_bytes + 1)  # the rest of a line that is too long
            if not line:
                break
        check_excess("the row", self.num_bytes, self.max_bytes)
        # Bytes that are no text are told with their row, not with the file.
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def _read_header(path: Path, lines: _Lines) -> tuple[list[str], str]:
    """Names of the columns, and what stands between cells."""
    first = next(lines, "")
    suffix = find_suffix(path)
    delimiter = SUFFIXES.get(suffix, ",")
    separator = SEPARATOR.fullmatch(first)
    if separator is not None:
        delimiter, first = separator[1], next(lines, "")
    elif suffix == ".csv" and delimiter not in first:
        delimiter = max((delimiter, *OTHER_DELIMITERS), key=first.count)
    try:
        names = [
            name.strip() for name in next(csv.reader([first], delimiter=delimiter, strict=True), [])
        ]
        "".join(names).encode()
    except (csv.Error, UnicodeEncodeError):
        names = []
    named = list(filter(None, names))
    if not named or len(set(named)) < len(named):
        raise UserError(
            f"{path} begins with {show_value(first.rstrip())}, but its first line must name the"
            " columns, each by a name of its own, such as id,image,question,answer; add that line"
        )
    return names, delimiter


def _has_text(names: list[str], row: list[str]) -> bool:
    """Whether a cell of a named column has text; spreadsheets end with rows that have none."""
    if len(row) != len(names):
        return any(map(str.strip, row))
    return any(name and text.strip() for name, text in zip(names, row, strict=True))


def _explain(error: Exception, line: int) -> UserError:
    if isinstance(error, UserError):
        return error
    if "unexpected end" in str(error):
        return UserError("a quoted text of the row never ends; close it with a quotation mark")
    return UserError(
        f'the row cannot be read (line {line}: {error}); write "" for a quotation mark inside of a'
        " quoted text"
    )


def _parse_row(names: list[str], row: list[str] | UserError) -> dict:
    if isinstance(row, UserError):
        raise row
    if len(row) != len(names):
        raise UserError(
            f"the row has {len(row)} cells, but the header names {len(names)} columns"
            f" ({show_value(', '.join(names))}); put texts with delimiters in quotation marks"
        )
    record = {}
    for number, (name, text) in enumerate(zip(names, row, strict=True)):
        if name and text.strip():
            record[name] = _parse_cell(name, text)
        elif text.strip() and number > 0:  # pandas writes its row numbers into the first one
            raise UserError(
                f"column {number + 1} has no name in the header, but the row has"
                f" {show_value(text)} there; name the column, or remove it"
            )
    return record


def _parse_cell(name: str, text: str) -> Any:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the cell in column {name} is not UTF-8 text; save the file as CSV in UTF-8"
        ) from None
    if name not in STRUCTURED or not text.lstrip().startswith(("[", "{")):
        return text
    if name in LISTS_OF_NAMES and isinstance(items := list_items(text), list):
        return items
    try:
        return parse_json(text)
    except UserError as error:
        raise UserError(
            f"the cell in column {name} begins like JSON, but cannot be read: {error}"
        ) from None
