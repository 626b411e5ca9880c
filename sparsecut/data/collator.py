"""From the items of a dataset to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schema import UserError
from .encoding import ExampleEncoder, get_pad_token_id, join_image_inputs
from .labels import IGNORED
from .native_encoding import NativeExampleEncoder
from .native_packing import CountPositions, pack_batch

IMAGE_KEYS = ("images", "pixel_values", "vision_states")  # where an item has its images


class Collator:
    """Joins items to a batch.

    A batch holds input_ids, attention_mask and labels [B, L], padded on the right. It also holds
    the inputs of all images in reading order: pixel_values [images, ...], or vision_states as
    tap -> [images, V, N, D]. The processor of an upgraded model names its inputs itself.

    Packed rows (lists of items) become one row each, with position_ids [B, L] in place of the
    attention_mask. Errors of broken records that others have replaced stand in "broken", which the
    model does not take.

    Attributes:
        encoder: Builds the batches.
        pad_to: The length of a batch is a multiple of it. A compiled model then sees few shapes.
        defer_errors: Return {"error": error} in place of raising an error of the user's data. A
            worker process would pass on only its text; see `raise_errors`.
        blank: An item with an image, added to a batch that has none. None adds nothing.
        count_positions: Counts the positions of packed records where an upgraded model's base has
            several axes of them.
    """

    def __init__(
        self,
        encoder: ExampleEncoder,
        *,
        pad_to: int | None = None,
        defer_errors: bool = False,
        count_positions: CountPositions | None = None,
    ):
        self.encoder = encoder
        self.count_positions = count_positions
        self.pad_to = pad_to or 1
        self.defer_errors = defer_errors
        self.blank: dict | None = None
        self.pad_token_id = get_pad_token_id(encoder.processor.tokenizer)

    def __call__(self, items: Sequence[dict] | Sequence[list[dict]]) -> dict:
        """Return the batch of some items, or of rows of items."""
        try:
            if isinstance(items[0], list):
                return self._build_packed(items)
            return self._build(items)
        except UserError as error:
            if not self.defer_errors:
                raise
            return {"error": error}

    def _build(self, items: Sequence[dict]) -> dict:
        broken = _collect_broken(items)
        if not self._needs_blank(items):
            return {**self.encoder.build_batch(items, self.pad_to), **broken}
        batch = self.encoder.build_batch([*items, self.blank], self.pad_to)
        batch["labels"][-1] = IGNORED
        return {**batch, **broken}

    def _needs_blank(self, items: Sequence[dict]) -> bool:
        return self.blank is not None and not any(_has_image(item) for item in items)

    def _build_packed(self, rows: Sequence[list[dict]]) -> dict:
        """A batch of rows: position_ids start anew with every item.

        Attention tells the items apart by their positions, which transformers looks at only where
        there is no attention_mask.
        """
        broken = _collect_broken(_flatten(rows))
        if self._needs_blank(_flatten(rows)):
            rows = [*rows, [self.blank]]
        if isinstance(self.encoder, NativeExampleEncoder):
            return {**self._build_native_rows(rows), **broken}
        joined = [_join_items(items) for items in rows]
        batch = self.encoder.pad(joined, self.pad_to)
        del batch["attention_mask"]
        batch["position_ids"] = torch.zeros_like(batch["input_ids"])
        for i, row in enumerate(joined):
            batch["position_ids"][i, : len(row["position_ids"])] = row["position_ids"]
        return {**batch, **join_image_inputs(_flatten(rows)), **broken}

    def _build_native_rows(self, rows: Sequence[list[dict]]) -> dict:
        """The same for an upgraded model: its base's processor prepares all records together."""
        batch = self.encoder.build_batch(_flatten(rows))
        if rows[-1][0] is self.blank:
            batch["labels"][-1] = IGNORED
        counts = [len(items) for items in rows]
        return pack_batch(batch, counts, self.pad_token_id, self.count_positions)


def _collect_broken(items: Sequence[dict]) -> dict[str, list[UserError]]:
    """The batch's "broken", if any; raises an error that stands in the place of an item."""
    broken = []
    for item in items:
        if "error" in item:
            raise item["error"]
        broken += item.get("broken", ())
    return {"broken": broken} if broken else {}


def _has_image(item: dict) -> bool:
    return any(len(item.get(key, ())) > 0 for key in IMAGE_KEYS)


def _join_items(items: Sequence[dict]) -> dict[str, Tensor]:
    """input_ids, labels and position_ids [L] of items that follow one another."""
    ids = torch.cat([item["input_ids"] for item in items])
    labels = torch.cat([item["labels"] for item in items])
    positions = torch.cat([torch.arange(len(item["input_ids"])) for item in items])
    # The first token of a later item does not follow from the item before.
    labels[1:][positions[1:] == 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def _flatten(rows: Sequence[list[dict]]) -> list[dict]:
    return [item for row in rows for item in row]
