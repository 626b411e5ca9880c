"""Where on its image every image token of an upgraded model is, measured by the base's processor.

Fifty families resize, crop, pad and tile in ways of their own. None of these is written down here
again. The processor gets ramps in place of the images: grey levels that rise from left to right,
from top to bottom, and from image to image. What a patch then holds says where it comes from.
Where a black and a white image look alike there is only padding. The family's own patch table
(`patch_tables`) says which patches lie under a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..patch_tables import index_muse, index_muse_pixels, index_qwen, index_qwen2_5
from ..prompts import run_processor
from ..schema import UserError

# Families whose blocks hold patches in an order of their own, and the order of their pixels.
IN_PIXEL_ORDER = {index_qwen2_5: index_qwen, index_muse: index_muse_pixels}
CLOSED = 1.04  # a patch of 4 pixels measures 0.97 of its width; neighbours leave no gap
ROOT_3 = math.sqrt(3)  # half of a uniform distribution's width, in standard deviations


@dataclass
class PatchTable:
    """What a call of `get_image_features` said of its tokens.

    Attributes:
        index: The numbers of the patches under each token, [tokens, patches]; -1 for none.
        shape: The shape of the blocks' states.
        arguments: The call's arguments by name.
    """

    index: Tensor | None = None
    shape: tuple[int, ...] = ()
    arguments: dict | None = None


@contextmanager
def watch_table(model) -> Iterator[PatchTable]:
    """Inside the block, a pass of an upgraded model notes its patch table.

    Args:
        model: The model; nothing of it is changed afterwards.
    """
    family = model.family
    table = PatchTable()

    def note(inner, shape, call) -> Tensor:
        index = family.patch_index(inner, shape, call)
        pixel_index = IN_PIXEL_ORDER.get(family.patch_index)
        by_pixels = index if pixel_index is None else pixel_index(inner, shape, call)
        table.index, table.shape, table.arguments = by_pixels.cpu(), tuple(shape), dict(call)
        return index

    model.family = replace(family, patch_index=note)
    try:
        yield table
    finally:
        model.family = family


def locate_patches(
    model, processor, images: Sequence[Image.Image], table: PatchTable, text: str
) -> list[np.ndarray]:
    """Find the boxes of the patches under every token.

    Args:
        model: The upgraded model.
        processor: Its processor.
        images: The images of one prompt.
        table: What `watch_table` recorded of the same images.
        text: A prompt with a placeholder for each image.

    Returns:
        For every image [tokens, patches, 4], see `token_places`.
    """
    black, white, *ramps = (
        _process(processor, images, text, levels) for levels in _list_levels(len(images))
    )
    span = white - black
    span = torch.where(span.abs() < 1e-6, torch.nan, span)
    x, y, number = ((values - black) / span for values in ramps)
    pixels = _split_patches(x, y, number, model=model, table=table)
    boxes = np.full((len(pixels[0]), 4), np.nan)
    middles, widths = zip(*(_summarize(values) for values in pixels[:2]), strict=True)
    for axis in (0, 1):
        boxes[:, axis] = middles[axis] - widths[axis] * CLOSED / 2
        boxes[:, axis + 2] = middles[axis] + widths[axis] * CLOSED / 2
    owners = np.rint(_summarize(pixels[2])[0] * (len(images) + 1)) - 1
    index = table.index.numpy()
    by_token = np.where(index[..., None] < 0, np.nan, boxes[index.clip(min=0)]).clip(0, 1)
    token_owners = np.where(index < 0, np.nan, owners[index.clip(min=0)])
    return _split_images(by_token, token_owners, len(images))


def _split_images(boxes: np.ndarray, owners: np.ndarray, num_images: int) -> list[np.ndarray]:
    """Tokens by image. A token that shows nothing belongs to the image of the token before it."""
    by_token = np.full(len(owners), np.nan)
    for column in owners.T:
        by_token = np.where(np.isnan(by_token), column, by_token)
    current, split = 0, [[] for _ in range(num_images)]
    for number, owner in enumerate(by_token):
        current = current if np.isnan(owner) else int(owner)
        split[current].append(number)
    return [boxes[numbers] for numbers in split]


def _list_levels(num_images: int) -> list:
    """Functions of (number of the image, width, height): grey levels from 0 to 1, [height, width].

    Black, white, and the three ramps.
    """

    def rise_right(number: int, width: int, height: int) -> np.ndarray:
        return np.tile((np.arange(width) + 0.5) / width, (height, 1))

    def rise_down(number: int, width: int, height: int) -> np.ndarray:
        return np.tile((np.arange(height) + 0.5) / height, (width, 1)).T

    def fill(get_level) -> object:
        return lambda number, width, height: np.full((height, width), get_level(number))

    count_images = fill(lambda number: (number + 1) / (num_images + 1))
    return [fill(lambda number: 0), fill(lambda number: 1), rise_right, rise_down, count_images]


def _process(processor, images: Sequence[Image.Image], text: str, get_levels) -> Tensor:
    """The `pixel_values` that the base's processor makes of grey images of the same sizes."""
    drawn = []
    for number, image in enumerate(images):
        levels = np.rint(255 * get_levels(number, *image.size)).astype(np.uint8)
        drawn.append(Image.fromarray(levels).convert("RGB"))
    plain = copy.copy(processor)
    plain.join_views = False
    return run_processor(plain, [text], [drawn])["pixel_values"].double()


def _split_patches(*measured: Tensor, model, table: PatchTable) -> list[Tensor]:
    """Values behind every state of the blocks, [states, values of a patch], for each measure."""
    num_states = math.prod(table.shape[:-1])
    first = measured[0]
    if first.dim() < 4 or first.shape[-3] != 3:  # rows of patches
        split = [_add_class_tokens(values.flatten(0, -2), num_states, table) for values in measured]
        if len(split[0]) != num_states:
            raise _explain_unknown(model, len(split[0]), num_states)
        return split
    return _split_views(measured, num_states, model, table)


def _split_views(
    measured: Sequence[Tensor], num_states: int, model, table: PatchTable
) -> list[Tensor]:
    """The same of views [..., 3, H, W], whose states may begin with prefix tokens."""
    views = [values.flatten(0, -4) for values in measured]
    patch = _get_patch_size(model)
    sizes = _list_view_sizes(views[0], patch, num_states, table)
    lengths = [rows * columns for rows, columns in sizes]
    num_prefix, rest = divmod(num_states - sum(lengths), len(lengths))
    if rest or num_prefix < 0:
        raise _explain_unknown(model, sum(lengths), num_states)
    return [_cut_views(values, sizes, patch, num_prefix) for values in views]


def _add_class_tokens(rows: Tensor, num_states: int, table: PatchTable) -> Tensor:
    """Rows of patches with one of NaN before each image, where blocks hold a class token there."""
    grids = table.arguments.get("image_grid_thw")
    if grids is None or num_states != len(rows) + len(grids):
        return rows
    blank = torch.full_like(rows[:1], torch.nan)
    parts = []
    for image in rows.split(torch.as_tensor(grids).prod(-1).tolist()):
        parts += [blank, image]
    return torch.cat(parts)


def _list_view_sizes(
    views: Tensor, patch: tuple[int, int], num_states: int, table: PatchTable
) -> list[tuple[int, int]]:
    """Rows and columns of patches of every view; views of several sizes are padded to one."""
    height, width = views.shape[-2] // patch[0], views.shape[-1] // patch[1]
    sizes = table.arguments.get("image_sizes")
    if sizes is not None and table.shape[0] == 1 and len(sizes) == len(views):
        return [(h // patch[0], w // patch[1]) for h, w in torch.as_tensor(sizes).tolist()]
    return [(height, width)] * len(views)


def _cut_views(
    views: Tensor, sizes: list[tuple[int, int]], patch: tuple[int, int], num_prefix: int
) -> Tensor:
    """Views [V, 3, H, W] as patches row by row, [states, values], NaN for prefix tokens."""
    height, width = patch
    prefix = torch.full((num_prefix, 3 * height * width), torch.nan).double()
    parts = []
    for view, (rows, columns) in zip(views, sizes, strict=True):
        shown = view[:, : rows * height, : columns * width]
        patches = rearrange(shown, "c (y h) (x w) -> (y x) (c h w)", h=height, w=width)
        parts += [prefix, patches]
    return torch.cat(parts)


def _get_patch_size(model) -> tuple[int, int]:
    config = model.vision_backbone().config
    patch = config.patch_size
    return (patch, patch) if isinstance(patch, int) else tuple(patch)


def _summarize(values: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The middle and the width of every patch from its values [states, values]."""
    middle = values.nanmean(-1, keepdim=True)
    deviation = (values - middle).square().nanmean(-1).sqrt()
    return middle[:, 0].numpy(), (2 * ROOT_3 * deviation).numpy()


def _explain_unknown(model, num_found: int, num_states: int) -> UserError:
    name = type(model.base).__name__
    return UserError(
        f"the processor of {name} makes {num_found} patches, but its encoder holds {num_states}, so"
        " it is not known where on the image its tokens are; explain it without maps"
    )
