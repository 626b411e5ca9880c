"""Steps are shown while they run, and remembered where something stops them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .display import DISPLAY
from .step import Step

PLACE = "_sparsecut_place"  # an exception's attribute: the steps that were under way


@contextmanager
def show_step(
    label: str,
    total: int | None = None,
    *,
    is_background: bool = False,
    has_own_bars: bool = False,
) -> Iterator[Step]:
    """Show that something is done, inside the block.

    Args:
        label: What is done, such as "drawing images".
        total: The number of items, where it is known; then the time left is shown.
        is_background: Show it only while no other step is shown.
        has_own_bars: A library draws its own bars, so no bar is drawn on a terminal meanwhile.

    Yields:
        The step: loop over `step.count(items)`, call `step.advance()` after each item, or call the
        step itself with (number done, total).
    """
    kind = {"is_background": is_background, "has_own_bars": has_own_bars}
    step = Step(label, total, **kind, clock=DISPLAY.clock)
    DISPLAY.begin(step)
    is_whole = False
    try:
        yield step
        is_whole = True
    except BaseException as error:
        if getattr(error, PLACE, None) is None:
            setattr(error, PLACE, [one for one in DISPLAY.steps if not one.is_background])
        raise
    finally:
        DISPLAY.end(step, is_whole=is_whole)


def describe_place(error: BaseException) -> str:
    """Return the steps that were under way when an exception arose; empty where there were none."""
    texts = []
    for step in getattr(error, PLACE, None) or ():
        count = step.describe_count()
        texts.append(f"{step.label} ({count})" if count else step.label)
    return ", ".join(texts)
