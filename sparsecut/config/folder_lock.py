"""A folder of results that only one process at a time may write.

The lock is the operating system's, on the file LOCK in the folder, so it ends with its process,
even with one that is killed. OWNER says whose it is. Some shared disks do not carry locks from one
host to another. So an owner renews its file all the time, and one that does so counts as alive.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ..schema import UserError, build_dataclass, check_types, read_json_file
from .paths import check_writable_folder

LOCK = ".lock"
OWNER = ".lock.json"
SECONDS_BETWEEN_RENEWALS = 5.0
SECONDS_TO_WATCH = 20.0  # an owner on another host that does not renew its file so long is gone
SECONDS_TO_LET_GO = 10.0  # children of a killed process may hold its lock a little longer
SECONDS_OF_DOUBT = 3600.0  # an owner that was silent longer is gone, whatever the hosts' clocks say
MAX_COMMAND = 120  # characters of it that are shown
logger = logging.getLogger(__name__)
_held: set[tuple[str, int]] = set()  # folders, each with the thread that has it


@dataclass(frozen=True)
class Owner:
    """The process that has a folder.

    Attributes:
        process: Its id.
        host: The machine that it runs on.
        since: When it took the folder.
        command: What was started.
    """

    process: int
    host: str
    since: str
    command: str

    def __post_init__(self):
        check_types(self)
        if not 0 < self.process < 2**31:
            raise UserError(f"process is {self.process}, but must be the id of a process")

    def __str__(self) -> str:
        command = self.command[:MAX_COMMAND]
        return f"process {self.process} on host {self.host} since {self.since} ({command})"


@contextlib.contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Have a folder for this process until the end of the `with` block.

    A thread that has a folder may ask for it again. Among the processes of one training, only the
    first one takes the lock; it stands for all.

    Args:
        folder: The folder. It is made, and removed again if nothing is written into it.

    Raises:
        UserError: Another process or thread has the folder, and the message says which; or the
            folder cannot be written.
    """
    folder = Path(folder)
    key = os.path.realpath(folder), threading.get_ident()
    if key in _held or os.environ.get("RANK", "0") != "0":
        yield
        return
    check_writable_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _hold_system_lock(folder) as is_certain:
            _check_owner_is_gone(folder, is_certain)
            _held.add(key)
            try:
                with _show_owner(folder):
                    yield
            finally:
                _held.discard(key)
    finally:
        if is_new:
            _remove_if_unused(folder)


@contextlib.contextmanager
def claim_new_folder(folder: str | Path) -> Iterator[None]:
    """Have a folder as `lock_folder` does, for files that are written once and handed on.

    No file of the lock stays beside them.

    Raises:
        UserError: As `lock_folder`.
    """
    folder = Path(folder)
    with lock_folder(folder):
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir() if path.name != OWNER] != [LOCK]:
                (folder / LOCK).unlink(missing_ok=True)


@contextlib.contextmanager
def _hold_system_lock(folder: Path) -> Iterator[bool]:
    """Hold the operating system's lock; yields False where the disk has none to give."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    owner = _read_owner(folder)
    is_alive = owner is not None and _is_alive(owner)
    try:
        lock.acquire(timeout=0 if is_alive else SECONDS_TO_LET_GO)
    except Timeout:
        raise _refuse(folder, _read_owner(folder)) from None
    except OSError as error:
        logger.warning("%s cannot be locked on this disk: %s", folder, error)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _check_owner_is_gone(folder: Path, is_certain: bool) -> None:
    """Raise UserError where an owner lives, although the system's lock does not say so.

    Args:
        folder: The folder.
        is_certain: Whether the system's lock is held, which tells of all processes on this host.
    """
    owner = _read_owner(folder)
    if owner is None:
        return
    is_here = owner.host == socket.gethostname()
    if is_here and (is_certain or not _is_alive(owner)):
        return
    if _renews_file(folder / OWNER):
        raise _refuse(folder, owner)


def _renews_file(file: Path) -> bool:
    """Whether a file is written again while it is watched."""
    first = _read_time(file)
    if first is None or abs(time.time() - first) > SECONDS_OF_DOUBT:
        return False
    logger.warning("watching for %.0f seconds whether %s is renewed", SECONDS_TO_WATCH, file)
    end = time.monotonic() + SECONDS_TO_WATCH
    while time.monotonic() < end:
        time.sleep(SECONDS_BETWEEN_RENEWALS / 5)
        now = _read_time(file)
        if now is None:
            return False
        if now != first:
            return True
    return False


def _read_time(file: Path) -> float | None:
    """When a file was written; None where it is gone."""
    try:
        with file.open("rb") as opened:  # opening it also asks a file server again
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return None


def _is_alive(owner: Owner) -> bool:
    """Whether an owner runs, as far as this host can tell."""
    import psutil

    return owner.host != socket.gethostname() or psutil.pid_exists(owner.process)


def _read_owner(folder: Path) -> Owner | None:
    """The owner that a folder names; None where it names none."""
    file = folder / OWNER
    if not file.is_file():
        return None
    try:
        return build_dataclass(Owner, read_json_file(file), str(file))
    except UserError:
        return None


def _refuse(folder: Path, owner: Owner | None) -> UserError:
    """The error for a folder that somebody has."""
    return UserError(
        f"{folder} is in use by {owner or 'another process'}; wait until it has ended, stop it, or"
        f" choose another folder; if it does not run any more, remove {folder / LOCK} and"
        f" {folder / OWNER}"
    )


@contextlib.contextmanager
def _show_owner(folder: Path) -> Iterator[None]:
    """Name this process in the folder, and renew the file until the end of the block."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    owner = Owner(os.getpid(), socket.gethostname(), since, command)
    file = folder / OWNER
    part = folder / f"{OWNER}.{os.getpid()}"
    part.write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")
    part.replace(file)
    ended = threading.Event()
    thread = threading.Thread(target=_renew_file, args=(file, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        file.unlink(missing_ok=True)


def _renew_file(file: Path, ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_RENEWALS):
        # The folder may be gone, or the disk away for a moment.
        with contextlib.suppress(OSError):
            os.utime(file)


def _remove_if_unused(folder: Path) -> None:
    """Remove a folder that holds nothing but the lock."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
