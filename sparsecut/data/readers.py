"""Files of records, of every kind that is read.

These are JSON, JSON Lines, CSV, Parquet, Arrow, folders of `datasets`, and WebDataset archives.
"""

from __future__ import annotations

import codecs
import glob
import re
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..config.source import FILE_ENDINGS
from ..schema import UserError
from . import delimited
from .access import DEFAULT_ACCESS, Access, check_excess, check_no_pointer
from .images import ImageStore
from .json_text import iterate_elements
from .jsonl import iterate_lines, parse_line
from .record_texts import find_suffix, open_text
from .tables import TableImages, open_image_table, read_image_table, read_table
from .webdataset import read_samples

SHOWN_SUFFIXES = ".json, .jsonl, .csv, .tsv (also with .gz), .parquet, .arrow, .tar"
PACKED = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
FEW_BYTES = 64  # that show how a file begins
MOST_FILES = 1_000_000  # that one pattern may name

# Where a record stands, and the record or a function that reads it.
Placed = tuple[str, Any]


def find_files(path: str | Path) -> list[Path]:
    """Return the files that a path or a pattern names, in order.

    Args:
        path: A path, or a pattern such as data/part-*.parquet or data/{000..010}.tar.

    Raises:
        UserError: A file is missing, or of no known kind.
    """
    files = []
    for pattern in _expand_ranges(str(path)):
        names = sorted(glob.glob(pattern)) or [pattern]
        files += [Path(name) for name in names]
    for file in files:
        if not _holds_records(file):
            is_packed = file.suffix.lower() in PACKED and file.is_file()
            raise UserError(
                f"{file} is not a file of records; {'unpack it, and ' if is_packed else ''}give an"
                f" existing file that ends in {SHOWN_SUFFIXES}, a pattern of such, or a folder that"
                " datasets' save_to_disk has written"
            )
    return files


def holds_records(file: Path) -> bool:
    """Whether a file's name says that it holds records."""
    return file.name.lower().endswith(FILE_ENDINGS)


def _holds_records(file: Path) -> bool:
    try:
        is_saved_dataset = (file / "dataset_info.json").is_file()
        return is_saved_dataset or (file.is_file() and holds_records(file))
    except (OSError, ValueError):  # no file can have such a name
        return False


def _expand_ranges(path: str) -> list[str]:
    """A path for each number where there is {000..010} in it, written with as many digits."""
    match = RANGE.search(path)
    if match is None:
        return [path]
    first, last = match.groups()
    if int(last) < int(first):
        raise UserError(
            f"{path} counts from {first} down to {last}; write the smaller number first"
        )
    number_of_files = int(last) - int(first) + 1
    if number_of_files > MOST_FILES:
        raise UserError(
            f"{path} names {number_of_files:,} files, but at most {MOST_FILES:,} can be; correct"
            " the numbers"
        )
    paths = []
    for number in range(int(first), int(last) + 1):
        text = str(number).zfill(len(first))
        paths += _expand_ranges(path[: match.start()] + text + path[match.end() :])
        if len(paths) > MOST_FILES:
            raise UserError(f"{path} names more than {MOST_FILES:,} files; correct the numbers")
    return paths


def read_records(
    path: Path, *, images_by_name: bool = False, access: Access = DEFAULT_ACCESS
) -> Iterator[Placed]:
    """Yield where a record stands, and the record, for every record of a file in order.

    A record may be a function that reads it, and raises UserError where it is broken.

    Args:
        path: The file.
        images_by_name: Images that lie in the file come as names for `open_image_store`, and are
            read when they are needed. Otherwise they come as bytes.
        access: What records may reach.

    Raises:
        UserError: The file is broken, so that its records cannot be told apart.
    """
    try:
        _check_contents(path)
        yield from _choose_reader(path, images_by_name, access)
    except (OSError, EOFError, zlib.error) as error:  # the last two of a damaged .gz
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); give an intact file") from None


def _check_contents(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            check_no_pointer(str(path), file.read(100))


def _choose_reader(path: Path, images_by_name: bool, access: Access) -> Iterator[Placed]:
    suffix = find_suffix(path)
    if suffix == ".tar":
        return read_samples(path, images_by_name, access)
    if suffix == ".json":
        return _read_json(path, access)
    if suffix in (".jsonl", ".ndjson"):
        return _read_json_lines(path, access)
    if suffix in delimited.SUFFIXES:
        return delimited.read_delimited(path, access)
    table = open_image_table(path, access) if images_by_name else None
    return read_table(path, access) if table is None else read_image_table(path, table, access)


def open_image_store(path: Path, access: Access = DEFAULT_ACCESS) -> ImageStore | TableImages:
    """Return where the images lie whose names `read_records` gave: in the file, or its folder."""
    _check_contents(path)
    if path.suffix.lower() == ".tar":
        return ImageStore(path, access)
    table = open_image_table(path, access)
    return ImageStore(path.parent, access) if table is None else TableImages(path, table, access)


def _read_json(path: Path, access: Access) -> Iterator[Placed]:
    if _holds_lines(path, access):
        yield from _read_json_lines(path, access)
        return
    for number, (_, value) in enumerate(iterate_elements(path, access.max_bytes)):
        is_broken = isinstance(value, UserError)
        yield f"{path} record {number}", partial(_raise, value) if is_broken else value


def _holds_lines(path: Path, access: Access) -> bool:
    """Whether a .json file has an object on each line, as `datasets` and pandas write them."""
    with open_text(path) as file:
        if not file.read(FEW_BYTES).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return False
    lines = [line for _, line in islice(iterate_lines(path, max_bytes=access.max_bytes), 2)]
    are_objects = all(line.strip().endswith(b"}") for line in lines)
    return len(lines) == 2 and are_objects and lines[1].lstrip().startswith(b"{")


def _raise(error: UserError) -> None:
    raise error


def _read_json_lines(path: Path, access: Access) -> Iterator[Placed]:
    for number, line in iterate_lines(path, max_bytes=access.max_bytes):
        yield f"{path} line {number}", partial(_parse_line, line, access.max_bytes)


def _parse_line(line: bytes, max_bytes: int) -> Any:
    check_excess("the line", len(line), max_bytes)
    return parse_line(line, strict=True)
