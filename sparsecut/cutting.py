"""From an image to the views or patches that an encoder reads: how large, and cut where.

There are three ways, `COARSE_VIEWS`. "squash" and "crop" make one view of a fixed size.
"native" keeps the aspect ratio: an image becomes a grid of patches, as many as fit its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image

from .pixels import to_rgb
from .schema import UserError, is_whole_number
from .view_sizes import as_pair

SMALL_VIEW = 4096  # pixels; smaller views, such as patches, are normalized together


def cut_views(
    image: Image.Image, tiles: int, size: Any, coarse: str = "squash"
) -> list[Image.Image]:
    """Cut an image into encoder-sized views as RGB images; see `cut_levels`."""
    return [Image.fromarray(view) for view in cut_levels(image, tiles, size, coarse)]


def cut_levels(
    image: Image.Image, tiles: int, size: Any, coarse: str = "squash"
) -> list[np.ndarray]:
    """Cut an image into encoder-sized views: one coarse view, then tiles x tiles fine views.

    All views are resized from the original with Pillow's bicubic filter. "squash" ignores the
    aspect ratio, so that fine patches lie under coarse ones.

    Args:
        image: an image of any size and mode.
        tiles: fine views per side; 0 for none.
        size: pixels of a view, one number or (height, width).
        coarse: "squash", or "crop" as in the released training loader (arXiv 2602.00505): the
            smallest image that covers the view, then its center. With "crop", fine views of a
            non-square image do not lie under the coarse view.

    Returns:
        1 + tiles^2 views, uint8 [height, width, 3], the fine ones row by row. They are windows of
        one large image, so nothing is copied.
    """
    image = to_rgb(image)
    height, width = as_pair(size)
    make_coarse = _crop_center if coarse == "crop" else _squash
    views = [np.asarray(make_coarse(image, height, width))]
    if not tiles:
        return views
    large = np.asarray(_squash(image, tiles * height, tiles * width))
    for top in range(0, tiles * height, height):
        for left in range(0, tiles * width, width):
            views.append(large[top : top + height, left : left + width])
    return views


def cut_patches(image: Image.Image, tiles: int, grid: tuple[int, int], patch: Any) -> np.ndarray:
    """Cut an image into patches, every one with the tiles x tiles fine patches under it.

    The coarse and the fine image are resized from the original with Pillow's bicubic filter.

    Args:
        image: an image of any size and mode.
        tiles: fine patches per side of a coarse one; 0 for none.
        grid: rows and columns of patches, as `choose_grid` gives them.
        patch: height and width of a patch in pixels.

    Returns:
        uint8 [rows * columns, 1 + tiles^2, height, width, 3], patches row by row. The first of
        each is the coarse one, the others follow row by row.
    """
    image = to_rgb(image)
    rows, columns = grid
    height, width = patch
    coarse = np.asarray(_squash(image, rows * height, columns * width))
    parts = [_split(coarse, 1, patch)]
    if tiles:
        large = np.asarray(_squash(image, tiles * rows * height, tiles * columns * width))
        parts.append(_split(large, tiles, patch))
    return np.concatenate(parts, axis=1)


def _split(pixels: np.ndarray, tiles: int, patch: tuple[int, int]) -> np.ndarray:
    """Pixels [height, width, 3] as [coarse patches, tiles^2, *patch, 3]."""
    pattern = "(y ty h) (x tx w) c -> (y x) (ty tx) h w c"
    return rearrange(pixels, pattern, ty=tiles, tx=tiles, h=patch[0], w=patch[1])


def _squash(image: Image.Image, height: int, width: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _crop_center(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image until it covers (height, width), then cut out its center."""
    scaled = image.resize(_cover(image, height, width), Image.Resampling.BICUBIC)
    left = (scaled.width - width) // 2
    top = (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _cover(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """The smallest (width, height) of an image's own shape that covers (height, width)."""
    is_wide = width * image.height <= height * image.width
    if is_wide:
        return int(height * image.width / image.height), height
    return width, int(width * image.height / image.width)


def check_pixel_limits(min_pixels: Any, max_pixels: Any, unit: tuple[int, int]) -> None:
    """Check how many pixels an image may have after it was resized.

    Args:
        min_pixels: The fewest pixels of the coarse image.
        max_pixels: The most.
        unit: Height and width that images are a multiple of.

    Raises:
        UserError: They are no numbers, hold not one patch, or the first is above the second.
    """
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if not is_whole_number(value) or value < 1:
            raise UserError(
                f"{name} is {value!r}, but must be a number of pixels, for example 112896 (336 x"
                " 336)"
            )
    one = unit[0] * unit[1]
    if max_pixels < one:
        raise UserError(
            f"max_pixels is {max_pixels}, but one patch has {one} ({unit[0]} x {unit[1]}); give a"
            " multiple of it"
        )
    if min_pixels > max_pixels // one * one:
        raise UserError(
            f"min_pixels is {min_pixels}, but max_pixels={max_pixels} holds {max_pixels // one}"
            f" patches of {unit[0]} x {unit[1]} pixels; lower min_pixels to at most"
            f" {max_pixels // one * one}"
        )


def choose_grid(
    size: tuple[int, int], unit: tuple[int, int], min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Choose rows and columns of units for an image, so that its aspect ratio is kept.

    The image keeps its own size where the limits let it. Rows and columns differ from the true
    aspect ratio by less than one unit. There are never more units than `max_pixels` holds. There
    are never fewer than `min_pixels` asks for where `max_pixels` is at least four times as much.
    Where the limits are closer, rounding to whole units may need fewer.

    Args:
        size: Height and width of the image in pixels.
        unit: Height and width of a unit.
        min_pixels: The fewest pixels of the resized image.
        max_pixels: The most.
    """
    one = unit[0] * unit[1]
    most = max_pixels // one
    fewest = min(-(-min_pixels // one), most)
    height, width = size[0] / unit[0], size[1] / unit[1]
    area = min(max(height * width, fewest), most)
    # An image thinner than a unit is one unit thin, and as long as the limits let it.
    rows = min(max(math.sqrt(area * height / width), 1.0), area)
    columns = area / rows
    candidates = []
    for row_count in {math.floor(rows), math.ceil(rows)}:
        for column_count in {math.floor(columns), math.ceil(columns)}:
            if row_count and column_count and fewest <= row_count * column_count <= most:
                distance = abs(math.log(row_count / rows)) + abs(math.log(column_count / columns))
                candidates.append((distance, row_count, column_count))
    if not candidates:
        return max(math.floor(rows), 1), max(math.floor(columns), 1)
    _, row_count, column_count = min(candidates)
    return row_count, column_count


def make_level_table(values: dict) -> np.ndarray:
    """What each level from 0 to 255 becomes by the values of an image processor, by channel.

    Args:
        values: do_rescale, rescale_factor, do_normalize, image_mean and image_std.

    Returns:
        float32 [3, 256].
    """
    table = np.arange(256, dtype=np.float64)
    if values["do_rescale"]:
        table = table * values["rescale_factor"]
    table = np.tile(table.astype(np.float32), (3, 1))
    if values["do_normalize"]:
        mean = np.asarray(values["image_mean"], dtype=np.float32).reshape(-1, 1)
        std = np.asarray(values["image_std"], dtype=np.float32).reshape(-1, 1)
        table = (table - mean) / std
    return table


def normalize(views: Sequence[np.ndarray], values: dict, out: np.ndarray) -> None:
    """Normalize the levels of views by the values of an image processor.

    Args:
        views: uint8 [height, width, 3] each.
        values: See `make_level_table`.
        out: Takes the result, float32 [views, 3, height, width].
    """
    tables = make_level_table(values)
    if out[0, 0].size < SMALL_VIEW:
        levels = np.asarray(views)
        for channel, table in enumerate(tables):
            out[:, channel] = table.take(levels[..., channel])
        return
    # One view at a time stays in the processor's cache. Other modes than "clip" copy the output.
    for view, pixels in zip(views, out, strict=True):
        for channel, table in enumerate(tables):
            table.take(view[..., channel], out=pixels[channel], mode="clip")
