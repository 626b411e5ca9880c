"""Files of records, of every kind that is read: JSON, JSON Lines, Parquet, Arrow, folders of
`datasets`, WebDataset archives.
"""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from ..schema import UserError
from .images import Pictures, open_bytes
from .jsonl import iterate_lines, parse_line

PICTURES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
)  # members of a WebDataset archive that are pictures


def files_of(path: str | Path) -> list[Path]:
    """The files that a path or a pattern (data/part-*.parquet, data/{000..010}.tar) names, in
    order.

    ValueError where one of them is missing, or of no known kind.
    """
    found = [Path(name) for one in _numbered(str(path)) for name in sorted(glob.glob(one)) or [one]]
    for file in found:
        if (
            not (file.is_file() and file.suffix in READERS)
            and not (file / "dataset_info.json").is_file()
        ):
            raise UserError(
                f"{file} is not a file of records; give an existing file that ends in"
                f" {', '.join(READERS)}, a pattern of such, or a folder that datasets' save_to_disk"
                " has written"
            )
    return found


def _numbered(path: str) -> list[str]:
    """A path for each number where there is {000..010} in it, written with as many digits."""
    span = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if span is None:
        return [path]
    first, last = span.groups()
    if int(last) < int(first):
        raise UserError(
            f"{path} counts from {first} down to {last}; write the smaller number first"
        )
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [
        more for i in numbers for more in _numbered(path[: span.start()] + i + path[span.end() :])
    ]


def read_records(path: Path, *, kept: bool = False) -> Iterator[tuple[str, object]]:
    """(where it stands, record) of every record of a file, in order; a record may be a function
    that reads it.

    kept: pictures that lie in the file come as names for `store_of`, to be opened when they are
    needed; otherwise as bytes.
    """
    if path.suffix == ".tar":
        return _tar(path, kept)
    if kept and (table := _table(path)) is not None:
        return _rows(path, table)
    return READERS[path.suffix](path) if path.suffix in READERS else _arrow(path)


def store_of(path: Path):
    """Where the pictures of a file lie whose records came `kept`: in the file, or in its folder."""
    if path.suffix == ".tar":
        return Pictures(path)
    table = _table(path)
    return Pictures(path.parent) if table is None else Cells(path, table)


class Cells:
    """Pictures that stand in the cells of a table, which stays on disk; named "row/number"."""

    def __init__(self, path: Path, table):
        self.path, self.table = path, table

    def __reduce__(self):
        return store_of, (self.path,)  # another process maps the file again

    def __contains__(self, name: str) -> bool:
        return int(name.partition("/")[0]) < len(self.table)

    def open(self, name: str) -> Image.Image:
        """A picture in RGB; ValueError where it is broken."""
        row, number = map(int, name.split("/"))
        cell = self.table.with_format("arrow")[row].column("image")[0].as_py()
        picture = (cell if isinstance(cell, list) else [cell])[number]
        if picture.get("bytes"):
            return open_bytes(picture["bytes"])
        return Pictures(self.path.parent).open(picture["path"])


def _table(path: Path):
    """A memory-mapped table of a file that holds pictures itself, None for any other."""
    import datasets

    if path.is_dir():
        table = datasets.load_from_disk(str(path))
    elif path.suffix == ".arrow":
        table = datasets.Dataset.from_file(str(path))
    elif path.suffix == ".parquet" and _holds_pictures(_schema(path)):
        table = datasets.Dataset.from_parquet(str(path))
    else:
        return None
    return table if _holds_pictures(table.with_format("arrow").data.schema) else None


def _schema(path: Path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_schema(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None


def _holds_pictures(schema) -> bool:
    import pyarrow

    if "image" not in schema.names:
        return False
    kind = schema.field("image").type
    return pyarrow.types.is_struct(getattr(kind, "value_type", kind))


def _rows(path: Path, table) -> Iterator[tuple[str, dict]]:
    from pyarrow import ListScalar

    texts = [name for name in table.column_names if name != "image"]
    number = 0
    for batch in table.with_format("arrow").iter(batch_size=1000):
        cells = batch.column("image")
        for record, cell in zip(batch.select(texts).to_pylist(), cells, strict=True):
            many = (len(cell) if isinstance(cell, ListScalar) else 1) if cell.is_valid else 0
            yield (
                f"{path} record {number}",
                {
                    **record,
                    "image": [f"{number}/{i}" for i in range(many)] or None,
                },
            )
            number += 1


def _arrow(path: Path) -> Iterator[tuple[str, dict]]:
    import datasets

    table = (
        datasets.load_from_disk(str(path))
        if path.is_dir()
        else datasets.Dataset.from_file(str(path))
    )
    number = 0
    for batch in table.with_format("arrow").iter(batch_size=1000):
        for record in batch.to_pylist():
            yield f"{path} record {number}", record
            number += 1


def _tar(path: Path, kept: bool) -> Iterator[tuple[str, object]]:
    """Samples of a WebDataset archive: KEY.json, and the pictures whose names begin with the same
    key, which follow one another.
    """
    key, members = None, []
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                own = f"{folder}/{name.partition('.')[0]}"
                if own != key and members:
                    yield f"{path} sample {key.lstrip('/')}", _sample(members)
                    members = []
                key = own
                text = member.name.endswith(".json")
                members.append(
                    (member.name, archive.extractfile(member).read() if text or not kept else None)
                )
            if members:
                yield f"{path} sample {key.lstrip('/')}", _sample(members)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as a tar archive ({error}); give an intact one"
        ) from None


def _sample(members: list[tuple[str, bytes | None]]) -> Callable:
    def read():
        texts = [content for name, content in members if name.endswith(".json")]
        if len(texts) != 1:
            raise UserError(
                f"the sample has {len(texts)} .json files among {[name for name, _ in members]},"
                " but needs one"
            )
        try:
            record = json.loads(texts[0])
        except ValueError as error:
            raise UserError(f"the .json of the sample is malformed: {error}") from None
        pictures = [
            name if content is None else content
            for name, content in members
            if name.lower().endswith(PICTURES)
        ]
        record = {"conversations": record} if isinstance(record, list) else record
        if not isinstance(record, dict):
            raise UserError("the .json of a sample holds a record, or the list of its turns")
        return {"id": members[0][0].partition(".")[0], **record, "image": pictures or None}

    return read


def _json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} line {error.lineno} column {error.colno}: malformed JSON, {error.msg}"
        ) from None
    if not isinstance(records, list):
        raise UserError(
            f"{path} holds {_kind(records)}, but a list of records is needed; a file with one"
            " record a line ends in .jsonl"
        )
    for i, record in enumerate(records):
        yield f"{path} record {i}", record


def _json_lines(path: Path) -> Iterator[tuple[str, Callable]]:
    for number, line in iterate_lines(path):
        yield f"{path} line {number}", partial(parse_line, line)


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}") from None
    number = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            yield f"{path} record {number}", record
            number += 1


READERS = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".tar": _tar,
}


def _kind(value) -> str:
    return {dict: "an object", list: "a list", str: "a text"}.get(type(value), repr(value))
