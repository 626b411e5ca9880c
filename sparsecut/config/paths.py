"""Folders that a user names for results, checked before anything is computed for them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..schema import UserError


def check_writable_folder(folder: str | Path) -> None:
    """Check that a folder exists and can be written, or can be made.

    Raises:
        UserError: A file stands in its place or above it, or it may not be written.
    """
    path = Path(folder)
    existing = path
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except (OSError, ValueError) as error:  # a name that is too long, or has a null byte
        raise UserError(f"{str(path)[:40]!r} cannot be a folder: {error}; name another") from error
    if not existing.is_dir():
        raise UserError(f"{path} cannot be a folder, because {existing} is a file; name another")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"{path} cannot be written in {existing} ({error.strerror}); name another"
        ) from error
