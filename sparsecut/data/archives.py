"""Tar archives, read member by member, in which nothing is read before its size is known."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..schema import UserError
from .access import check_excess

MAX_HEADER = 2**20  # bytes of a long name or of extended attributes
HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
# What tarfile raises for damaged archives. ValueError and IndexError come from damaged numbers.
ARCHIVE_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    IndexError,
)


class _Member(tarfile.TarInfo):
    """A member whose header is checked before anything is read for it."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            # Else tarfile takes a damaged header for the end of the archive.
            raise tarfile.ReadError(f"{error} at byte {archive.offset:,}") from None

    def _proc_member(self, archive):  # the entry point that tarfile's own comments name
        if self.type in HEADER_TYPES and self.size > MAX_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes, above {MAX_HEADER:,}")
        return super()._proc_member(archive)

    def _block(self, count: int) -> int:
        if count < 0:  # else the archive would be read backwards, for ever
            raise tarfile.ReadError(f"a member of {count:,} bytes")
        return super()._block(count)


@contextmanager
def refuse_damaged(path: Path) -> Iterator[None]:
    """Turn what tarfile raises for a damaged archive into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except ARCHIVE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} cannot be read as a tar archive ({reason}); give an intact one"
        ) from None


def iterate_members(
    path: Path, mode: str = "r"
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield an open archive with each of its members in order.

    Args:
        path: The archive.
        mode: "r:" for a plain archive, "r" for a compressed one too.
    """
    with tarfile.open(path, mode, tarinfo=_Member) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # else it keeps every member
            yield archive, member


def check_member(member: tarfile.TarInfo, max_bytes: int) -> None:
    """Raise UserError where a member must not be read: it is too large, or has holes."""
    name = show_name(member.name)
    check_excess(f"the member {name} of the archive", member.size, max_bytes)
    if member.issparse():
        raise UserError(
            f"the member {name} is stored as a sparse file of {member.size:,} bytes; pack the"
            " archive again without --sparse"
        )


def show_name(name: str) -> str:
    """Return a member's name as text that can be written: bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
