"""Records with words that the tokenizer does not know, counted before training.

A model that learns the unknown token answers with nothing, although its loss falls.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ..chat_templates.unknown_words import (
    find_unknown_spans,
    find_unknown_words,
    get_unknown_id,
    list_words,
)
from ..schema import UserError
from .examples import Example
from .labels import find_target_tokens
from .rendering import Span

MOST_LEARNED = 0.01  # of the records; from this fraction on it is no matter of a few rare words


class KnowsUnknownToken:
    """What has a processor, and so knows the token for words that its tokenizer does not know."""

    processor: Any

    @cached_property
    def unknown_id(self) -> int | None:
        """That token; None where the tokenizer can write any text."""
        return get_unknown_id(self.processor.tokenizer)


class UnknownText(NamedTuple):
    """Which text of a record has words that the tokenizer does not know.

    Attributes:
        learned: Whether that is text which is learned.
        prompt: Whether that is other text.
    """

    learned: bool
    prompt: bool


def find_unknown_text(processor, text: str, spans: list[Span], unknown: int) -> UnknownText:
    """Find out which text of a rendered record the tokenizer does not know.

    Args:
        processor: Its tokenizer is used. Its placeholder is no word.
        text: The text.
        spans: The characters of it that are learned, in order.
        unknown: The token for unknown text.
    """
    placeholder = processor.image_token
    words = text.replace(placeholder, " " * len(placeholder))
    found = find_unknown_spans(processor.tokenizer, words, unknown)
    are_learned = find_target_tokens(found, spans)
    return UnknownText(any(are_learned), not all(are_learned))


@dataclass
class UnknownCount:
    """How many records have unknown words.

    Attributes:
        records: Records that were looked at.
        learned: Those with unknown words in text that is learned.
        prompts: Those with unknown words in other text.
        first_learned: The first of `learned`.
        first_prompt: The first of `prompts`.
    """

    records: int = 0
    learned: int = 0
    prompts: int = 0
    first_learned: Example | None = None
    first_prompt: Example | None = None

    def add(self, example: Example, found: UnknownText | None) -> None:
        """Count a record; None is one without unknown words."""
        self.records += 1
        if found is None:
            return
        if found.learned:
            self.learned += 1
            self.first_learned = self.first_learned or example
        if found.prompt:
            self.prompts += 1
            self.first_prompt = self.first_prompt or example

    def check(self, stage: str, tokenizer) -> list[str]:
        """Return warnings about unknown words, at most one for learned text and one for prompts.

        Args:
            stage: The stage that learns from the records.
            tokenizer: Their tokenizer.

        Raises:
            UserError: So many records have unknown words in what is learned that it is no accident.
        """
        warnings = []
        token = tokenizer.unk_token
        if self.learned:
            problem = (
                f"in {self.learned:,} of {self.records:,} records answers have words that the"
                f" tokenizer does not know: the model would learn {token} in their place, and could"
                " never answer with them; the first is"
                f" {_describe(self.first_learned, tokenizer, True)}"
            )
            if self.learned >= MOST_LEARNED * self.records:
                raise UserError(
                    f"stage {stage}: {problem}; use a language model whose tokenizer can write any"
                    " word (examples/small_backbones.py learns one from records), or other words"
                )
            warnings.append(problem)
        if self.prompts:
            warnings.append(
                f"in {self.prompts:,} of {self.records:,} records prompts have words that the"
                f" tokenizer does not know: the model reads {token} in their place; the first is"
                f" {_describe(self.first_prompt, tokenizer, False)}"
            )
        return warnings


def _describe(example: Example, tokenizer, is_learned: bool) -> str:
    """A record's id and place, and its unknown words in answers or in other turns."""
    texts = []
    for message in example.get_messages(" "):
        if (message["role"] == "assistant") == is_learned:
            texts.append(message["content"])
    words = find_unknown_words(tokenizer, "\n".join(texts))
    place = "" if example.place == example.id else f" ({example.place})"
    shown = list_words(words) if words else "text that the chat template adds"
    return f"{example.id!r}{place}, with {shown}"
