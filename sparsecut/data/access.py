"""What records may reach: which files their images may be, and how many bytes anything may take.

Records come from anywhere. So an image's name must not lead out of the folder that the user named,
and nothing is read before its size is known.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..config.recipe import Source
from ..schema import UserError

MAX_MIB = 128
POINTER = b"version https://git-lfs.github.com/spec/"
# A pipe would wait for ever when it is opened. Windows has no such flag, and one for bytes.
READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
KERNEL_FOLDERS = ("/proc", "/sys")  # their files show this machine, and have no size


@dataclass(frozen=True)
class Access:
    """What records may reach.

    Attributes:
        anywhere: Whether images may lie outside the folder that the source names.
        follows_links: Whether symbolic links in that folder may lead out of it.
        max_mib: MiB that a record's text, or one of its images, may take.
    """

    anywhere: bool = False
    follows_links: bool = False
    max_mib: int = MAX_MIB

    @property
    def max_bytes(self) -> int:
        """Bytes that a record's text, or one of its images, may take."""
        return self.max_mib * 2**20


DEFAULT_ACCESS = Access()


def get_access(source: Source) -> Access:
    """Return what the records of a recipe's source may reach."""
    return Access(anywhere=source.anywhere, max_mib=source.max_mib)


def has_image(folder: Path, name: str, access: Access) -> bool:
    """Return whether an image is a file that may be read.

    Every image of a data set passes here, so paths are compared as text.

    Args:
        folder: The folder that the user named; it may be a link.
        name: The image's name in a record: a path in the folder or, if it lies there, a whole path.
        access: What records may reach.

    Raises:
        UserError: The name leads out of the folder, or no file can have it.
    """
    if "\0" in name:
        raise UserError(f"the image {name[:40]!r} has a NUL character in its name; correct it")
    try:
        path = _resolve(os.path.join(folder, name))
        _check_place(folder, name, path, access)
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except UnicodeEncodeError:
        raise UserError(f"no file can have the name {name[:40]!r}; correct it") from None
    except OSError as error:
        raise UserError(
            f"the image {name[:40]!r} cannot be found ({error.strerror}); correct its name"
        ) from None


def _resolve(path: str) -> str:
    """A path without links; folders are resolved once, because data sets have many images."""
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    resolved = os.path.join(_resolve_folder(os.path.join(os.getcwd(), folder)), name)
    return os.path.realpath(resolved) if os.path.islink(resolved) else resolved


@lru_cache(maxsize=2**16)
def _resolve_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _check_place(folder: Path, name: str, path: str, access: Access) -> None:
    """Raise UserError where a path, which a name leads to, must not be read."""
    if any(_lies_in(path, kernel) for kernel in KERNEL_FOLDERS):
        raise UserError(
            f"the image {name} is not a stored file but a part of the system; remove it"
        )
    if access.anywhere or _lies_in(path, _resolve_folder(os.path.join(os.getcwd(), folder))):
        return
    if access.follows_links:
        written = os.path.normpath(os.path.abspath(folder / name))
        if _lies_in(written, os.path.abspath(folder)):
            return
    raise UserError(
        f"the image {name} lies outside {folder}, at {path}; correct the name or give that folder"
        " as `images`. If you trust these records, set anywhere: true in their source"
    )


def _lies_in(path: str, folder: str) -> bool:
    """Whether a whole path without `..` is a folder, or lies in it."""
    path, folder = os.path.normcase(path), os.path.normcase(folder)
    return path == folder or path.startswith(os.path.join(folder, ""))


def read_file(path: Path, access: Access) -> bytes:
    """Return the bytes of a stored file that is not too large.

    Raises:
        UserError: It is something else than a stored file, such as a pipe, or too large.
        OSError: It cannot be read.
    """
    file = os.open(path, READ_FLAGS)
    with open(file, "rb") as opened:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise UserError(f"{path} is not a stored file, but a pipe, a socket or a device")
        check_excess(str(path), facts.st_size, access.max_bytes)
        data = opened.read(access.max_bytes)
    check_no_pointer(str(path), data)
    return data


def check_no_pointer(what: str, beginning: bytes) -> None:
    """Raise UserError where a file holds a pointer of Git LFS in place of its contents."""
    if beginning.startswith(POINTER):
        raise UserError(
            f"{what} holds only a pointer to its contents, as `git clone` leaves it without Git"
            " LFS; run `git lfs install` once and `git lfs pull` in the clone"
        )


def check_excess(what: str, num_bytes: int, max_bytes: int) -> None:
    """Raise UserError where something takes more bytes than it may."""
    if num_bytes > max_bytes:
        raise describe_excess(what, max_bytes)


def describe_excess(what: str, max_bytes: int) -> UserError:
    """Return the error of something that takes more bytes than it may."""
    return UserError(
        f"{what} takes more than {max_bytes / 2**20:g} MiB; remove it, or raise max_mib of its"
        " source"
    )
