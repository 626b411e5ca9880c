"""The label mask: which tokens of a conversation are targets."""

from __future__ import annotations

from collections.abc import Sequence

from .rendering import Span

IGNORED = -100  # the label of a token that is not a target


def find_target_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether one of the spans covers a character of it.

    Args:
        offsets: The characters of each token, as (first, one after the last).
        spans: The characters that are targets, in order.
    """
    are_targets = []
    current = 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        is_target = current < len(spans) and _covers(spans[current], start, end)
        are_targets.append(is_target)
    return are_targets


def _covers(span: Span, start: int, end: int) -> bool:
    first, last = span
    if start < end:
        return start < last and end > first
    # Some tokenizers give whitespace no width. A token at (0, 0) does not come from the text.
    return first <= start < last and end > 0
