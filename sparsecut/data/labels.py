"""The label mask: which tokens of a conversation are learned."""

from __future__ import annotations

from collections.abc import Sequence

from .rendering import Span

IGNORED = -100  # the label of a token that is not learned


def find_learned_tokens(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Return for each token whether one of the spans covers a character of it.

    Args:
        offsets: The characters of each token, as (first, one after the last).
        spans: The characters that are learned, in order.
    """
    learned = []
    current = 0
    for start, end in offsets:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        is_learned = current < len(spans) and _covers(spans[current], start, end)
        learned.append(is_learned)
    return learned


def _covers(span: Span, start: int, end: int) -> bool:
    first, last = span
    if start < end:
        return start < last and end > first
    # Some tokenizers give whitespace no width. A token at (0, 0) does not come from the text.
    return first <= start < last and end > 0
