"""What a source consists of: files of records, metadata of image folders, labelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..schema import UserError
from .access import Access
from .class_labels import ClassNames, name_classes
from .errors import show_value
from .hub_files import HubImages, Remote
from .images import ImageStore
from .readers import Placed, open_image_store, read_records

FILE_NAME = "file_name"  # the column of an image folder's metadata; others end in _file_name
LABEL = "label"  # the answer about an image in a folder of its class


@dataclass(frozen=True)
class RecordFile:
    """A file of records, or a folder of one data set that `datasets` has saved.

    Attributes:
        path: The file; of the hub, where it lies once it is fetched.
        remote: The data set of the hub that it is of.
        classes: Names of the classes in columns of numbers, as a data set's README.md has them.
    """

    path: Path
    remote: Remote | None = None
    classes: ClassNames = field(default_factory=dict, hash=False)

    def read(self, access: Access, *, images_by_name: bool) -> Iterator[Placed]:
        """Yield where each record stands, and the record or a function that gives it."""
        self.fetch()
        records = self._read(access, images_by_name)
        if self.classes:
            records = _change(records, partial(name_classes, names=self.classes))
        for place, record in records:
            yield self._show(place), record

    def _read(self, access: Access, images_by_name: bool) -> Iterator[Placed]:
        return read_records(self.path, images_by_name=images_by_name, access=access)

    def _show(self, place: str) -> str:
        """A record's place, where the file is of the hub without the folder of the cache."""
        if self.remote is None:
            return place
        return place.replace(str(self.path), self.remote.show(self.path), 1)

    def fetch(self) -> None:
        """Fetch the file where it is of the hub and not here."""
        if self.remote is not None:
            self.remote.fetch(self.path)

    def open_images(self, access: Access, *, by_name: bool = True):
        """Return what opens the images that records name.

        Args:
            access: What may be read.
            by_name: As `images_by_name` of `read`: images in the file have names too.
        """
        self.fetch()
        if by_name:
            store = open_image_store(self.path, access)
            if store.path == self.path:  # they lie in the file itself
                return store
        if self.remote is not None:
            return HubImages(self.remote, self.folder, access)
        return _open_folder(self.folder, access)

    @property
    def folder(self) -> Path:
        """The folder in which the images lie that records name."""
        return self.path.parent

    def list_stored(self) -> Iterator[Path]:
        """Yield the files on disk that it consists of."""
        self.fetch()
        if self.path.is_dir():
            yield from sorted(path for path in self.path.rglob("*") if path.is_file())
        else:
            yield self.path


@dataclass(frozen=True)
class MetadataFile(RecordFile):
    """metadata.jsonl, .csv or .parquet of a folder of images, which it names."""

    def _read(self, access: Access, images_by_name: bool) -> Iterator[Placed]:
        return _change(read_records(self.path, access=access), name_images)

    def open_images(self, access: Access, *, by_name: bool = True):
        """Return what opens images by the names that records give."""
        return super().open_images(access, by_name=False)


@dataclass(frozen=True)
class LabelledImage(RecordFile):
    """An image in a folder of its class, which is the answer to the question.

    Attributes:
        root: The folder of all classes.
    """

    root: Path = Path()

    def _read(self, access: Access, images_by_name: bool) -> Iterator[Placed]:
        name = self.path.relative_to(self.root).as_posix()
        yield str(self.path), {"id": name, "image": name, LABEL: self.path.parent.name}

    def fetch(self) -> None:
        """Do nothing: the image is fetched when it is opened."""

    def open_images(self, access: Access, *, by_name: bool = True):
        """Return what opens images by the names that records give."""
        return super().open_images(access, by_name=False)

    @property
    def folder(self) -> Path:
        """The folder of all classes."""
        return self.root


@lru_cache(maxsize=64)  # every image of a folder asks
def _open_folder(folder: Path, access: Access) -> ImageStore:
    return ImageStore(folder, access)


def _change(records: Iterator[Placed], change: Callable[[Any], Any]) -> Iterator[Placed]:
    """The records, each changed when it is read."""
    for place, record in records:
        yield place, partial(_read_changed, record, change)


def _read_changed(record: Any, change: Callable[[Any], Any]) -> Any:
    record = record() if callable(record) else record
    return change(record) if isinstance(record, dict) else record


def name_images(record: dict) -> dict:
    """Return a record of metadata with `image` in place of its columns of file names.

    Of several columns, such as `left_file_name` and `right_file_name`, `image` holds a list of the
    names in the columns' order.

    Raises:
        UserError: There is no such column.
    """
    columns = [key for key in record if key.removesuffix("s") == FILE_NAME or _is_file_column(key)]
    if not columns:
        raise UserError(
            f"the record has the keys {show_value(', '.join(map(str, record)))}, but a folder's"
            f" metadata names each image in {FILE_NAME}; add it"
        )
    names: list = []
    for column in columns:
        value = record[column]
        names += value if isinstance(value, list) else [value]
    rest = {key: value for key, value in record.items() if key not in columns}
    names = [name for name in names if name is not None]
    if not names:
        return rest
    return {**rest, "image": names[0] if len(names) == 1 else names}


def _is_file_column(key: Any) -> bool:
    return isinstance(key, str) and key.removesuffix("s").endswith(f"_{FILE_NAME}")
