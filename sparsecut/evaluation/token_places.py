"""Where on its image every image token is: boxes, for every shortcut, of built and upgraded models.

A box is (left, top, right, bottom) as fractions of the whole upright image. A token has one box or
several: `append` pools eight neighbours, and a pretrained VLM may lay several patches under a
token. A token that shows nothing of the image, such as a newline or padding, has boxes of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..kinds import POOL_SIZE
from ..plan import Shortcut
from ..prompts import get_medium
from ..schema import UserError
from ..view_sizes import as_pair

Boxes = np.ndarray  # [tokens, boxes of a token, 4]
WHOLE = (0.0, 0.0, 1.0, 1.0)
MOST_CELLS = 96  # of a map, along one axis
FINER = 4  # cells to a box where boxes do not lie on a grid over the whole image


def locate_tokens(
    model, processor, images: Sequence[Image.Image], number: int, patches=None
) -> list[Boxes]:
    """Find what part of each image the tokens of a shortcut read.

    Args:
        model: A model, built or upgraded.
        processor: Its processor.
        images: The images of one prompt, upright.
        number: The shortcut's number in the plan.
        patches: Of an upgraded model, the boxes that `patch_places.locate_patches` has found.

    Returns:
        For every image its tokens' boxes [tokens, boxes of a token, 4].

    Raises:
        UserError: The model takes audio, or the plan has a mixer whose tokens are not known.
    """
    if get_medium(processor) != "image":
        raise UserError("heat maps lie over images, but this model takes audio; give another one")
    shortcut = model.plan.shortcuts[number]
    if model.is_upgrade:
        return [_choose_grain(boxes, shortcut, model.plan.tiles) for boxes in patches]
    return [_locate_built(model, processor, image, shortcut) for image in images]


def _locate_built(model, processor, image: Image.Image, shortcut: Shortcut) -> Boxes:
    """Boxes of one image's tokens, [tokens, boxes of a token, 4]."""
    grid = model.grid.rows, model.grid.columns
    if processor.is_any_size:
        grid = processor.choose_grid(image.height, image.width)
    view = WHOLE
    if processor.coarse == "crop":
        view = _find_crop(image.size, processor.image_size)
    coarse = make_grid_boxes(grid, view)
    tiles = model.plan.tiles
    if shortcut.mix == "tokens" and tiles:
        fine_boxes = make_grid_boxes((tiles * grid[0], tiles * grid[1]))
        return np.concatenate([coarse, fine_boxes])[:, None]
    if shortcut.mix == "append":
        return _add_pooled(coarse, len(shortcut.taps))
    if shortcut.mixer.window > 1:
        return make_grid_boxes(grid, view, shortcut.mixer.window)[:, None]
    if shortcut.count_tokens(model.plan.num_grains, len(coarse)) != len(coarse):
        raise UserError(
            f"the mixer {shortcut.mix!r} makes tokens of its own, and where on the image they are"
            " is not known; heat maps need a mixer with one token for each patch, tokens or append"
        )
    if view == WHOLE or shortcut.is_coarse:
        return _choose_grain(coarse[:, None], shortcut, tiles)
    # Fine views show the whole image, also beside a coarse view that was cropped.
    whole = make_grid_boxes(grid)[:, None]
    if shortcut.mixer.grains == "one":
        return _choose_grain(whole, shortcut, tiles)
    return np.concatenate([coarse[:, None], whole], axis=1)


def make_grid_boxes(grid: tuple[int, int], view: tuple = WHOLE, window: int = 1) -> np.ndarray:
    """Boxes of the patches of a view, row by row, [patches, 4].

    Args:
        grid: Rows and columns of patches.
        view: The part of the image that the view shows.
        window: Rows and columns of patches that have one box; fewer at the lower and right edge.
    """
    rows, columns = grid
    left, top, right, bottom = view
    x = np.linspace(left, right, columns + 1)
    y = np.linspace(top, bottom, rows + 1)
    row, column = (axis.flatten() for axis in np.mgrid[:rows:window, :columns:window])
    end_row, end_column = (row + window).clip(max=rows), (column + window).clip(max=columns)
    return np.stack([x[column], y[row], x[end_column], y[end_row]], axis=-1)


def _find_crop(size: tuple[int, int], view_size) -> tuple[float, float, float, float]:
    """The part of an image that `cutting.cut_views` keeps with "crop"."""
    image_width, image_height = size
    height, width = as_pair(view_size)
    scale = max(height / image_height, width / image_width)
    shown_x = min(1.0, width / (scale * image_width))
    shown_y = min(1.0, height / (scale * image_height))
    return (1 - shown_x) / 2, (1 - shown_y) / 2, (1 + shown_x) / 2, (1 + shown_y) / 2


def _add_pooled(coarse: np.ndarray, num_taps: int) -> Boxes:
    """The boxes of `append`: patches, then tokens of eight neighbours for every other tap."""
    own = np.full((len(coarse), POOL_SIZE, 4), np.nan)
    own[:, 0] = coarse
    missing = np.full((-len(coarse) % POOL_SIZE, 4), np.nan)
    pooled = np.concatenate([coarse, missing]).reshape(-1, POOL_SIZE, 4)
    return np.concatenate([own, *[pooled] * (num_taps - 1)])


def _choose_grain(boxes: Boxes, shortcut: Shortcut, tiles: int) -> Boxes:
    """The part of each box that a shortcut reads: all of it, or one of its fine patches."""
    if shortcut.grain == 0 or not tiles:
        return boxes
    row, column = divmod(shortcut.grain - 1, tiles)
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    width = (right - left) / tiles
    height = (bottom - top) / tiles
    left = left + column * width
    top = top + row * height
    return np.stack([left, top, left + width, top + height], axis=-1)


def spread_over_image(values: np.ndarray, boxes: Boxes, shape: tuple[int, int]) -> np.ndarray:
    """Lay tokens' values over a grid of cells: each cell gets the mean of the tokens that show it.

    Args:
        values: One for each token, [tokens].
        boxes: The tokens' boxes, [tokens, boxes of a token, 4].
        shape: Rows and columns of cells.

    Returns:
        [rows, columns]; NaN where no token shows the image.
    """
    rows, columns = shape
    sums, counts = np.zeros(shape), np.zeros(shape)
    x = (np.arange(columns) + 0.5) / columns
    y = (np.arange(rows) + 0.5) / rows
    for value, own in zip(values, boxes, strict=True):
        shown = np.zeros(shape, dtype=bool)
        for left, top, right, bottom in own:  # NaN compares as false
            shown |= ((y >= top) & (y < bottom))[:, None] & ((x >= left) & (x < right))
        sums[shown] += value
        counts[shown] += 1
    with np.errstate(invalid="ignore"):
        return sums / np.where(counts, counts, np.nan)


def choose_shape(boxes: Boxes, most: int = MOST_CELLS) -> tuple[int, int]:
    """Rows and columns of cells for a map: as the smallest boxes, finer where boxes lie askew.

    Args:
        boxes: Tokens' boxes, [tokens, boxes of a token, 4].
        most: The most rows or columns.
    """
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    return _count_cells(top, bottom, most), _count_cells(left, right, most)


def _count_cells(start: np.ndarray, end: np.ndarray, most: int) -> int:
    """Cells along one axis; start and end of boxes are fractions of the image."""
    is_shown = np.isfinite(start) & (end > start)
    if not is_shown.any():
        return 1
    smallest = (end - start)[is_shown].min()
    count = max(1, min(most, round(1 / smallest)))
    edges = start[is_shown] * count
    is_askew = np.abs(edges - np.rint(edges)).max() > 0.1
    return min(most, FINER * count) if is_askew else count


def group_tokens(boxes: Boxes, shape: tuple[int, int]) -> np.ndarray:
    """The number of the cell that each token's middle lies in, row by row; -1 for none.

    Args:
        boxes: The tokens' boxes, [tokens, boxes of a token, 4].
        shape: Rows and columns of cells.
    """
    rows, columns = shape
    groups = np.full(len(boxes), -1)
    shows = np.isfinite(boxes).all(-1).any(-1)
    left, top, right, bottom = np.nanmean(boxes[shows], axis=1).T
    row = ((top + bottom) / 2 * rows).astype(int).clip(0, rows - 1)
    column = ((left + right) / 2 * columns).astype(int).clip(0, columns - 1)
    groups[shows] = row * columns + column
    return groups
