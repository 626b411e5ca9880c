"""Files of records, of every kind that is read.

These are JSON, JSON Lines, Parquet, Arrow, folders of `datasets`, and WebDataset archives.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..schema import UserError
from .images import ImageStore, decode_image
from .jsonl import iterate_lines, parse_line

# Members of a WebDataset archive that are images.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_FILES = 1_000_000  # that one pattern may name
TYPE_NAMES = {dict: "an object", list: "a list", str: "a text"}

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
        is_known_file = file.is_file() and file.suffix in READERS
        is_saved_dataset = (file / "dataset_info.json").is_file()
        if not is_known_file and not is_saved_dataset:
            raise UserError(
                f"{file} is not a file of records; give an existing file that ends in"
                f" {', '.join(READERS)}, a pattern of such, or a folder that datasets' save_to_disk"
                " has written"
            )
    return files


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
            f"{path} names {number_of_files:,} files, but at most {MOST_FILES:,} can be; correct the"
            " numbers"
        )
    paths = []
    for number in range(int(first), int(last) + 1):
        text = str(number).zfill(len(first))
        paths += _expand_ranges(path[: match.start()] + text + path[match.end() :])
    return paths


def read_records(path: Path, *, images_by_name: bool = False) -> Iterator[Placed]:
    """Yield where a record stands, and the record, for every record of a file in order.

    A record may be a function that reads it.

    Args:
        path: The file.
        images_by_name: Images that lie in the file come as names for `open_image_store`, and are
            read when they are needed. Otherwise they come as bytes.
    """
    if path.suffix == ".tar":
        return _read_tar(path, images_by_name)
    if images_by_name:
        table = _open_image_table(path)
        if table is not None:
            return _read_image_table(path, table)
    reader = READERS.get(path.suffix, _read_arrow)
    return reader(path)


def open_image_store(path: Path) -> ImageStore | TableImages:
    """Return where the images lie whose names `read_records` gave: in the file, or its folder."""
    if path.suffix == ".tar":
        return ImageStore(path)
    table = _open_image_table(path)
    return ImageStore(path.parent) if table is None else TableImages(path, table)


class TableImages:
    """Images in the cells of a table, which stays on disk; their names are "row/number"."""

    def __init__(self, path: Path, table):
        self.path = path
        self.table = table

    def __reduce__(self):
        return open_image_store, (self.path,)  # another process maps the file again

    def __contains__(self, name: str) -> bool:
        row, _, _ = name.partition("/")
        return int(row) < len(self.table)

    def describe_missing(self, name: str) -> str:
        """Return the message of an error about an image that is not here."""
        return f"there is no image {name} in {self.path}"

    def load(self, name: str) -> Image.Image:
        """Return an image in RGB; UserError where it is broken."""
        row, number = map(int, name.split("/"))
        cell = self.table.with_format("arrow")[row].column("image")[0].as_py()
        images = cell if isinstance(cell, list) else [cell]
        image = images[number]
        if image.get("bytes"):
            return decode_image(image["bytes"], f"the image {name} in {self.path}")
        return ImageStore(self.path.parent).load(image["path"])


def _open_image_table(path: Path):
    """A memory-mapped table of a file that holds images itself, None for any other file."""
    import datasets

    if path.is_dir() or path.suffix == ".arrow":
        table = _open_arrow(path)
    elif path.suffix == ".parquet" and _has_images(_read_schema(path)):
        table = datasets.Dataset.from_parquet(str(path))
    else:
        return None
    return table if _has_images(table.with_format("arrow").data.schema) else None


def _read_schema(path: Path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _has_images(schema) -> bool:
    import pyarrow

    if "image" not in schema.names:
        return False
    kind = schema.field("image").type
    return pyarrow.types.is_struct(getattr(kind, "value_type", kind))


def _read_image_table(path: Path, table) -> Iterator[Placed]:
    other_columns = [name for name in table.column_names if name != "image"]
    number = 0
    for batch in table.with_format("arrow").iter(batch_size=1000):
        records = batch.select(other_columns).to_pylist()
        for record, cell in zip(records, batch.column("image"), strict=True):
            names = [f"{number}/{i}" for i in range(_count_images(cell))]
            yield f"{path} record {number}", {**record, "image": names or None}
            number += 1


def _count_images(cell) -> int:
    from pyarrow import ListScalar

    if not cell.is_valid:
        return 0
    return len(cell) if isinstance(cell, ListScalar) else 1


def _read_arrow(path: Path) -> Iterator[Placed]:
    table = _open_arrow(path)
    return _number_records(path, table.with_format("arrow").iter(batch_size=1000))


def _open_arrow(path: Path):
    """A memory-mapped table of an Arrow file, or of a folder that `save_to_disk` has written."""
    import datasets
    import pyarrow

    open_table = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_file
    try:
        table = open_table(str(path))
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as records of `datasets` ({type(error).__name__}: {error}); save"
            " it again"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise UserError(
            f"{path} holds several splits ({', '.join(table)}); give one of its folders"
        )
    return table


def _read_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None
    return _number_records(path, file.iter_batches())


def _number_records(path: Path, batches: Iterable) -> Iterator[Placed]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            yield f"{path} record {number}", record
            number += 1


def _read_tar(path: Path, images_by_name: bool) -> Iterator[Placed]:
    """Samples of a WebDataset archive.

    A sample is KEY.json and the images whose names begin with the same key. They follow one
    another in the archive.
    """
    key = None
    members = []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                member_key = _get_sample_key(member.name)
                if member_key != key and members:
                    yield _make_sample(path, key, members)
                    members = []
                key = member_key
                is_needed = member.name.endswith(".json") or not images_by_name
                content = archive.extractfile(member).read() if is_needed else None
                members.append((member.name, content))
            if members:
                yield _make_sample(path, key, members)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a tar archive ({error}); give an intact one"
        ) from None


def _get_sample_key(member_name: str) -> str:
    folder, _, name = member_name.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _make_sample(path: Path, key: str, members: list[tuple[str, bytes | None]]) -> Placed:
    place = f"{path} sample {key.lstrip('/')}"
    return place, partial(_parse_sample, members)


def _parse_sample(members: list[tuple[str, bytes | None]]) -> dict:
    """The record of a sample's members, each a name and its content or None."""
    names = [name for name, _ in members]
    texts = [content for name, content in members if name.endswith(".json")]
    if len(texts) != 1:
        raise UserError(f"the sample has {len(texts)} .json files among {names}, but needs one")
    try:
        record = json.loads(texts[0])
    except ValueError as error:  # malformed JSON, or no UTF-8 text
        raise UserError(f"the .json of the sample is malformed: {error}") from None
    if isinstance(record, list):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise UserError("the .json of a sample holds a record, or the list of its turns")
    images = []
    for name, content in members:
        if name.lower().endswith(IMAGE_SUFFIXES):
            images.append(name if content is None else content)
    sample_id = names[0].partition(".")[0]
    return {"id": sample_id, **record, "image": images or None}


def _read_json(path: Path) -> Iterator[Placed]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} column {error.colno}: malformed JSON, {error.msg}"
        ) from None
    if not isinstance(records, list):
        raise UserError(
            f"{path} holds {name_type(records)}, but a list of records is needed; a file with one"
            " record a line ends in .jsonl"
        )
    for i, record in enumerate(records):
        yield f"{path} record {i}", record


def _read_json_lines(path: Path) -> Iterator[Placed]:
    for number, line in iterate_lines(path):
        yield f"{path} line {number}", partial(parse_line, line)


READERS: dict[str, Callable[[Path], Iterator[Placed]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".tar": partial(_read_tar, images_by_name=False),
}


def name_type(value: Any) -> str:
    """Return what a value is, for messages."""
    return TYPE_NAMES.get(type(value), repr(value))
