"""Packed rows for an upgraded model, whose base's own processor prepares the records.

The processor makes a padded batch of all records, as without packing. Then the tokens of a row's
records are joined, without the padding between them. Images stay as they are: their order is that
of the records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..prompts import adds_special_tokens
from ..schema import UserError
from .errors import RecordError
from .examples import Example
from .labels import IGNORED
from .native_encoding import PER_TOKEN, NativeExampleEncoder

CHECKED = 4  # records with images whose counted tokens are compared with the processor's

# From a padded batch to positions [B, L], or [4, B, L] with three axes.
CountPositions = Callable[[dict[str, Tensor]], Tensor]


def count_tokens(
    encoder: NativeExampleEncoder, examples: Sequence[Example]
) -> tuple[list[int], list[int]]:
    """Return the tokens of every record, and how many of them are its images'.

    They are counted by the processor's rule for sizes of images, so that none is opened.

    Raises:
        UserError: The processor has no such rule, or makes another number.
        RecordError: An image cannot be read.
    """
    processor = encoder.processor
    texts = [encoder.encode(example)["text"] for example in examples]
    adds_special = adds_special_tokens(processor, texts[0])
    rows = processor.tokenizer(texts, add_special_tokens=adds_special)["input_ids"]
    lengths, image_tokens = [], []
    num_checked = 0
    for example, ids in zip(examples, rows, strict=True):
        counts = _count_image_tokens(processor, example)
        # In the text an image is one token, its placeholder.
        length = len(ids) - len(counts) + sum(counts)
        lengths.append(min(length, encoder.limits.max_length or length))
        image_tokens.append(sum(counts))
        if counts and num_checked < CHECKED:
            num_checked += 1
            _check_length(encoder, example, lengths[-1])
    return lengths, image_tokens


def _count_image_tokens(processor, example: Example) -> list[int]:
    """The tokens of each image of a record."""
    if not example.images:
        return []
    sizes = example.read_sizes()
    try:
        return list(processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
    except (AttributeError, TypeError, KeyError, ValueError):
        raise UserError(
            f"{type(processor).__name__} does not tell how many tokens an image of a size takes, so"
            " rows cannot be planned; remove pack"
        ) from None


def _check_length(encoder: NativeExampleEncoder, example: Example, counted: int) -> None:
    item = {**encoder.encode(example), **encoder.encode_images(example.load_images())}
    length = encoder.build_batch([item])["input_ids"].shape[1]
    if length != counted:
        raise RecordError(
            example.place,
            f"{type(encoder.processor).__name__} makes {length} tokens of the record, but by its"
            f" rule for sizes of images they are {counted}, so rows cannot be planned; remove pack",
        )


def pack_batch(
    batch: dict[str, Tensor],
    counts: Sequence[int],
    pad_token_id: int,
    count_positions: CountPositions | None = None,
) -> dict[str, Tensor]:
    """Join the records of a padded batch to rows.

    Args:
        batch: Inputs of all records, padded on the right, and labels [B, L].
        counts: Records of every row.
        pad_token_id: Fills rows up.
        count_positions: Counts positions where a base has several axes of them.

    Returns:
        The same for rows, with position_ids in place of the attention_mask: they start anew with
        every record. [rows, L], or [4, rows, L]: those of the tokens, then those of the axes.
    """
    lengths = batch["attention_mask"].sum(-1).tolist()
    positions = torch.arange(batch["input_ids"].shape[1]).expand(len(lengths), -1)
    if count_positions is not None:
        positions = torch.cat([positions[None], count_positions(batch)])
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED  # the first token of a record does not follow from the one before
    fills = {"input_ids": pad_token_id, "labels": IGNORED}
    packed = {}
    for name, values in batch.items():
        if name not in PER_TOKEN:
            packed[name] = values
        elif name != "attention_mask":
            values = labels if name == "labels" else values
            packed[name] = _join(values, lengths, counts, fills.get(name, 0))
    return {**packed, "position_ids": _join(positions, lengths, counts, 0)}


def _join(values: Tensor, lengths: Sequence[int], counts: Sequence[int], fill: int) -> Tensor:
    """Values [..., records, L] as [..., rows, L'], those of a row's records after one another."""
    parts = [values[..., number, :length] for number, length in enumerate(lengths)]
    rows, start = [], 0
    for count in counts:
        rows.append(torch.cat(parts[start : start + count], dim=-1))
        start += count
    longest = max(row.shape[-1] for row in rows)
    shape = (*values.shape[:-2], len(rows), longest)
    joined = torch.full(shape, fill, dtype=values.dtype)
    for number, row in enumerate(rows):
        joined[..., number, : row.shape[-1]] = row
    return joined
