"""Tables of records: Parquet, Arrow, and folders of `datasets`; their images stay on disk."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..schema import UserError
from .access import Access, check_excess
from .class_labels import ClassNames, find_class_names, name_classes, read_class_names
from .image_values import CellName
from .images import ImageStore, decode_image
from .record_forms import IMAGE_NAMES, MEDIA_KEYS

CELL = re.compile(r"(\d{1,18})/(\d{1,18})(?:/(.+))?", re.DOTALL)  # the name of an image in a table
BATCH_ROWS = 1000
BATCH_BYTES = 64 * 2**20  # of rows that are read at once
FEW_ROWS = 16  # that are read at once of a large row group
LARGE_GROUP = 2**30  # bytes of a row group that is not read at once
MAX_RATIO = 200  # of unpacked to packed bytes; texts reach 10, images 1
# What pyarrow raises besides its own errors, where values are damaged or do not fit Python's types.
VALUE_ERRORS = (OSError, ValueError, TypeError, KeyError, OverflowError)

Placed = tuple[str, Any]


def read_table(path: Path, access: Access) -> Iterator[Placed]:
    """Yield where each record of a table stands, and the record or a function that gives it.

    Images in the table come as they are, with their bytes.
    """
    if path.suffix.lower() == ".parquet":
        classes = read_class_names(_open_parquet(path, access).schema_arrow)
        records = _number_records(path, _iterate_parquet(path, access), access)
    else:
        table = _open_arrow(path)
        classes = find_class_names(table.features)
        records = _number_records(path, _iterate_arrow(path, table), access)
    return _name_all(records, classes) if classes else records


def _name_all(records: Iterable[Placed], classes: ClassNames) -> Iterator[Placed]:
    """The records with the names of classes in place of numbers."""
    for place, record in records:
        yield place, partial(_name_one, record, classes)


def _name_one(record: Any, classes: ClassNames) -> dict:
    return name_classes(record() if callable(record) else record, classes)


def open_image_table(path: Path, access: Access):
    """Return a memory-mapped table of a file that holds images itself, None for any other file."""
    import datasets

    if path.is_dir() or path.suffix.lower() == ".arrow":
        table = _open_arrow(path)
    elif path.suffix.lower() == ".parquet":
        file = _open_parquet(path, access)
        if not _list_image_columns(file.schema_arrow):
            return None
        table = datasets.Dataset.from_parquet(str(path), **_choose_batches(file.metadata))
    else:
        return None
    return table if _list_image_columns(table.with_format("arrow").data.schema) else None


def _choose_batches(metadata) -> dict[str, int]:
    """The rows that `datasets` copies at once, where a whole row group would be too much."""
    sizes = [size for _, size in _list_group_sizes(metadata)]
    is_large = max(sizes, default=0) > LARGE_GROUP
    return {"batch_size": _count_batch_rows(metadata)} if is_large else {}


def read_image_table(path: Path, table, access: Access) -> Iterator[Placed]:
    """Yield the records of a table with images, which come as names for `TableImages`."""
    store = ImageStore(path.parent, access)
    classes = find_class_names(table.features)
    number = 0
    for batch in _iterate_arrow(path, table):
        columns = _list_image_columns(batch.schema)
        names = [name for name in batch.schema.names if name not in columns]
        records = _number_records(path, [batch.select(names)], access, start=number)
        cells = zip(*(batch.column(name) for name in columns), strict=True)
        for (place, record), row in zip(records, cells, strict=True):
            images = dict(zip(columns, row, strict=True))
            full = partial(_add_images, record, images, number, store)
            yield place, partial(_name_one, full, classes) if classes else full
            number += 1


def _add_images(record: Any, cells: dict[str, Any], number: int, store: ImageStore) -> dict:
    record = record() if callable(record) else record
    named = {}
    for column, cell in cells.items():
        images = _list_images(cell)
        if column in IMAGE_NAMES:  # another one is perhaps not used
            for i, image in enumerate(images):
                _check_image(image, i, store)
        ending = "" if column == "image" else f"/{column}"
        names = [CellName(f"{number}/{i}{ending}") for i in range(len(images))]
        named[column] = names or None
    return {**record, **named}


def _list_images(cell) -> list:
    from pyarrow import ListScalar

    if not cell.is_valid:
        return []
    return list(cell.values) if isinstance(cell, ListScalar) else [cell]


def _check_image(image, number: int, store: ImageStore) -> None:
    """Raise UserError unless a cell's image has bytes, or a path that leads to a file."""
    content, name = _split_image(image)
    size = content.as_buffer().size if content is not None and content.is_valid else 0
    if size:
        check_excess(f"image {number} of the record", size, store.access.max_bytes)
        return
    if name is None or not name.is_valid:
        raise UserError(f"image {number} of the record has neither bytes nor a path; add one")
    store.check(str(name.as_py()))


def _split_image(image) -> tuple:
    """The scalars of an image's bytes and path, None for what it lacks."""
    from pyarrow import BinaryScalar

    if isinstance(image, BinaryScalar):
        return image, None
    known = image if image.is_valid else ()
    return tuple(image.get(key) if key in known else None for key in ("bytes", "path"))


class TableImages:
    """Images in the cells of a table, which stays on disk.

    Their names are "row/number" in the column `image`, and "row/number/column" in others. Other
    names are those of files beside the table.
    """

    def __init__(self, path: Path, table, access: Access):
        self.path = path
        self.table = table
        self.access = access

    def __reduce__(self):
        return reopen_images, (self.path, self.access)  # another process maps the file again

    def __contains__(self, name: str) -> bool:
        try:
            self.check(name)
        except UserError:
            return False
        return True

    def check(self, name: str) -> None:
        """Raise UserError where there is no such image."""
        cell = CELL.fullmatch(name)
        if cell is None:
            self._open_folder().check(name)
        elif int(cell[1]) >= len(self.table):
            raise UserError(f"there is no image {name} in {self.path}")
        elif cell[3] not in (None, *IMAGE_NAMES):  # those were checked when they were read
            _check_image(self._find_image(name), int(cell[2]), self._open_folder())

    def load(self, name: str) -> Image.Image:
        """Return an image in RGB; UserError where it is broken."""
        image = self._read_cell(name)
        if image.get("bytes"):
            return decode_image(image["bytes"], f"the image {name} in {self.path}")
        return self._open_folder().load(str(image["path"]))

    def find_file(self, name: str) -> Path:
        """Return the file that holds an image: its own, or the table."""
        image = self._read_cell(name)
        return self.path if image.get("bytes") else self._open_folder().find_file(image["path"])

    def read_bytes(self, name: str) -> bytes:
        """Return the encoded bytes of an image."""
        image = self._read_cell(name)
        return image.get("bytes") or self._open_folder().read_bytes(str(image["path"]))

    def _open_folder(self) -> ImageStore:
        return ImageStore(self.path.parent, self.access)

    def _read_cell(self, name: str) -> dict:
        """Bytes and path of an image."""
        if CELL.fullmatch(name) is None:
            return {"path": name}
        content, path = _split_image(self._find_image(name))
        return {
            "bytes": None if content is None else content.as_py(),
            "path": None if path is None else path.as_py(),
        }

    def _find_image(self, name: str):
        row, number, column = CELL.fullmatch(name).groups()
        cells = self.table.with_format("arrow")[int(row)].column(column or "image")
        return _list_images(cells[0])[int(number)]


def reopen_images(path: Path, access: Access) -> TableImages:
    """Return the images of a table that holds images."""
    return TableImages(path, open_image_table(path, access), access)


def _list_image_columns(schema) -> list[str]:
    """The columns that hold images: bytes, objects as `datasets` has them, or lists of these."""
    from pyarrow import types

    found = []
    for field in schema:
        is_plain = types.is_dictionary(field.type)  # a dictionary repeats its values
        kind = field.type if is_plain else getattr(field.type, "value_type", field.type)
        is_struct = types.is_struct(kind)
        if not (is_struct or _is_bytes(kind)) or schema.names.count(field.name) > 1:
            continue
        keys = {inner.name for inner in kind} if is_struct else {"bytes", "path"}
        is_file = keys == {"bytes", "path"} and field.name not in MEDIA_KEYS
        if is_file or field.name == "image":
            found.append(field.name)
    return found


def _is_bytes(kind) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind)


def _choose_columns(path: Path, schema) -> list[str]:
    """The columns that may be part of a record: no vectors, times and kinds of other libraries."""
    repeated = [name for name in schema.names if schema.names.count(name) > 1]
    if repeated:
        raise UserError(f"{path} has {len(repeated)} columns {repeated[0]}; keep one of them")
    return [field.name for field in schema if _is_readable(field.type)]


def _is_readable(kind) -> bool:
    from pyarrow import BaseExtensionType, types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    while is_list:
        kind = kind.value_type
        is_list = types.is_list(kind) or types.is_large_list(kind)
        if types.is_floating(kind):
            return False
    return not (types.is_temporal(kind) or isinstance(kind, BaseExtensionType))


# ---- rows


def _number_records(
    path: Path, batches: Iterable, access: Access, start: int = 0
) -> Iterator[Placed]:
    number = start
    for batch in batches:
        for record in _convert_rows(batch, access):
            yield f"{path} record {number}", record
            number += 1


def _convert_rows(batch, access: Access) -> list:
    """The records of a batch; functions where one of them cannot be converted, or is large."""
    import pyarrow

    if batch.nbytes <= min(access.max_bytes, BATCH_BYTES):
        try:
            return batch.to_pylist()
        except (pyarrow.ArrowException, *VALUE_ERRORS):
            pass  # one row may be bad; each is converted by itself
    return [partial(_convert_row, batch.slice(i, 1), access) for i in range(len(batch))]


def _convert_row(row, access: Access) -> dict:
    import pyarrow

    check_excess("the record", row.nbytes, access.max_bytes)
    try:
        (record,) = row.to_pylist()
    except (pyarrow.ArrowException, *VALUE_ERRORS) as error:
        raise UserError(f"the row cannot be read ({type(error).__name__}: {error})") from None
    return record


# ---- files


def _open_arrow(path: Path):
    """A memory-mapped table of an Arrow file, or of a folder that `save_to_disk` has written."""
    import datasets
    import pyarrow

    _check_stored(path)
    open_table = datasets.load_from_disk if path.is_dir() else datasets.Dataset.from_file
    try:
        table = open_table(str(path))
    except (pyarrow.ArrowException, *VALUE_ERRORS) as error:
        raise UserError(
            f"{path} cannot be read as records of `datasets` ({type(error).__name__}: {error});"
            " save it again"
        ) from error
    if not isinstance(table, datasets.Dataset):
        raise UserError(
            f"{path} holds several splits ({', '.join(table)}); give one of its folders"
        )
    return table


def _check_stored(path: Path) -> None:
    """Raise UserError where a folder has a pipe or a device, which would be waited for."""
    for file in path.iterdir() if path.is_dir() else [path]:
        if stat.S_IFMT(os.stat(file).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise UserError(f"{file} is not a stored file, but a pipe, a socket or a device")


def _iterate_arrow(path: Path, table) -> Iterator:
    arrow = table.with_format("arrow")
    chosen = arrow.select_columns(_choose_columns(path, arrow.data.schema))
    # A dictionary repeats its values: their size is not known before they are converted.
    num_rows = 1 if "dictionary<" in str(chosen.data.schema) else BATCH_ROWS
    with _refuse_damaged(path, "records of `datasets`"):
        yield from chosen.iter(batch_size=num_rows)


def _open_parquet(path: Path, access: Access):
    import pyarrow.parquet

    with _refuse_damaged(path, "Parquet"):
        file = pyarrow.parquet.ParquetFile(path)
        _check_row_groups(path, file.metadata, access)
    return file


def _iterate_parquet(path: Path, access: Access) -> Iterator:
    file = _open_parquet(path, access)
    names = _choose_columns(path, file.schema_arrow)
    with _refuse_damaged(path, "Parquet"):
        yield from file.iter_batches(_count_batch_rows(file.metadata), columns=names)


def _list_group_sizes(metadata) -> list[tuple[int, int]]:
    """Rows and unpacked bytes of every row group.

    The facts of single columns are not asked for: pyarrow ends the process where these are damaged.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


def _check_row_groups(path: Path, metadata, access: Access) -> None:
    """Raise UserError where little data unpacks to very much."""
    packed = path.stat().st_size
    for number, (_, unpacked) in enumerate(_list_group_sizes(metadata)):
        if unpacked > access.max_bytes and unpacked > MAX_RATIO * packed:
            what = f"{path}: row group {number}, of a file of {packed:,} packed bytes,"
            check_excess(what, unpacked, access.max_bytes)


def _count_batch_rows(metadata) -> int:
    """Rows that are read at once, so that they take some 64 MiB.

    A dictionary holds each value once. So every row may be as large as its whole group, and few
    rows are read at once where a group is large.
    """
    num_rows = BATCH_ROWS
    for rows_of_group, size in _list_group_sizes(metadata):
        average = max(size // max(rows_of_group, 1), 1)
        by_group = max(BATCH_BYTES // max(size, 1), FEW_ROWS)
        num_rows = min(num_rows, by_group, max(BATCH_BYTES // average, 1))
    return num_rows


@contextmanager
def _refuse_damaged(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except (pyarrow.ArrowException, *VALUE_ERRORS) as error:
        raise UserError(
            f"{path} cannot be read as {kind} ({type(error).__name__}: {error}); save it again"
        ) from None
