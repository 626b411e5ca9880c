"""Runs that belong to one process: whoever has a run's folder trains it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..config.folder_lock import LOCK, lock_folder
from ..schema import UserError

SECONDS_TO_TRUST = 600  # an old version's file `running` of another host, which it never renews


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Make a run this process's own in the block; yields False where a living process has it."""
    with ExitStack() as stack:
        is_new = not (folder / LOCK).exists()
        try:
            stack.enter_context(lock_folder(folder))
        except UserError:
            yield False
            return
        mark = folder / "running"
        if is_new and _is_owner_alive(mark):
            yield False
            return
        mark.write_text(f"{socket.gethostname()} {os.getpid()}", encoding="utf-8")
        try:
            yield True
        finally:
            mark.unlink(missing_ok=True)


def _is_owner_alive(mark: Path) -> bool:
    """Whether a process of an old version, which locks no folder, may still have a run.

    Such a process never renews its file `running`. So one of another host counts as alive for a
    while only.
    """
    import psutil

    try:
        age = time.time() - mark.stat().st_mtime
        host, pid = mark.read_text(encoding="utf-8").split()
        if host == socket.gethostname():
            return psutil.Process(int(pid)).create_time() < mark.stat().st_mtime
    except (OSError, ValueError, OverflowError, psutil.Error):  # gone, or not written whole
        return False
    return age < SECONDS_TO_TRUST
