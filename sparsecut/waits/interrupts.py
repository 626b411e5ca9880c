"""Signals that stop a command: SIGTERM ends it as Ctrl-C does, so that it cleans up."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived."""


@contextmanager
def interrupt_at_sigterm() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM inside the block, where the signal would kill the process.

    Worker processes are ended then, and files that are half written are removed.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise Terminated


@contextmanager
def end_children_at_error() -> Iterator[None]:
    """End the processes that multiprocessing has started, where the block does not come to its end.

    Their pool would wait until they have done what they are at.
    """
    try:
        yield
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise


def ignore_ctrl_c() -> None:
    """In a worker process: leave Ctrl-C to the process that started it, which ends this one.

    A terminal sends it to all processes of a command, and each would print where it was.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
