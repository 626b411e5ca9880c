"""One step of a long task, as plain facts: how far it is, and how long it will still take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .safe_text import escape_controls

SECONDS_IN_SECONDS = 90  # longer times are shown in minutes and halves, as often as lines come
MINUTES_IN_MINUTES = 90  # and longer ones in hours
Item = TypeVar("Item")


class Step:
    """A step that is under way; `show_step` makes it.

    It can be called with (number done, total), as functions that report their progress do.

    Attributes:
        label: What is done, such as "drawing images".
        total: How many items there are; None where nobody knows.
        done: How many are done.
        note: Further figures, such as a loss.
        start: When it began, in seconds of the clock.
        is_background: Whether the step is a whole command. It is shown where nothing in it is.
        has_own_bars: Whether a library draws its own bars on the terminal meanwhile.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        *,
        is_background: bool = False,
        has_own_bars: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = escape_controls(label, keep_lines=False)
        self.total = total
        self.done = 0
        self.note = ""
        self.is_background = is_background
        self.has_own_bars = has_own_bars
        self.start = clock()
        self._clock = clock
        self._first: tuple[int, float] | None = None  # (number done, time) that speed counts from
        self._last = self.start

    def __call__(self, done: int, total: int | None) -> None:
        """Set how many are done, and of how many."""
        self.total = total
        self._move(done, self._clock())

    def set_done(self, done: int, note: str | None = None) -> None:
        """Set how many are done, and what else is to be shown."""
        if note is not None:
            self.note = escape_controls(note, keep_lines=False)
        self._move(done, self._clock())

    def advance(self, count: int = 1) -> None:
        """Say that so many more are done."""
        if self._first is None:
            self._first = (self.done, self.start)
        self._move(self.done + count, self._clock())

    def restart(self, total: int | None) -> None:
        """Count anew, up to another total; the time goes on."""
        self.total = total
        self.done = 0
        self._first = (0, self._clock())

    def count(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items; each counts as done when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def _move(self, done: int, now: float) -> None:
        if self._first is None:
            self._first = (done, now)  # what a resumed step begins with took no time here
        self.done = done
        self._last = now

    def estimate_left(self, now: float) -> float | None:
        """Return the seconds that are left, None while that is not known.

        The item at hand counts as not done, so the estimate grows where it takes long.
        """
        if self.total is None or self._first is None:
            return None
        first, since = self._first
        made = self.done - first
        if made <= 0:
            return None
        spent = max(self._last - since, (now - since) * made / (made + 1))
        seconds = spent / made * (self.total - self.done) - (now - self._last)
        return max(seconds, 0.0)

    def describe_count(self) -> str:
        """Return how many are done; empty where nothing is counted."""
        if self.total:
            return f"{self.done:,} of {self.total:,}"
        return f"{self.done:,}" if self.done else ""

    def describe(self, now: float) -> str:
        """Return what is shown beside the label: count, time, time left, further figures."""
        parts = [self.describe_count(), f"{format_seconds(now - self.start)} so far"]
        left = self.estimate_left(now)
        if left is not None:
            parts.append(f"about {format_seconds(left)} left")
        return ", ".join(part for part in [*parts, self.note] if part)


def format_seconds(seconds: float) -> str:
    """Return a duration as "40 s", "2.5 min" or "3.5 h"."""
    if seconds < SECONDS_IN_SECONDS:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 30) / 2
    return f"{minutes:g} min" if minutes < MINUTES_IN_MINUTES else f"{minutes / 60:.1f} h"
