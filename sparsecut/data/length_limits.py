"""How long a record may be, and what is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..schema import UserError
from .labels import IGNORED


@dataclass(frozen=True)
class Limits:
    """How long a record may be, in tokens.

    Attributes:
        max_length: Longer records are cut to this length. None cuts nothing.
        model_limit: Positions of the language model. What is longer after the cut is refused.
        max_image_tokens: A record with more image tokens is refused.
    """

    max_length: int | None = None
    model_limit: int | None = None
    max_image_tokens: int | None = None

    def check(
        self, ids: Sequence[int], labels: Sequence[int], image_token_ids: Collection[int]
    ) -> None:
        """Check a record before it is cut.

        Args:
            ids: Token ids of the whole record.
            labels: Their labels.
            image_token_ids: The ids of image tokens.

        Raises:
            UserError: The record is too long, would lose image tokens, or has no token to train on.
        """
        self._check_image_tokens(ids, image_token_ids)
        self._check_length(ids)
        self._check_cut(ids, image_token_ids)
        self._check_labels(labels)

    def _check_image_tokens(self, ids: Sequence[int], image_token_ids: Collection[int]) -> None:
        if self.max_image_tokens is None:
            return
        number = _count(ids, image_token_ids)
        if number > self.max_image_tokens:
            raise UserError(
                f"the record has {number} image tokens, but max_image_tokens="
                f"{self.max_image_tokens}; raise it, or skip such records (on_error: skip)"
            )

    def _check_length(self, ids: Sequence[int]) -> None:
        if self.model_limit is None:
            return
        if len(ids[: self.max_length]) > self.model_limit:
            raise UserError(
                f"the record has {len(ids)} tokens, but the language model takes"
                f" {self.model_limit}; set the stage's max_length to cut such records, or skip"
                " them (on_error: skip)"
            )

    def _check_cut(self, ids: Sequence[int], image_token_ids: Collection[int]) -> None:
        if self.max_length is None or len(ids) <= self.max_length:
            return
        before = _count(ids, image_token_ids)
        after = _count(ids[: self.max_length], image_token_ids)
        if after < before:
            raise UserError(
                f"the record has {len(ids)} tokens and max_length={self.max_length} would cut off"
                f" image tokens ({after} of {before} left); raise max_length, shorten the text, or"
                " skip such records (on_error: skip)"
            )

    def _check_labels(self, labels: Sequence[int]) -> None:
        labels = labels[: self.max_length]
        # The first position is never predicted, so its label does not count.
        if any(label != IGNORED for label in labels[1:]):
            return
        remedy = "check the chat template and the answer"
        if self.max_length is not None:
            remedy = "raise max_length"
        raise UserError(
            f"none of the {len(labels)} tokens is left to train on: all labels are masked; {remedy}"
        )


NO_LIMITS = Limits()


def _count(ids: Sequence[int], wanted: Collection[int]) -> int:
    return sum(token in wanted for token in ids)
