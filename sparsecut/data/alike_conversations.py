"""Conversations that differ in plain words alone: their answers are found once for all of them.

Finding answers renders a conversation once up to each answer, which takes time that grows with the
square of its turns. A conversation of probe words with the same roles and images shows the places.
They hold for a true one where its rendered text is that of the probes with the words exchanged.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from ..chat_templates.rendering import (
    apply_template,
    freeze_special_tokens,
    get_chat_template,
    get_tokens_per_image,
)
from ..schema import UserError

PROBE = "wordprobe{:05d}"  # all of one length, so that none begins another
MOST_KNOWN = 4096
# Templates look for marks of thoughts and tools, and for switches such as /think.
NOT_PLAIN = re.compile(r"[<>\[\]{}|/\\]")

Span = tuple[int, int]


class _Places(NamedTuple):
    """Where a rendered conversation holds what.

    Attributes:
        constants: The text before, between and after the words.
        spans: Both ends of each answer, as (number of a piece, characters after its start). Pieces
            are constants and words in turn.
    """

    constants: list[str]
    spans: list[tuple[tuple[int, int], tuple[int, int]]]


_known: dict[tuple, _Places | None] = {}


def find_alike(
    messages: list[dict], processor, find: Callable[[list[dict]], tuple[str, list[Span]]]
) -> tuple[str, list[Span]] | None:
    """Find a conversation's text and answers by one that is alike.

    Args:
        messages: The conversation.
        processor: Its template and tokenizer are used.
        find: Finds text and answers of any conversation.

    Returns:
        What `find` would return, or None where only `find` can tell.
    """
    if sum(message["role"] == "assistant" for message in messages) < 2:
        return None
    special = tuple(processor.tokenizer.all_special_tokens)
    parts = [_split(message, processor.image_token, special) for message in messages]
    if None in parts:
        return None
    starts, words = zip(*parts, strict=True)
    roles = tuple(message["role"] for message in messages)
    key = (
        roles,
        starts,
        get_chat_template(processor),
        freeze_special_tokens(processor.tokenizer),
        special,
        processor.image_token,
        get_tokens_per_image(processor) is None,
    )
    if key not in _known:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        _known[key] = _find_places(roles, starts, find)
    places = _known[key]
    if places is None:
        return None
    text, _ = apply_template(processor, messages, cached=False)
    pieces = _join(places.constants, words)
    if text != "".join(pieces):
        return None
    offsets = _get_offsets(pieces)
    spans = [(offsets[a] + b, offsets[c] + d) for (a, b), (c, d) in places.spans]
    return text, spans


def _split(message: dict, image_token: str, special: tuple[str, ...]) -> tuple[str, str] | None:
    """The images that a message begins with, and its words; None where these are not plain."""
    if message.keys() != {"role", "content"}:
        return None
    content = message["content"]
    images = re.match(rf"(?:{re.escape(image_token)}\s*)*", content).group()
    words = content[len(images) :]
    is_plain = words and words == words.strip() and not NOT_PLAIN.search(words)
    if not is_plain or any(token in words for token in special):
        return None
    return images, words


def _find_places(roles: tuple, starts: tuple, find: Callable) -> _Places | None:
    """The places in a conversation of probes; None where they cannot be told."""
    probes = [PROBE.format(number) for number in range(len(roles))]
    messages = []
    for role, start, probe in zip(roles, starts, probes, strict=True):
        messages.append({"role": role, "content": start + probe})
    try:
        text, spans = find(messages)
    except UserError:  # the true conversation shows why
        return None
    found = [match.group() for match in re.finditer(PROBE.split("{")[0] + r"\d{5}", text)]
    if found != probes:
        return None
    constants = re.split("|".join(probes), text)
    offsets = _get_offsets(_join(constants, probes))
    ends = [_place(position, offsets) for span in spans for position in span]
    if any(piece % 2 and inside for piece, inside in ends):  # inside of a word
        return None
    return _Places(constants, list(zip(ends[::2], ends[1::2], strict=True)))


def _join(constants: list[str], words: Sequence[str]) -> list[str]:
    """Constants and words in turn."""
    pieces = [piece for pair in zip(constants, words, strict=False) for piece in pair]
    return [*pieces, constants[-1]]


def _get_offsets(pieces: list[str]) -> list[int]:
    """Where each piece begins."""
    return [0, *accumulate(map(len, pieces[:-1]))]


def _place(position: int, offsets: list[int]) -> tuple[int, int]:
    """A position as the number of its piece, and characters after the piece's start."""
    piece = bisect_right(offsets, position) - 1
    return piece, position - offsets[piece]
