"""The one display of a process: a bar for each step on a terminal, a line now and then elsewhere.

A thread draws it, so a step that computes without a pause is shown too. It costs nothing that can
be measured: the thread looks four times a second, and draws twice a second at most.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from .step import Step

SECONDS_BETWEEN_LOOKS = 0.25
SECONDS_BETWEEN_DRAWINGS = 0.5
SECONDS_TO_BAR = 1.0  # a quicker step shows no bar, so that nothing flickers
SECONDS_TO_LINE = 4.0
SECONDS_BETWEEN_LINES = 30.0
SECONDS_TO_IDLE = 2.0  # then the thread ends
MOST_BARS = 3
LOADING = "loading libraries"
BAR_WIDTH = 20
WIDTH_OF_THE_REST = 70  # columns of a bar and of the text beside it
LEAST_LABEL = 16
VARIABLE = "SPARSECUT_DISABLE_PROGRESS_BARS"
OTHER_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
TRUE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads them


class Display:
    """Shows the steps that are under way.

    Attributes:
        steps: The steps, the outermost first.
        is_disabled: Whether a caller has switched it off; None leaves that to the environment.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
        has_thread: bool = True,
    ) -> None:
        self.steps: list[Step] = []
        self.is_disabled: bool | None = None
        self.clock = clock
        self.lock = threading.RLock()
        self._stream = stream
        self._is_terminal = is_terminal
        self._has_thread = has_thread
        self._thread: threading.Thread | None = None
        self._view: _Bars | _Lines | None = None

    def begin(self, step: Step) -> None:
        """Show a step inside of those under way."""
        with self.lock:
            if not self.steps:
                self._view = self._choose_view()
            self.steps.append(step)
            is_drawn = self._has_thread and self._view is not None
            if is_drawn and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._draw_often, daemon=True)
                self._thread.start()

    def end(self, step: Step, *, is_whole: bool) -> None:
        """Show a step no longer.

        Args:
            step: One of the steps.
            is_whole: Whether it came to its end.
        """
        with self.lock:
            if step in self.steps:
                self.steps.remove(step)
            if self._view is not None:
                self._view.end(step, self.clock(), is_whole=is_whole)
            if not self.steps:
                self.clear()

    def look(self) -> None:
        """Draw what is due now."""
        with self.lock:
            shown = [step for step in self.steps if not step.is_background] or self.steps
            for step in shown:
                if step.is_background:
                    step.note = LOADING if is_importing() else ""
            if shown and self._view is not None:
                self._view.draw(list(shown), self.clock())

    def clear(self) -> None:
        """Remove the bars from the screen until they are drawn again."""
        with self.lock:
            if self._view is not None:
                self._view.clear()

    def forget(self) -> None:
        """In a forked process: show nothing, and leave the screen to the process it came from."""
        self.lock = threading.RLock()
        self.steps = []
        self._view = self._thread = None
        self.is_disabled = True

    def _choose_view(self) -> _Bars | _Lines | None:
        if self.is_disabled if self.is_disabled is not None else is_switched_off():
            return None
        stream = self._stream or sys.stderr
        if stream is None:  # a process without a console
            return None
        is_terminal = self._is_terminal
        if is_terminal is None:
            is_terminal = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        return _Bars(stream) if is_terminal else _Lines(stream)

    def _draw_often(self) -> None:
        idle_since = time.monotonic()
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            with self.lock:
                if self._thread is not threading.current_thread():
                    return
                if self.steps:
                    idle_since = time.monotonic()
                elif time.monotonic() - idle_since > SECONDS_TO_IDLE:
                    self._thread = None
                    return
            # A terminal or a pipe that is gone must not stop the work, nor this thread.
            with contextlib.suppress(OSError, ValueError):
                self.look()


class _Lines:
    """A line after some seconds, then one every half minute, each with all steps under way."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.due: dict[Step, float] = {}  # by the outermost step shown: when its next line comes

    def draw(self, steps: list[Step], now: float) -> None:
        outermost = steps[0]
        if now < self.due.get(outermost, outermost.start + SECONDS_TO_LINE):
            return
        first = outermost.start + SECONDS_BETWEEN_LINES
        self.due[outermost] = first if now < first else now + SECONDS_BETWEEN_LINES
        self._write("; ".join(f"{step.label}: {step.describe(now)}" for step in steps))

    def end(self, step: Step, now: float, *, is_whole: bool) -> None:
        if self.due.pop(step, None) is not None and is_whole and not step.is_background:
            seconds = now - step.start
            self._write(f"{step.label}: done after {seconds:,.0f} s")

    def clear(self) -> None:
        """Lines stay."""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(f"{text}\n")
            self.stream.flush()


class _Bars:
    """Bars that are drawn in place, by rich, and removed when their steps end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.bars: Any = None
        self.tasks: dict[Step, Any] = {}
        self.drawn = 0.0

    def draw(self, steps: list[Step], now: float) -> None:
        if any(step.has_own_bars for step in steps):
            self.clear()
            return
        slow = [step for step in steps if now - step.start >= SECONDS_TO_BAR][-MOST_BARS:]
        if not slow or (self.bars is not None and now - self.drawn < SECONDS_BETWEEN_DRAWINGS):
            return
        self.drawn = now
        if self.bars is None:
            self.bars = self._start_bars()
        for step in self.tasks.keys() - set(slow):
            self.bars.remove_task(self.tasks.pop(step))
        for step in slow:
            if step not in self.tasks:
                label = shorten(step.label, self.bars.console.width - WIDTH_OF_THE_REST)
                self.tasks[step] = self.bars.add_task(label, total=step.total, text="")
            settings = {"total": step.total, "completed": step.done, "text": step.describe(now)}
            self.bars.update(self.tasks[step], **settings)
        self.bars.refresh()

    def end(self, step: Step, now: float, *, is_whole: bool) -> None:
        """The next drawing leaves it out, and removes its line."""

    def clear(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars = None
        self.tasks = {}

    def _start_bars(self) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        texts = [
            TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[text]")
        ]
        bars = Progress(
            texts[0],
            BarColumn(bar_width=BAR_WIDTH),
            texts[1],
            console=Console(file=self.stream, force_terminal=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # files stay files
        )
        bars.start()
        return bars


def is_importing() -> bool:
    """Whether the main thread is importing a module, which takes long for some libraries."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def shorten(label: str, width: int) -> str:
    """Return a label without its middle, where it is wider than some columns."""
    width = max(width, LEAST_LABEL)
    half = (width - 3) // 2
    return label if len(label) <= width else f"{label[:half]}...{label[-half:]}"


def is_switched_off() -> bool:
    """Whether the environment, or a library of Hugging Face, asks for no progress bars."""
    own = os.environ.get(VARIABLE)
    if own is not None:
        return own.upper() in TRUE
    if os.environ.get("RANK", "0") != "0":
        return True  # of the processes of one training, the first one shows
    if any(os.environ.get(name, "").upper() in TRUE for name in OTHER_VARIABLES):
        return True
    libraries = (
        ("huggingface_hub.utils", "are_progress_bars_disabled", True),
        ("datasets.utils", "are_progress_bars_disabled", True),
        ("transformers.utils.logging", "is_progress_bar_enabled", False),
    )
    for module, name, disabled in libraries:
        ask = getattr(sys.modules.get(module), name, None)
        if ask is not None and ask() is disabled:
            return True
    return False


DISPLAY = Display()

if sys.platform != "win32":
    # A forked process must neither draw nor find the lock taken by a thread that it does not have.
    os.register_at_fork(
        before=lambda: DISPLAY.lock.acquire(),
        after_in_parent=lambda: DISPLAY.lock.release(),
        after_in_child=DISPLAY.forget,
    )


def disable_progress_bars() -> None:
    """Show no progress in this process from now on."""
    DISPLAY.is_disabled = True


def enable_progress_bars() -> None:
    """Show progress from now on, whatever the environment says."""
    DISPLAY.is_disabled = False


@contextlib.contextmanager
def pause_display() -> Iterator[None]:
    """Print inside the block: bars are removed before, and drawn again later."""
    with DISPLAY.lock:
        DISPLAY.clear()
        yield
