"""What `sparsecut demo` shows while it runs, and what it prints at its end."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..experiments.demo_progress import DemoStep, list_steps, measure_done

if TYPE_CHECKING:
    from ..experiments.study import Study

Log = Callable[[str], None]
LOOKS_PER_SECOND = 2
SECONDS_BETWEEN_LINES = 30  # where the screen is a file
NO_BARS = "SPARSECUT_DISABLE_PROGRESS_BARS"  # of what runs inside: there is one bar for all


class Clock:
    """Says how long the rest takes, by what was done since the start."""

    def __init__(self, done: float):
        self.start = time.monotonic()
        self.first = done

    def describe_left(self, done: float) -> str:
        """Return the time left in words; empty before anything can be said."""
        elapsed = time.monotonic() - self.start
        if done - self.first < 0.01 or elapsed < 2:
            return ""
        seconds = elapsed * (1 - done) / (done - self.first)
        if seconds < 50:
            return f"about {max(5, 5 * round(seconds / 5))} seconds left"
        minutes = round(seconds / 60)
        return f"about {minutes} minute{'s' * (minutes > 1)} left"


@contextmanager
def show_demo(study: Study, titles: Mapping[str, str], log: Log) -> Iterator[Log]:
    """Show all parts of a demo and one bar, in place on a terminal, else a line now and then.

    Args:
        study: The demo as a study.
        titles: The names of its variants for people.
        log: Takes lines where there is no terminal.

    Yields:
        What takes the lines of the study.
    """
    from rich.console import Console

    console = Console(stderr=True)
    show = _show_in_place if console.is_terminal else _show_lines
    with _without_other_bars(), show(study, titles, log, console) as lines:
        yield lines


@contextmanager
def _without_other_bars() -> Iterator[None]:
    """No bars of what runs inside, which would scroll the screen."""
    from transformers.utils import logging

    before = os.environ.get(NO_BARS)
    had_bars = logging.is_progress_bar_enabled()
    os.environ[NO_BARS] = "1"
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()
        if before is None:
            del os.environ[NO_BARS]
        else:
            os.environ[NO_BARS] = before


@contextmanager
def _show_in_place(study: Study, titles: Mapping[str, str], log: Log, console: Any):
    from rich.live import Live

    clock = Clock(measure_done(list_steps(study, titles)))

    def look() -> Any:
        return draw_steps(list_steps(study, titles), clock)

    settings = {"refresh_per_second": LOOKS_PER_SECOND, "transient": True}
    with Live(get_renderable=look, console=console, **settings):
        yield lambda line: None


@contextmanager
def _show_lines(study: Study, titles: Mapping[str, str], log: Log, console: Any):
    clock = Clock(measure_done(list_steps(study, titles)))
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LINES):
            log(describe_steps(list_steps(study, titles), clock))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda line: None if line.startswith(" ") else log(line)
    finally:
        is_over.set()
        thread.join()


def draw_steps(steps: list[DemoStep], clock: Clock) -> Any:
    """Return what a terminal shows: a line for each step, and one bar for all."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2))
    for step in steps:
        is_done = step.fraction == 1
        style = "green" if is_done else "dim" if not step.fraction else "bold"
        rows.add_row(Text("done" if is_done else "", "green"), Text(step.name, style), step.note)
    done = measure_done(steps)
    bar = Table.grid(padding=(0, 2))
    bar.add_row(ProgressBar(1.0, done, width=40), f"{done:.0%}", clock.describe_left(done))
    return Group(rows, bar)


def describe_steps(steps: list[DemoStep], clock: Clock) -> str:
    """Return the same as one line: how far it is, what is being done, and what comes."""
    done = measure_done(steps)
    begun = [f"{step.name} ({step.note})" for step in steps if 0 < step.fraction < 1]
    waiting = [step.name for step in steps if step.fraction == 0]
    parts = [f"{done:.0%} done", clock.describe_left(done), "now: " + ", ".join(begun)]
    if waiting:
        parts.append("then: " + ", ".join(waiting))
    return "; ".join(part for part in parts if part and part != "now: ")


def describe_end(page: Path, commands: Mapping[str, list[str]]) -> str:
    """Return where the page is, and commands to go on with.

    Args:
        page: The report.
        commands: What a command is for -> its words, without the program's name.
    """
    program, activation = find_program()
    lines = [f"The page with images, intervals and costs: {page}", "", "Go on with:"]
    if activation:
        lines += [f"  {activation}", "", "  # then the command `sparsecut` is found:"]
    for purpose, words in commands.items():
        lines += [f"  # {purpose}", f"  {program} {shlex.join(words)}"]
    return "\n".join(lines)


def find_program() -> tuple[str, str]:
    """Return how this package is called from a shell here, and what must be typed before.

    Where the command is not found, because its environment is not active, it is named as it will
    be, and the line that activates the environment.
    """
    if shutil.which("sparsecut"):
        return "sparsecut", ""
    for folder in ("bin", "Scripts"):
        script = Path(sys.prefix) / folder / "activate"
        if script.is_file():
            place = os.path.relpath(script)
            place = str(script) if place.startswith("..") else place
            return "sparsecut", shlex.join(["source", place])
    return f"{shlex.quote(sys.executable)} -m sparsecut", ""
