"""Where pictures lie: a folder, or a tar archive that is indexed once and then read anywhere."""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..imaging import open_upright
from ..schema import UserError

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz")
MEMORY_LIMIT = 256 * 2**20  # bytes of pictures that a compressed archive may hold in memory


class Pictures:
    """Pictures by name, from a folder, a tar archive or a compressed tar archive; safe in
    DataLoader workers.

    A plain archive is read in place. A compressed one has no places to read from: its pictures are
    kept in memory, up to 256 MiB of them; a larger one is refused and should be unpacked.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.places: dict[str, tuple[int, int]] | None = (
            None  # name -> (first byte, number of bytes)
        )
        self.contents: dict[str, bytes] | None = None
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise UserError(
                f"there are no pictures at {self.path}: give an existing folder or tar archive as"
                " `images`"
            )
        try:
            if self.path.suffix in COMPRESSED:
                self.contents = _read_all(self.path)
            else:
                with tarfile.open(self.path, "r:") as archive:
                    self.places = {
                        _name(m.name): (m.offset_data, m.size) for m in archive if m.isfile()
                    }
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path} cannot be read as a tar archive ({error}); give a folder or an"
                " intact one"
            ) from None

    def __contains__(self, name: str) -> bool:
        if self.places is not None:
            return _name(name) in self.places
        return (
            _name(name) in self.contents
            if self.contents is not None
            else (self.path / name).is_file()
        )

    def open(self, name: str) -> Image.Image:
        """A picture in RGB, fully read; ValueError where it is missing or broken."""
        if name not in self:
            raise UserError(
                f"there is no picture {name} in {self.path}; add it or correct the record's `image`"
            )
        try:
            return open_upright(io.BytesIO(self._read(name)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"the picture {name} in {self.path} is broken: {_reason(error)}"
            ) from None

    def _read(self, name: str) -> bytes:
        if self.contents is not None:
            return self.contents[_name(name)]
        if self.places is None:
            return (self.path / name).read_bytes()
        first, size = self.places[_name(name)]
        # Opened for every picture: a handle kept open would share its position between DataLoader
        # workers.
        with self.path.open("rb") as file:
            file.seek(first)
            return file.read(size)


def open_bytes(data: bytes) -> Image.Image:
    """A picture that a Parquet file holds itself, in RGB; ValueError where it is broken."""
    try:
        return open_upright(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the picture stored in the record is broken: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What is wrong, without the address in memory that Pillow puts there: the same fault is the
    same sentence.
    """
    return (
        "it is of no format that is known"
        if isinstance(error, UnidentifiedImageError)
        else str(error)
    )


def _read_all(path: Path) -> dict[str, bytes]:
    contents, total = {}, 0
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.isfile():
                continue
            total += member.size
            if total > MEMORY_LIMIT:
                raise UserError(
                    f"{path} holds more than {MEMORY_LIMIT // 2**20} MiB of pictures, and a"
                    " compressed archive cannot be read in the middle; unpack it once (`mkdir"
                    f" pictures && tar xf {path} -C pictures`) and give that folder as `images`"
                )
            contents[_name(member.name)] = archive.extractfile(member).read()
    return contents


def _name(name: str) -> str:
    return os.path.normpath(name)
