"""Prompts of requests before they are queued: rendered, checked, and their tokens counted.

A tokenizer changes its padding while it works, so only one thread may use it. Requests are read
with copies of the model's processor: the model never waits for somebody's long text.
"""

from __future__ import annotations

import copy
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..chat_templates.markers import find_markers, get_special_tokens
from ..prompts import encode_prompts, get_max_length, list_media_tokens, render_prompt
from ..schema import UserError
from .image_cache import PreparedImage

NUM_COPIES = 2
MAX_ARGUMENT = 200  # characters of an argument of the chat template
PIECE_CHARACTERS = 20_000
PIECE_SLACK = 100  # tokens that a piece may have more than its part of the whole text


class PromptReader:
    """Reads prompts; every method may be called from any thread.

    Attributes:
        image_token: The model's placeholder for an image.
        reserved: All special tokens that no text may contain.
        reserved_ids: Their ids in the tokenizer.
    """

    def __init__(self, model, processor, *, uses_views: bool):
        """
        Args:
            model: A SparseCut model.
            processor: Its processor, which stays the model's own.
            uses_views: Whether images are held as views, so that only texts are encoded here.
        """
        self.model = model
        self.uses_views = uses_views
        self.image_token = processor.image_token
        self.reserved = list_media_tokens(processor, model.config) | {*find_markers(processor)}
        known = processor.tokenizer.get_added_vocab()
        self.reserved_ids = {known[token] for token in self.reserved if token in known}
        self.copies: queue.SimpleQueue = queue.SimpleQueue()
        for _ in range(NUM_COPIES):
            self.copies.put(copy.deepcopy(processor))

    @contextmanager
    def _borrow(self) -> Iterator:
        """A processor that nobody else uses meanwhile."""
        processor = self.copies.get()
        try:
            yield processor
        finally:
            self.copies.put(processor)

    def build_prompt(self, messages: list[dict], arguments: dict[str, Any] | None = None) -> str:
        """The text of a conversation by the chat template.

        Args:
            messages: The conversation.
            arguments: Arguments of the chat template.

        Raises:
            UserError: Where the template refuses the conversation, or a text contains what the
                tokenizer reads as a special token, however it is written.
        """
        with self._borrow() as processor:
            # Not cached, because texts of strangers would fill the memory.
            if arguments:
                _check_arguments(processor, arguments)
            prompt = render_prompt(processor, messages, arguments, cached=False)
            self._check_length(processor, prompt)
            for i, message in enumerate(messages):
                self._check_special_tokens(processor, message["content"], f"messages[{i}]")
        return prompt

    def _check_length(self, processor, prompt: str) -> None:
        """Refuse a prompt that is far too long before all of it is tokenized."""
        limit = get_max_length(self.model)
        if limit is None or len(prompt) <= PIECE_CHARACTERS:
            return
        num_tokens = 0
        for start in range(0, len(prompt), PIECE_CHARACTERS):
            piece = prompt[start : start + PIECE_CHARACTERS]
            num_tokens += len(_tokenize(processor, piece)) - PIECE_SLACK
            if num_tokens > limit:
                raise UserError(
                    f"the prompt has {len(prompt)} characters, and already their first"
                    f" {start + len(piece)} are more than the {limit} tokens of the language"
                    " model; shorten it"
                )

    def _check_special_tokens(self, processor, content: str, place: str) -> None:
        """Some tokenizers change letters first, and so make special tokens of other texts."""
        ids = _tokenize(processor, content.replace(self.image_token, "\n"))
        found = self.reserved_ids.intersection(ids)
        if found:
            token = processor.tokenizer.convert_ids_to_tokens(min(found))
            raise UserError(
                f"{place}.content contains what the tokenizer reads as the special token {token};"
                " leave it out"
            )

    def count_tokens(self, prompt: str, images: Sequence[PreparedImage]) -> int:
        """Tokens of a prompt, those of its images included.

        Raises:
            UserError: Where the processor refuses the images.
        """
        whole_images = None if self.uses_views else [[image.image for image in images]]
        try:
            with self._borrow() as processor:
                inputs = encode_prompts(processor, [prompt], whole_images, list_grids([images]))
        except UserError:
            raise
        except ValueError as error:  # such as an image that is too long for its height
            raise UserError(
                f"the model's processor refuses the images: {error}; send others"
            ) from None
        return inputs["input_ids"].shape[1]


def list_grids(images: Sequence[Sequence[PreparedImage]]) -> list[list] | None:
    """Rows and columns of the images of each prompt; None where every image takes as many tokens.

    Args:
        images: The images of each prompt.
    """
    grids = []
    for row in images:
        grids.append([image.grid[0].tolist() for image in row if image.grid is not None])
    return grids if any(grids) else None


def _check_arguments(processor, arguments: dict[str, Any]) -> None:
    """Refuse special tokens in arguments of the chat template, which may write them anywhere."""
    special = get_special_tokens(processor.tokenizer)
    for name, value in arguments.items():
        text = str(value)
        if len(text) > MAX_ARGUMENT or any(token in text for token in special):
            raise UserError(
                f"chat_template_kwargs.{name} is {text[:60]!r}, but must be true, false, a number,"
                f" or up to {MAX_ARGUMENT} characters without special tokens"
            )


def _tokenize(processor, text: str) -> list[int]:
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]
