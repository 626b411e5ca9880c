"""One record of each stage as the model sees it: its text, what is learned of it, its images."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data.collator import Collator
from ..data.dataset import TrainingData
from ..data.encoding import ExampleEncoder
from ..data.labels import IGNORED
from ..data.packing import count_record_tokens, pack_rows
from ..schema import UserError
from .preparing import PreparedRun, PreparedStage, build_encoder

GAP = 4  # pixels between the views of a sheet


class Piece(NamedTuple):
    """A part of a record's text.

    Attributes:
        text: The text; for image tokens how many there are.
        is_learned: Whether the model learns to write it.
    """

    text: str
    is_learned: bool


@dataclass(frozen=True)
class RecordPreview:
    """A record as a stage's model sees it.

    Attributes:
        stage: The stage's name.
        place: Where the record stands.
        pieces: Its text in order.
        image_sizes: Width and height of every image.
        pixels: Shape of every input of pixels or features, by its name.
        num_tokens: All its tokens.
        num_image_tokens: Those that stand for images.
        num_learned: Those that are learned.
        notes: How the stage goes on from here: packed rows, cached features, streams.
        sheet: The images and their views in one image, None without images.
    """

    stage: str
    place: str
    pieces: list[Piece]
    image_sizes: list[tuple[int, int]]
    pixels: dict[str, tuple[int, ...]]
    num_tokens: int
    num_image_tokens: int
    num_learned: int
    notes: list[str]
    sheet: Image.Image | None


def preview_run(prepared: PreparedRun) -> list[RecordPreview]:
    """Return the first record of every stage, the first with images where there is one.

    Raises:
        RecordError: Its images cannot be opened or prepared.
    """
    model, processor = prepared.model, prepared.processor
    cache = prepared.inputs.recipe.feature_cache
    return [_preview_stage(stage, model, processor, cache) for stage in prepared.stages]


def _preview_stage(prepared: PreparedStage, model, processor, cache: str | None) -> RecordPreview:
    encoder = build_encoder(prepared.stage, model, processor)
    examples = prepared.examples
    example = next((example for example in examples if example.images), examples[0])
    images = example.load_images()
    item = TrainingData([example], encoder)[0]
    batch = Collator(encoder)([item])
    is_token = batch["attention_mask"][0] > 0
    ids, labels = batch["input_ids"][0][is_token], batch["labels"][0][is_token]
    image_ids = _get_image_token_ids(processor)
    pixels = {
        name: tuple(value.shape)
        for name, value in batch.items()
        if isinstance(value, Tensor) and name.startswith("pixel")
    }
    return RecordPreview(
        stage=prepared.stage.name,
        place=example.place,
        pieces=list(_cut_text(processor.tokenizer, ids.tolist(), labels.tolist(), image_ids)),
        image_sizes=[image.size for image in images],
        pixels=pixels,
        num_tokens=len(ids),
        num_image_tokens=sum(token in image_ids for token in ids.tolist()),
        num_learned=int((labels[1:] != IGNORED).sum()),
        notes=list(_describe_way(prepared, encoder, cache)),
        sheet=_draw_sheet(images, batch, processor) if images else None,
    )


def _get_image_token_ids(processor) -> set[int]:
    several = getattr(processor, "image_token_ids", None)
    return set(several) if several is not None else {processor.image_token_id}


def _cut_text(tokenizer, ids: list[int], labels: list[int], image_ids: set[int]) -> Iterator[Piece]:
    """The text in pieces that are learned or not; image tokens are counted."""
    kinds = []
    for token, label in zip(ids, labels, strict=True):
        kinds.append((token in image_ids, label != IGNORED))
    start, before = 0, ""
    for (is_image, is_learned), run in itertools.groupby(kinds):
        end = start + len(list(run))
        # Spaces at the beginning of a piece show only behind the text before it.
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        is_continued = text.startswith(before)
        shown = text[len(before) :] if is_continued else tokenizer.decode(ids[start:end])
        yield Piece(f"<{end - start} image tokens>" if is_image else shown, is_learned)
        start, before = end, text


def _describe_way(prepared: PreparedStage, encoder: ExampleEncoder, cache) -> Iterator[str]:
    """What a stage makes of its records on the way to the model."""
    stage = prepared.stage
    if prepared.is_stream:
        yield "the stage reads a stream, and this is one of its first records"
    if cache is not None:
        yield f"the encoder's features of all images are read from {cache}"
    if stage.pack is None:
        return
    data = TrainingData(prepared.examples, encoder)
    limit = stage.max_image_tokens
    lengths, image_tokens = count_record_tokens(data)
    rows = pack_rows(lengths, image_tokens, stage.pack, max_images=limit)
    filled = sum(lengths) / (len(rows) * stage.pack)
    yield (
        f"{len(data):,} records are packed into {len(rows):,} rows of {stage.pack:,} tokens, which"
        f" are {filled:.0%} full; the first holds {len(rows[0])} records"
    )


# ---- images


def _draw_sheet(images: list[Image.Image], batch: dict, processor) -> Image.Image:
    """A row for each image: as it was opened, then its views as the encoder gets them."""
    rows: list[list[Image.Image]] = [[image] for image in images]
    pixels = batch.get("pixel_values")
    if _holds_views(pixels, len(images)):
        for row, views in zip(rows, pixels, strict=True):
            for view in views.reshape(-1, *views.shape[-3:]):
                row.append(_show_pixels(view, processor.image_processor))
    return _join_rows(rows)


def _holds_views(pixels: object, num_images: int) -> bool:
    """Whether pixels are views of as many images, [images, (views,) 3, H, W], and no patches."""
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        return False
    return pixels.shape[-3] == 3 and len(pixels) == num_images


def _show_pixels(view: Tensor, image_processor) -> Image.Image:
    """The image that a normalized view [3, H, W] was made of."""
    mean = torch.tensor(image_processor.image_mean or [0.0] * 3)[:, None, None]
    std = torch.tensor(image_processor.image_std or [1.0] * 3)[:, None, None]
    values = (view.float() * std + mean) * 255
    array = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array)


def _join_rows(rows: list[list[Image.Image]]) -> Image.Image:
    widths, heights = [], []
    for row in rows:
        widths.append(sum(image.width + GAP for image in row))
        heights.append(max(image.height for image in row) + GAP)
    sheet = Image.new("RGB", (max(widths), sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + GAP
        top += height
    return sheet


def save_sheets(previews: list[RecordPreview], folder: Path) -> list[Path]:
    """Write STAGE.png for every preview with images, and return the files.

    Raises:
        UserError: The folder cannot be written.
    """
    files = []
    for preview in previews:
        if preview.sheet is None:
            continue
        file = folder / f"{preview.stage}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            preview.sheet.save(file)
        except OSError as error:
            raise UserError(
                f"{file} cannot be written ({error.strerror}); name another folder"
            ) from None
        files.append(file)
    return files


def describe_counts(preview: RecordPreview) -> list[str]:
    """Return lines about a record's images and tokens."""
    lines = []
    for number, (width, height) in enumerate(preview.image_sizes):
        lines.append(f"image {number}: {width} x {height} pixels")
    for name, shape in preview.pixels.items():
        lines.append(f"{name}: {' x '.join(map(str, shape))}")
    num_text = preview.num_tokens - preview.num_image_tokens
    lines.append(
        f"{preview.num_tokens:,} tokens: {preview.num_image_tokens:,} of images, {num_text:,} of"
        f" text; {preview.num_learned:,} are learned"
    )
    return lines + preview.notes
