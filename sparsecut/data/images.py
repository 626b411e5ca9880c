"""Where images lie: a folder, or a tar archive that is indexed once and then read anywhere."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from pathlib import Path

from PIL import Image

from ..pixels import open_upright
from ..schema import UserError

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz")
MEMORY_LIMIT = 256 * 2**20  # bytes of images that a compressed archive may hold in memory
ARCHIVE_ERRORS = (tarfile.TarError, OSError, EOFError, zlib.error)


class ImageStore:
    """Images by name, from a folder, a tar archive or a compressed tar archive.

    It may be used in several DataLoader workers. A plain archive is read in place. A compressed one
    cannot be read in the middle: its images are held in memory, up to 256 MiB of them.

    Attributes:
        path: The folder or archive.
        places: Of a plain archive, name -> (first byte, number of bytes).
        contents: Of a compressed archive, name -> bytes.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.places: dict[str, tuple[int, int]] | None = None
        self.contents: dict[str, bytes] | None = None
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise UserError(
                f"there are no images at {self.path}: give an existing folder or tar archive as"
                " `images`"
            )
        try:
            if self.path.suffix in COMPRESSED:
                self.contents = _read_contents(self.path)
            else:
                self.places = _read_places(self.path)
        except ARCHIVE_ERRORS as error:
            raise UserError(
                f"{self.path} cannot be read as a tar archive ({error}); give a folder or an"
                " intact one"
            ) from None

    def __contains__(self, name: str) -> bool:
        if self.places is not None:
            return os.path.normpath(name) in self.places
        if self.contents is not None:
            return os.path.normpath(name) in self.contents
        return (self.path / name).is_file()

    def describe_missing(self, name: str) -> str:
        """Return the message of an error about an image that is not here."""
        return f"there is no image {name} in {self.path}; add it or correct the record's `image`"

    def load(self, name: str) -> Image.Image:
        """Return an image in RGB, fully read.

        Raises:
            UserError: The image is missing or broken.
        """
        if name not in self:
            raise UserError(self.describe_missing(name))
        what = f"the image {name} in {self.path}"
        try:
            data = self.read_bytes(name)
        except OSError as error:
            raise UserError(f"{what} cannot be read: {error}") from None
        return open_upright(io.BytesIO(data), what)

    def find_file(self, name: str) -> Path:
        """Return the file that holds an image: its own, or the archive."""
        is_folder = self.places is None and self.contents is None
        return self.path / name if is_folder else self.path

    def read_bytes(self, name: str) -> bytes:
        """Return the encoded bytes of an image."""
        if self.contents is not None:
            return self.contents[os.path.normpath(name)]
        if self.places is None:
            return (self.path / name).read_bytes()
        first, size = self.places[os.path.normpath(name)]
        # A file that stays open would share its position between DataLoader workers.
        with self.path.open("rb") as file:
            file.seek(first)
            return file.read(size)


def decode_image(data: bytes, what: str = "the image stored in the record") -> Image.Image:
    """Return an image that a file of records holds itself, in RGB; UserError where it is broken."""
    return open_upright(io.BytesIO(data), what)


def _read_places(path: Path) -> dict[str, tuple[int, int]]:
    places = {}
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.isfile():
                places[os.path.normpath(member.name)] = member.offset_data, member.size
    return places


def _read_contents(path: Path) -> dict[str, bytes]:
    contents = {}
    total = 0
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile():
                continue
            total += member.size
            if total > MEMORY_LIMIT:
                raise UserError(
                    f"{path} holds more than {MEMORY_LIMIT // 2**20} MiB of images, and a"
                    " compressed archive cannot be read in the middle; unpack it once (`mkdir"
                    f" images && tar xf {path} -C images`) and give that folder as `images`"
                )
            contents[os.path.normpath(member.name)] = archive.extractfile(member).read()
    return contents
