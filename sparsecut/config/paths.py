"""Folders that a user names for results, checked before anything is computed for them."""

from __future__ import annotations

import os
from pathlib import Path

from ..schema import UserError


def check_writable_folder(folder: str | Path) -> None:
    """Check that a folder exists and can be written, or can be made.

    Raises:
        UserError: A file stands in its place or above it, or it may not be written.
    """
    path = Path(folder)
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{path} cannot be a folder, because {existing} is a file; name another")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission in {existing}; name another")
