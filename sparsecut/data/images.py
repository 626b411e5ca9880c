"""Where images lie: a folder, or a tar archive that is indexed once and then read anywhere."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

from PIL import Image

from ..pixels import open_upright
from ..schema import UserError
from .access import DEFAULT_ACCESS, Access, has_image, read_file
from .archives import check_member, iterate_members, refuse_damaged, show_name

COMPRESSED = (".gz", ".tgz", ".bz2", ".xz")
MEMORY_LIMIT = 256 * 2**20  # bytes of images that a compressed archive may hold in memory
MAX_LINKS = 10  # that one member of an archive may follow


class ImageStore:
    """Images by name, from a folder, a tar archive or a compressed tar archive.

    It may be used in several DataLoader workers. A plain archive is read in place. A compressed one
    cannot be read in the middle: its images are held in memory, up to 256 MiB of them.

    Attributes:
        path: The folder or archive.
        access: What may be read.
        places: Of a plain archive, name -> (first byte, number of bytes).
        contents: Of a compressed archive, name -> bytes.
        refused: Of an archive, name -> why the image is not read.
    """

    def __init__(self, path: str | Path, access: Access = DEFAULT_ACCESS):
        self.path = Path(path)
        self.access = access
        self.places: dict[str, tuple[int, int]] | None = None
        self.contents: dict[str, bytes] | None = None
        self.refused: dict[str, str] = {}
        if self.path.is_dir():
            return
        if not self.path.is_file():
            raise UserError(
                f"there are no images at {self.path}: give an existing folder or tar archive as"
                " `images`"
            )
        if self.path.suffix.lower() == ".zip":
            raise UserError(
                f"{self.path} is a zip archive; unpack it, and give that folder as `images`"
            )
        with refuse_damaged(self.path):
            if self.path.suffix.lower() in COMPRESSED:
                self.contents = self._read_contents()
            else:
                self.places = self._read_places()

    @property
    def _members(self) -> dict | None:
        """Of an archive, what is known of its images by name."""
        return self.places if self.contents is None else self.contents

    def __contains__(self, name: str) -> bool:
        try:
            self.check(name)
        except UserError:
            return False
        return True

    def check(self, name: str) -> None:
        """Raise UserError where there is no such image, or it must not be read."""
        if self._members is None:
            is_here = has_image(self.path, name, self.access)
        else:
            name = os.path.normpath(name)
            if name in self.refused:
                raise UserError(self.refused[name])
            is_here = name in self._members
        if not is_here:
            raise UserError(
                f"there is no image {name} in {self.path}; add it or correct the record's `image`"
            )

    def load(self, name: str) -> Image.Image:
        """Return an image in RGB, fully read.

        Raises:
            UserError: The image is missing or broken.
        """
        what = f"the image {name} in {self.path}"
        try:
            data = self.read_bytes(name)
        except OSError as error:
            raise UserError(f"{what} cannot be read: {error}") from None
        return open_upright(io.BytesIO(data), what)

    def find_file(self, name: str) -> Path:
        """Return the file that holds an image: its own, or the archive."""
        return self.path / name if self._members is None else self.path

    def read_bytes(self, name: str) -> bytes:
        """Return the encoded bytes of an image; UserError where it must not be read."""
        self.check(name)
        if self.contents is not None:
            return self.contents[os.path.normpath(name)]
        if self.places is None:
            return read_file(self.path / name, self.access)
        first, size = self.places[os.path.normpath(name)]
        # A file that stays open would share its position between DataLoader workers.
        with self.path.open("rb") as file:
            file.seek(first)
            return file.read(size)

    def _read_places(self) -> dict[str, tuple[int, int]]:
        places = {}
        links = {}
        for _, member in iterate_members(self.path, "r:"):
            if self._is_image(member, links):
                places[_get_name(member.name)] = member.offset_data, member.size
        return _follow_links(places, links)

    def _read_contents(self) -> dict[str, bytes]:
        contents = {}
        links = {}
        total = 0
        for archive, member in iterate_members(self.path):
            if not self._is_image(member, links):
                continue
            total += member.size
            if total > MEMORY_LIMIT:
                raise UserError(
                    f"{self.path} holds more than {MEMORY_LIMIT // 2**20} MiB of images, and a"
                    " compressed archive cannot be read in the middle; unpack it once (`mkdir"
                    f" images && tar xf {self.path} -C images`) and give that folder as `images`"
                )
            contents[_get_name(member.name)] = archive.extractfile(member).read()
        return _follow_links(contents, links)

    def _is_image(self, member: tarfile.TarInfo, links: dict[str, str]) -> bool:
        """Whether a member is a file that may be read; links and refused ones are noted."""
        name = _get_name(member.name)
        if member.islnk():
            links[name] = _get_name(member.linkname)
        elif member.issym():
            links[name] = _get_name(os.path.join(os.path.dirname(member.name), member.linkname))
        if not member.isfile():
            return False
        try:
            check_member(member, self.access.max_bytes)
        except UserError as error:
            self.refused[name] = str(error)
            return False
        return True


def _get_name(name: str) -> str:
    """The name by which a member is found, without a leading "./"."""
    return os.path.normpath(show_name(name))


def _follow_links(members: dict, links: dict[str, str]) -> dict:
    """The members of an archive, with links to some of them under their own names too."""
    linked = {}
    for name in links:
        target = name
        for _ in range(MAX_LINKS):
            target = links.get(target, target)
        if target in members:
            linked[name] = members[target]
    return {**members, **linked}


def decode_image(data: bytes, what: str = "the image stored in the record") -> Image.Image:
    """Return an image that a file of records holds itself, in RGB; UserError where it is broken."""
    return open_upright(io.BytesIO(data), what)
