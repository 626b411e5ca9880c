"""One process at a time has a folder, and one that is killed leaves it to the next."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from errno import ENOLCK

import pytest
from filelock import FileLock

from sparsecut.config import folder_lock
from sparsecut.config.folder_lock import LOCK, OWNER, lock_folder

HOLD = """
import sys
from sparsecut.config.folder_lock import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start_holder(tmp_path):
    """A function that starts a process which has the folder out/ until its input ends."""
    processes = []

    def start() -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "out")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    """Owners renew their file, and are watched, within parts of a second."""
    monkeypatch.setattr(folder_lock, "SECONDS_BETWEEN_RENEWALS", 0.1)
    monkeypatch.setattr(folder_lock, "SECONDS_TO_WATCH", 0.5)


def write_owner(folder, **changes) -> None:
    """Leave an owner's file behind, as a killed process does."""
    owner = {"process": os.getpid(), "host": "elsewhere", "since": "monday", "command": "train"}
    folder.mkdir(exist_ok=True)
    (folder / OWNER).write_text(json.dumps(owner | changes))


def test_a_folder_that_another_process_has_is_refused_and_its_owner_named(tmp_path, start_holder):
    process = start_holder()
    since = json.loads((tmp_path / "out" / OWNER).read_text())["since"]
    start = time.monotonic()
    with pytest.raises(ValueError, match="in use") as caught, lock_folder(tmp_path / "out"):
        pass
    assert time.monotonic() - start < 2
    for fact in (str(process.pid), socket.gethostname(), since):
        assert fact in str(caught.value)
    process.communicate()
    with lock_folder(tmp_path / "out"):
        pass


def test_a_killed_process_leaves_its_folder_to_the_next_at_once(tmp_path, start_holder):
    process = start_holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "out" / OWNER).is_file()
    start = time.monotonic()
    with lock_folder(tmp_path / "out"):
        assert json.loads((tmp_path / "out" / OWNER).read_text())["process"] == os.getpid()
    assert time.monotonic() - start < 2
    assert not (tmp_path / "out" / OWNER).exists()


def test_children_of_a_killed_process_may_hold_its_lock_a_little_longer(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    write_owner(out, process=process.pid, host=socket.gethostname())
    lock = FileLock(out / LOCK, thread_local=False)
    lock.acquire()
    timer = threading.Timer(0.5, lock.release)
    timer.start()
    with lock_folder(out):
        pass
    timer.join()


def test_a_thread_may_ask_again_and_another_may_not(tmp_path):
    errors = []

    def ask() -> None:
        try:
            with lock_folder(tmp_path):
                pass
        except ValueError as error:
            errors.append(error)

    with lock_folder(tmp_path):
        with lock_folder(tmp_path / "."):
            pass
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert (tmp_path / OWNER).is_file()
    assert len(errors) == 1
    ask()
    assert len(errors) == 1


@pytest.mark.parametrize("carries_locks", [True, False])
def test_an_owner_on_another_host_counts_while_it_renews_its_file(
    tmp_path, quick, monkeypatch, carries_locks
):
    """Whether the disk gives locks on this host alone, or none at all."""

    def fail(*args, **kwargs):
        raise OSError(ENOLCK, "No locks available")

    if not carries_locks:
        monkeypatch.setattr(FileLock, "acquire", fail)
    write_owner(tmp_path)
    ended = threading.Event()
    args = (tmp_path / OWNER, ended)
    thread = threading.Thread(target=folder_lock._renew_file, args=args)
    thread.start()
    with pytest.raises(ValueError, match="elsewhere"), lock_folder(tmp_path):
        pass
    ended.set()
    thread.join()
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / OWNER).read_text())["host"] == socket.gethostname()


def test_an_owner_renews_its_file(tmp_path, quick):
    with lock_folder(tmp_path):
        assert folder_lock._renews_file(tmp_path / OWNER)


@pytest.mark.parametrize("text", ["", "{}", '{"process": -1}', "[" * 10_000])
def test_a_damaged_owner_does_not_lock_anyone_out(tmp_path, text):
    (tmp_path / OWNER).write_text(text)
    with lock_folder(tmp_path):
        pass


def test_a_folder_stays_only_if_something_was_written(tmp_path):
    with lock_folder(tmp_path / "empty"):
        pass
    assert not (tmp_path / "empty").exists()
    with lock_folder(tmp_path / "used"):
        (tmp_path / "used" / "result").write_text("1")
    assert {path.name for path in (tmp_path / "used").iterdir()} == {LOCK, "result"}


def test_the_first_of_several_processes_locks_for_all(tmp_path, monkeypatch, start_holder):
    start_holder()
    monkeypatch.setenv("RANK", "1")
    with lock_folder(tmp_path / "out"):
        pass
