"""From examples to the inputs of a model, labels included.

There are two encoders with one interface, chosen by `example_encoder`: `FixedExampleEncoder` for
the processors of built models, and `NativeExampleEncoder` for an upgraded model's own processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..audio import Clip
from ..prompts import adds_special_tokens, get_tokens_per_image
from ..schema import UserError
from .errors import RecordError
from .examples import Example
from .labels import IGNORED, find_target_tokens
from .length_limits import NO_LIMITS, Limits
from .native_encoding import NativeExampleEncoder
from .rendering import Rendered, render_example
from .unknown_records import KnowsUnknownToken, UnknownText, find_unknown_text

GRIDS = "image_grids"


class ExampleEncoder(Protocol):
    """What both encoders have in common.

    Attributes:
        processor: The model's processor.
        template: "chat" for the processor's chat template, "plain" for images and a caption.
        limits: How long a record may be.
        tokens_per_image: Image tokens of one image; 1 where only a batch shows their number.
        checks_in_parallel: Whether `check` may run in several processes.
    """

    processor: object
    template: str
    limits: Limits
    tokens_per_image: int
    checks_in_parallel: bool

    def check(self, example: Example, *, open_images: bool, is_first: bool) -> UnknownText | None:
        """Raise RecordError where a model cannot be trained on the example.

        Args:
            example: The example.
            open_images: Open its images too.
            is_first: Whether it is the first one that is checked.

        Returns:
            What `find_unknown` does.
        """

    def find_unknown(self, example: Example, encoded: dict) -> UnknownText | None:
        """Return where an example that was encoded has words that the tokenizer does not know."""

    def encode(self, example: Example) -> dict:
        """Return the part of a dataset's item that needs no images; RecordError for a bad one."""

    def encode_images(self, images: list[Image.Image]) -> dict:
        """Return the part of a dataset's item that holds the images."""

    def get_length(self, encoded: dict) -> int:
        """Return the tokens of what `encode` returned; 0 where only a batch shows them."""

    def get_lengths(self, encoded: Sequence[dict]) -> list[int]:
        """Return the tokens of each; without image tokens where only a batch shows them."""

    def build_batch(self, items: Sequence[dict], pad_to: int = 1) -> dict[str, Tensor]:
        """Return the model's inputs for some items, padded on the right, and labels [B, L]."""

    def get_image_inputs(self, item: dict) -> dict[str, Tensor]:
        """Return what the model's `get_image_features` takes of an item's images."""


def example_encoder(
    processor, template: str = "chat", limits: Limits = NO_LIMITS
) -> ExampleEncoder:
    """Return the encoder of examples for a processor.

    Args:
        processor: The processor of a built or of an upgraded model.
        template: "chat" for the processor's chat template, "plain" for images and a caption.
        limits: How long a record may be; by default of any length.
    """
    is_native = get_tokens_per_image(processor) is None
    encoder = NativeExampleEncoder if is_native else FixedExampleEncoder
    return encoder(processor, template, limits)


@dataclass(frozen=True)
class FixedExampleEncoder(KnowsUnknownToken):
    """Encodes examples for a built model, whose processor counts an image's tokens by its size.

    Attributes are those of `ExampleEncoder`. An item holds `input_ids` and `labels`, int32 [L], and
    where there are images what the processor's `prepare_images` returns.
    """

    processor: object
    template: str = "chat"
    limits: Limits = NO_LIMITS

    checks_in_parallel: ClassVar[bool] = True

    @property
    def tokens_per_image(self) -> int:
        """Image tokens of every image; of images of any size, the most."""
        return self.processor.num_image_tokens

    def check(
        self, example: Example, *, open_images: bool = False, is_first: bool = False
    ) -> UnknownText | None:
        """Raise RecordError where a model cannot be trained on the example."""
        encoded = self.encode(example)
        if open_images:
            example.load_images(self.processor)
        return self.find_unknown(example, encoded)

    def find_unknown(self, example: Example, encoded: dict) -> UnknownText | None:
        """Return where an example that was encoded has words that the tokenizer does not know."""
        if self.unknown_id is None or self.unknown_id not in encoded["input_ids"]:
            return None
        text, spans = render_example(example, self.processor, self.template, add_end_token=False)
        found = find_unknown_text(self.processor, text, spans, self.unknown_id)
        # What max_length cuts off is not learned.
        return found._replace(learned=found.learned and self.unknown_id in encoded["labels"])

    def encode(self, example: Example) -> dict[str, Tensor]:
        """Return input_ids and labels, int32 [L], with all image tokens.

        Labels are -100 except in answers and the token that ends them.

        Raises:
            RecordError: The example cannot be rendered, is too long, or has no token to train on.
        """
        try:
            rendered = render_example(example, self.processor, self.template, add_end_token=False)
            ids, labels = self._tokenize(rendered, example)
            self.limits.check(ids, labels, [self.processor.image_token_id])
        except RecordError:  # of an image, whose place is told already
            raise
        except UserError as error:
            raise RecordError(example.place, str(error)) from None
        length = self.limits.max_length
        return {
            "input_ids": torch.tensor(ids[:length], dtype=torch.int32),
            "labels": torch.tensor(labels[:length], dtype=torch.int32),
        }

    def _tokenize(self, rendered: Rendered, example: Example) -> tuple[list[int], list[int]]:
        """Token ids with all image tokens, and their labels."""
        encoded = self.processor.tokenizer(
            rendered.text,
            add_special_tokens=adds_special_tokens(self.processor, rendered.text),
            return_offsets_mapping=True,
        )
        are_targets = find_target_tokens(encoded["offset_mapping"], rendered.spans)
        ids, labels = [], []
        self._check_number(example, encoded["input_ids"].count(self.processor.image_token_id))
        remaining = iter(count_image_tokens(self.processor, example))
        for token, is_target in zip(encoded["input_ids"], are_targets, strict=True):
            is_image = token == self.processor.image_token_id
            copies = next(remaining) if is_image else 1
            ids += [token] * copies
            labels += [token if is_target else IGNORED] * copies
        return ids, labels

    def _check_number(self, example: Example, number: int) -> None:
        """Raise UserError where the text has the model's placeholder without an image, or less."""
        token = self.processor.image_token
        if number != len(example.images):
            raise UserError(
                f"the text of the record has {number} {token}, the model's placeholder, for"
                f" {len(example.images)} files; write one for each, and none in other texts"
            )

    def encode_images(self, images: list[Image.Image | Clip]) -> dict[str, Tensor]:
        """Return what the model reads of images, or nothing where there are none."""
        return self.processor.prepare_images(images) if images else {}

    def count_image_tokens(self, encoded: dict) -> int:
        """Return the number of image tokens of what `encode` returned."""
        return int((encoded["input_ids"] == self.processor.image_token_id).sum())

    def get_length(self, encoded: dict) -> int:
        """Return the number of tokens."""
        return len(encoded["input_ids"])

    def get_lengths(self, encoded: Sequence[dict]) -> list[int]:
        """Return the number of tokens of each."""
        return [len(item["input_ids"]) for item in encoded]

    def build_batch(self, items: Sequence[dict], pad_to: int = 1) -> dict[str, Tensor]:
        """Return a batch padded on the right.

        Args:
            items: Items of a dataset.
            pad_to: The batch is as long as a multiple of it.

        Returns:
            input_ids, attention_mask and labels [B, L], and the inputs of `join_image_inputs`.
        """
        return {**self.pad(items, pad_to), **join_image_inputs(items)}

    def pad(self, rows: Sequence[dict], pad_to: int = 1) -> dict[str, Tensor]:
        """Return input_ids, attention_mask and labels [B, L] of rows with input_ids and labels.

        Raises:
            UserError: No row has a token to train on.
        """
        if not any((row["labels"][1:] != IGNORED).any() for row in rows):
            raise UserError("no item of the batch has a token to train on: all labels are masked")
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // pad_to) * pad_to
        shape = len(rows), length
        batch = {
            "input_ids": torch.full(shape, get_pad_token_id(self.processor.tokenizer)),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for i, row in enumerate(rows):
            num_tokens = len(row["input_ids"])
            batch["input_ids"][i, :num_tokens] = row["input_ids"]
            batch["attention_mask"][i, :num_tokens] = 1
            batch["labels"][i, :num_tokens] = row["labels"]
        return batch

    def get_image_inputs(self, item: dict) -> dict[str, Tensor]:
        """Return the item's pixel_values, and the grids of images of any size."""
        return {name: item[name] for name in ("pixel_values", GRIDS) if name in item}


def count_image_tokens(processor, example: Example) -> list[int]:
    """Return the image tokens of every image; 1 where only the processor's call shows them.

    Of files of images of any size, no more than the size is read; RecordError for a bad one.
    """
    if not getattr(processor, "is_any_size", False):
        return [get_tokens_per_image(processor) or 1] * len(example.images)
    grids = [processor.choose_grid(*size) for size in example.read_sizes()]
    return [processor.count_tokens(grid) for grid in grids]


def get_pad_token_id(tokenizer) -> int:
    """Return the token that batches are padded with: the end token where there is none for it."""
    pad_token_id = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad_token_id is None else pad_token_id


def join_image_inputs(items: Sequence[dict]) -> dict[str, Tensor | dict[int, Tensor]]:
    """Return the image inputs of all items, the images in reading order.

    Returns:
        pixel_values [images, V, 3, H, W], or vision_states with tap -> [images, V, N, D], or
        nothing where no item has an image. Of images of any size, those of all patches, and
        image_grids [images, 2].
    """
    inputs = {}
    for name in ("pixel_values", GRIDS):
        values = [item[name] for item in items if name in item]
        if values:
            inputs[name] = torch.cat(values)
    features = [item["vision_states"] for item in items if "vision_states" in item]
    if features:
        inputs["vision_states"] = join_features(features)
    return inputs


def join_features(features: Sequence[dict[int, Tensor]]) -> dict[int, Tensor]:
    """Return tap -> [images, ...] of the features of several examples, in order."""
    joined = {}
    for tap in features[0]:
        joined[tap] = torch.cat([by_tap[tap] for by_tap in features])
    return joined
