"""Thoughts before answers: where an answer begins in what a model has written.

A model with a thinking template writes its thought first, between marks such as `<think>` and
`</think>`. The thought is no part of the answer. So it is not scored, and not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# What begins a thought, and what ends it. gpt-oss ends it by opening another channel.
MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<mm:think>", "</mm:think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>", "<channel|>"),
    ("<|think|>", "<|content|>"),
    ("<|channel|>", "<|channel|>final<|message|>"),
)
# What a tokenizer writes for the first bytes of a character whose other bytes are still missing.
INCOMPLETE_CHARACTER = "\ufffd"
PROMPT_TAIL = 32  # tokens of a prompt among which a thought may have been opened


class Answer(NamedTuple):
    """What a model has written after a prompt.

    Attributes:
        text: The answer, without thoughts, special tokens and outer whitespace.
        raw: The same with thoughts.
        is_thinking: Whether a thought was begun and not ended.
    """

    text: str
    raw: str
    is_thinking: bool = False


def find_open_thought(prompt: str) -> str | None:
    """Return the mark that ends the thought which a prompt has opened; None where it opened none.

    Args:
        prompt: The prompt, or its end.
    """
    end = prompt.rstrip()
    for begin, close in MARKS:
        if end.endswith(begin):
            return close
    return None


def find_answer(text: str, closing: str | None = None) -> int | None:
    """Return where the answer begins, after all thoughts; None inside of a thought.

    Args:
        text: What the model has written so far.
        closing: What `find_open_thought` found in the prompt.
    """
    place = 0
    while True:
        if closing is None:
            closing = _find_closing(text[place:])
            if closing is None:
                return place
        end = text.find(closing, place)
        if end < 0:
            return None
        place = end + len(closing)
        closing = None


def _find_closing(text: str) -> str | None:
    """What ends the thought that a text begins with, or whose end alone it begins with."""
    text = text.lstrip()
    for begin, close in MARKS:
        if text.startswith((begin, close)):
            return close
    return None


def may_begin_thought(text: str) -> bool:
    """Whether a text may be the beginning of a mark, so that more of it must be seen."""
    text = text.strip().rstrip(INCOMPLETE_CHARACTER)
    return any(mark.startswith(text) and mark != text for pair in MARKS for mark in pair)


def strip_thoughts(text: str) -> str:
    """Return a text without the thoughts that it begins with, and without outer whitespace."""
    place = find_answer(text)
    return "" if place is None else text[place:].strip()


def has_thought(text: str) -> bool:
    """Whether a text begins with a thought, complete or not."""
    return find_answer(text) != 0


def read_answer(tokenizer, token_ids, closing: str | None = None) -> Answer:
    """Return the answer in the tokens that a model has written after a prompt.

    Args:
        tokenizer: The model's tokenizer.
        token_ids: The tokens, those that end the answer and pad it included.
        closing: What `find_open_thought` found in the prompt.
    """
    plain = tokenizer.decode(token_ids, skip_special_tokens=True)
    full = tokenizer.decode(token_ids, skip_special_tokens=False)
    return _read(plain, full, tokenizer.all_special_tokens, closing)


def read_written(text: str, special: Sequence[str], closing: str | None = None) -> Answer:
    """Return what `read_answer` would return for the tokens of a text.

    Args:
        text: What a model would write after a prompt, with special tokens.
        special: The tokenizer's special tokens.
        closing: What `find_open_thought` found in the prompt.
    """
    return _read(drop_tokens(text, special), text, special, closing)


def _read(plain: str, full: str, special: Sequence[str], closing: str | None) -> Answer:
    """The answer in a text without special tokens, and in the same text with them."""
    place = find_answer(plain, closing)
    if place != 0 and (place is not None or closing is None):
        return _cut_thoughts(plain, place)
    # The marks of some tokenizers are special tokens, which the plain text does not have.
    place = find_answer(full, closing)
    if place == 0:
        return Answer(plain.strip(), plain.strip())
    raw = _drop_trailing(full, special)
    if place is None:
        return Answer("", raw, is_thinking=True)
    return Answer(drop_tokens(full[place:], special).strip(), raw)


def _cut_thoughts(text: str, place: int | None) -> Answer:
    if place is None:
        return Answer("", text.strip(), is_thinking=True)
    return Answer(text[place:].strip(), text.strip())


def drop_tokens(text: str, special: Sequence[str]) -> str:
    """Return a text without special tokens."""
    for token in sorted(special, key=len, reverse=True):
        text = text.replace(token, "")
    return text


def _drop_trailing(text: str, special: Sequence[str]) -> str:
    """A text without the special tokens at its end."""
    text = text.strip()
    ends = tuple(special)
    while ends and text.endswith(ends):
        longest = max((token for token in special if text.endswith(token)), key=len)
        text = text.removesuffix(longest).rstrip()
    return text
