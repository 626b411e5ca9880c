"""JSON of records, read strictly, and lists of records read element by element.

A broken element is an error in its place, and the elements after it are still read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ..schema import UserError
from .access import check_excess, describe_excess
from .record_texts import open_text

CHUNK = 2**20  # characters that are read at once
SPACE = re.compile(r"[ \t\r\n]*")
NO_UTF8 = re.compile("[\udc80-\udcff]")  # what stands for a byte that is not UTF-8
OUTSIDE_STRINGS = re.compile(r'["{}\[\],]')
FIRST_KEY = re.compile(r'\{\s*"[^"\\\n]{1,80}"')
INSIDE_STRINGS = re.compile(r'"|\\.?', re.DOTALL)


def parse_json(text: str, *, strict: bool = True, start: tuple[int, int] | None = None) -> Any:
    """Return the value of a JSON text.

    Args:
        text: The text.
        strict: Refuse keys that are written twice, and NaN and Infinity, which are no JSON.
        start: Line and column where the text begins in its file; errors then name a line.

    Raises:
        UserError: The text is malformed, nested too deeply, or has a number of too many digits.
    """
    decoder = STRICT if strict else LENIENT
    try:
        return decoder.decode(text)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"malformed JSON at {_name_place(error, start)}, {error.msg}") from None
    except RecursionError:
        raise UserError("the JSON is nested too deeply; flatten it or remove the record") from None
    except ValueError:  # Python converts no more than some 4,300 digits
        raise UserError("the JSON holds a number of too many digits; shorten it") from None


def _name_place(error: json.JSONDecodeError, start: tuple[int, int] | None) -> str:
    if start is None:
        return f"column {error.colno}"
    line, column = start
    is_first = error.lineno == 1
    return f"line {line + error.lineno - 1} column {error.colno + (column - 1 if is_first else 0)}"


def _build_object(pairs: list[tuple[str, Any]]) -> dict:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"the key {twice[:40]!r} is written twice in one object; keep one of them")
    return values


def _refuse_constant(name: str) -> None:
    raise UserError(f"{name} is not JSON; write a number or null in its place")


STRICT = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=_refuse_constant)
LENIENT = json.JSONDecoder()


def iterate_elements(path: Path, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Yield the line and the value of each element of a list in a file.

    The value of a broken element is a UserError.

    Args:
        path: The file, in UTF-8.
        max_bytes: An element that takes more is broken; no more of it is kept in memory.

    Raises:
        UserError: The file does not hold a list, or ends before the list does.
    """
    packed = open_text(path)
    with io.TextIOWrapper(packed, "utf-8-sig", errors="surrogateescape", newline="") as file:
        text = _OpenText(path, file)
        _begin_list(text)
        has_next = text.find_next() != "]"
        while has_next:
            text.find_next()
            line = text.line
            yield line, _read_element(text, max_bytes)
            has_next = text.find_next() != "]"
            following = text.find_next()
            if not following:
                _raise_no_end(text)
            if following == ",":
                text.move_to(text.place + 1)
            elif has_next:
                line = text.line
                yield line, UserError(f"line {line}: no comma stands before this record; add it")
        text.move_to(text.place + 1)
        if text.find_next():
            raise UserError(
                f"{path} line {text.line}: the list ends before this line, but more text follows;"
                " correct the brackets"
            )


class _OpenText:
    """A text file, of which a part is in memory.

    Attributes:
        path: The file's path.
        part: The part in memory.
        place: In that part, the first character that was not passed over.
        line: The line of that character.
        column: Its column, from 1.
        indent: What stands before it on its line; None where that is more than white space.
    """

    def __init__(self, path: Path, file: TextIO):
        self.path = path
        self.file = file
        self.part = ""
        self.place = 0
        self.line = 1
        self.column = 1
        self.indent: str | None = ""

    def read_more(self) -> bool:
        """Append more of the file, as much as is in memory; return False at its end."""
        kept = self.part[self.place :]
        more = self.file.read(max(CHUNK, len(kept)))
        self.part, self.place = kept + more, 0
        return bool(more)

    def move_to(self, place: int) -> None:
        """Pass over everything before a place."""
        newline = self.part.rfind("\n", self.place, place)
        if newline >= 0:
            self.column, self.indent = 1, ""
        before = self.part[max(newline + 1, self.place) : place]
        self.column += len(before)
        is_blank = self.indent is not None and not before.strip()
        self.indent = self.indent + before if is_blank else None
        self.line += self.part.count("\n", self.place, place)
        self.place = place

    def find_next(self) -> str:
        """Move to the next character that is no white space and return it, "" for none."""
        while True:
            self.move_to(SPACE.match(self.part, self.place).end())
            if self.place < len(self.part):
                return self.part[self.place]
            if not self.read_more():
                return ""


def _begin_list(text: _OpenText) -> None:
    first = text.find_next()
    if first == "[":
        text.move_to(text.place + 1)
        return
    path = text.path
    if not first:
        raise UserError(f"{path} is empty, but a list of records is needed; give another file")
    if NO_UTF8.match(first):
        raise UserError(f"{path} is not UTF-8 text: line {text.line}; save it as UTF-8")
    key = FIRST_KEY.match(text.part, text.place)
    shown = f" ({key[0]}: ...)" if key else ""
    kind = f"an object{shown}" if first == "{" else f"{first!r}"
    raise UserError(
        f"{path} line {text.line}: the file begins with {kind}, but a list of records is needed;"
        " put [ ] around the records, or write one record a line; of an object with a list of"
        " records, keep that list alone"
    )


def _read_element(text: _OpenText, max_bytes: int) -> Any:
    """The element at a text's place, or a UserError; the text moves behind it."""
    good = _read_good_element(text)
    if good is not None:
        value, end = good
    else:
        scanner = _ElementScanner()
        end = _find_end(text, scanner, max_bytes)
        if end is None:
            return _pass_over(text, scanner, max_bytes)
        value = None
    element, start = text.part[text.place : end], (text.line, text.column)
    text.move_to(end)
    try:
        check_excess(f"the record that begins in line {start[0]}", len(element), max_bytes)
        if not element.isascii():
            _check_encoding(element, start[0])
        return value if good is not None else parse_json(element.rstrip(), start=start)
    except UserError as error:
        return error


def _read_good_element(text: _OpenText) -> tuple[Any, int] | None:
    """A well-formed element that is in memory as a whole, and its end."""
    try:
        value, end = STRICT.raw_decode(text.part, text.place)
    except (ValueError, RecursionError):  # it may also go on where the part in memory ends
        return None
    return (value, end) if end < len(text.part) else None  # a number might go on


def _check_encoding(element: str, first_line: int) -> None:
    match = NO_UTF8.search(element)
    if match:
        line = first_line + element.count("\n", 0, match.start())
        byte = ord(match[0]) - 0xDC00
        raise UserError(f"line {line} is not UTF-8 text (byte 0x{byte:02x}); save it as UTF-8")


def _find_end(text: _OpenText, scanner: _ElementScanner, max_bytes: int) -> int | None:
    """The end of an element, which may be malformed, in a text that is read as far as needed.

    None where the element takes more than `max_bytes`. Where brackets or quotes do not match, the
    element ends before what begins as it does.

    Raises:
        UserError: The file ends before the element.
    """
    scanned = 0  # characters of the element
    while True:
        end = scanner.find_end(text.part, text.place + scanned)
        if end is not None and scanner.is_clean:
            return end
        scanned = len(text.part) - text.place
        if end is not None or scanned > max_bytes or not text.read_more():
            break
    similar = _find_similar_start(text, end)
    if similar is not None:
        return _strip_comma(text, similar)
    if end is None and scanned <= max_bytes:
        _raise_no_end(text)
    return end


def _find_similar_start(text: _OpenText, end: int | None) -> int | None:
    """Where the next element seems to begin: as this one does on a line, or with its first key."""
    starts = []
    first_key = FIRST_KEY.match(text.part, text.place)
    if first_key:
        starts.append(r",\s*" + re.escape(first_key[0]))
    if text.indent is not None:
        starts.append(rf"\n{re.escape(text.indent)}\{{")
    if not starts:
        return None
    found = re.compile("|".join(starts)).search(text.part, text.place + 1, end or len(text.part))
    return found.start() if found else None


def _strip_comma(text: _OpenText, end: int) -> int:
    """The end of an element without the comma that may follow."""
    before = text.part[text.place : end].rstrip()
    return text.place + len(before.removesuffix(","))


def _raise_no_end(text: _OpenText) -> None:
    raise UserError(
        f"{text.path} line {text.line}: the record that begins here, or the list, has no end;"
        " correct its quotes and brackets, or get the whole file"
    )


def _pass_over(text: _OpenText, scanner: _ElementScanner, max_bytes: int) -> UserError:
    """Move behind an element that takes too much, without keeping it; return its error."""
    line = text.line
    while True:
        text.move_to(len(text.part))
        if not text.read_more():
            raise UserError(
                f"{text.path} line {line}: the record that begins here takes more than"
                f" {max_bytes / 2**20:g} MiB and has no end; correct its quotes and brackets"
            )
        end = scanner.find_end(text.part, text.place)
        if end is not None:
            text.move_to(end)
            return describe_excess(f"the record that begins in line {line}", max_bytes)


class _ElementScanner:
    """Finds where an element of a list ends that may be malformed; it gets the text in parts.

    Attributes:
        is_clean: Whether every bracket matched so far.
    """

    def __init__(self):
        self.is_clean = True
        self._open: list[str] = []
        self._num_open = {"{": 0, "[": 0}
        self._in_string = False
        self._is_escaped = False

    def find_end(self, part: str, place: int) -> int | None:
        """Return the end of the element in a part of the text, None where it goes on."""
        if self._is_escaped:
            place += 1
            self._is_escaped = False
        while True:
            pattern = INSIDE_STRINGS if self._in_string else OUTSIDE_STRINGS
            match = pattern.search(part, place)
            if match is None:
                return None
            place = match.end()
            if self._in_string:
                self._leave_string(match[0])
            elif self._passes_end(match[0]):
                return place if self._closed else match.start()

    def _leave_string(self, found: str) -> None:
        self._in_string = found != '"'
        self._is_escaped = found == "\\"  # the part ends between a backslash and what follows

    def _passes_end(self, found: str) -> bool:
        """Take a bracket, comma or quote; return whether the element ends with or before it."""
        self._closed = False
        if found == '"':
            self._in_string = True
        elif found in "{[":
            self._open.append(found)
            self._num_open[found] += 1
        elif found == ",":
            return not self._open
        else:
            return self._close("{" if found == "}" else "[")
        return False

    def _close(self, opening: str) -> bool:
        if not self._num_open[opening]:
            self.is_clean = self.is_clean and not self._open
            return opening == "["  # the end of the list that holds the element
        last = ""
        while last != opening:
            self.is_clean = self.is_clean and last == ""
            last = self._open.pop()
            self._num_open[last] -= 1
        self._closed = not self._open
        return self._closed
