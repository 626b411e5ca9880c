"""What files held when something was made of them, to find out later whether they have changed.

The facts of a file are a list that JSON can hold: its size, two times in nanoseconds (last written,
last changed in any way), and a digest of its contents. Equal size and times are a quick sign that
nothing changed. Where they differ, the digest decides: a copied folder has new times, but the same
contents.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

NUM_DIGITS = 32  # of a digest
NUM_STAMPS = 3  # values before the digest

Facts = list  # [size, time written, time changed, digest]


def describe_file(path: str | Path, known: Facts | None = None) -> Facts:
    """Return the facts of a file.

    Args:
        path: The file.
        known: Facts from before. Where size and times are still the same, the file is not read.
    """
    stamp = read_stamp(path)
    if known is not None and known[:NUM_STAMPS] == stamp:
        return known
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [*stamp, digest[:NUM_DIGITS]]


def describe_image(store, name: str, known: Facts | None = None) -> Facts:
    """Return the facts of an image in an `ImageStore`.

    An image in an archive has the size and times of the archive, and a digest of its own.
    """
    stamp = read_stamp(store.find_file(name))
    if known is not None and known[:NUM_STAMPS] == stamp:
        return known
    digest = hashlib.sha256(store.read_bytes(name)).hexdigest()
    return [*stamp, digest[:NUM_DIGITS]]


def hold_same_contents(facts: Facts, other: Facts) -> bool:
    """Whether two files hold the same bytes, wherever they lie and whenever they were written."""
    return facts[-1] == other[-1]


def read_stamp(path: str | Path) -> list[int]:
    """Return the size and times of a file."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
