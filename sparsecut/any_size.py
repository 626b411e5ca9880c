"""Images of any size through an encoder: patches in, the states of these patches out.

Images arrive as patches [S, V, C, h, w], all images' one after another, row by row: S coarse ones,
each with the fine ones under it (V is 1 + tiles^2). `image_grids` has the rows and columns of every
image. Encoders that take images of any size read the coarse image whole, and the fine image as
tiles x tiles views of the same size. Others read both in views of their own size, side by side.
These are filled up at the right and lower edge with zeros, the mean colour, and what the encoder
makes of the filling is dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .encoders import FREE_SIZE_KINDS, PatchGrid, get_fixed_view_size
from .hooks import read_taps
from .plan import GATES, Plan
from .schema import UserError, is_whole_number

Grids = list[tuple[int, int]]  # rows and columns of coarse patches, for every image


def get_patch(grid: PatchGrid) -> tuple[int, int]:
    """Height and width in pixels of what one state of the encoder stands for."""
    height, width = grid.view[-2:]
    return height // grid.rows, width // grid.columns


def list_grids(image_grids: Tensor | Sequence) -> Grids:
    """Rows and columns of every image as numbers; UserError where they are none."""
    values = image_grids.tolist() if isinstance(image_grids, Tensor) else image_grids
    if not torch.compiler.is_compiling() and not all(map(_is_grid, values)):
        raise UserError(
            f"image_grids is {values!r}, but must have rows and columns of patches for every image,"
            " such as [[2, 8], [4, 4]]; pass what the model's own processor returns"
        )
    return [(rows, columns) for rows, columns in values]


def _is_grid(value: Any) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and all(is_whole_number(number) and number > 0 for number in value)


def find_grids(image_grids: Tensor | Sequence | None, states: dict | None) -> Grids | None:
    """Rows and columns of every image as numbers; None where every image has those of a view.

    Args:
        image_grids: What the processor returned, if anything.
        states: Encoder states by tap that are given instead of pixels: [S, V, D] of all patches of
            images of any size, else [P, V, N, D].

    Raises:
        UserError: The states are not of these grids.
    """
    grids = None if image_grids is None else list_grids(image_grids)
    if states is None:
        return grids
    num_patches = None if grids is None else sum(rows * columns for rows, columns in grids)
    for tap, values in states.items():
        is_any_size = values.dim() == 3
        if is_any_size == (grids is None) or (is_any_size and len(values) != num_patches):
            raise UserError(
                f"vision_states of tap {tap} have shape {tuple(values.shape)}, but image_grids is"
                f" {grids}; give the grids that were given to `encode`, and none where none were"
            )
    return grids


def check_places(mask: Tensor, lengths: Sequence[int]) -> None:
    """Check that the tokens of every image stand together, where images have different numbers.

    Images in another order than their placeholders would else take each other's places in silence.

    Args:
        mask: Where image tokens are, [B, L].
        lengths: Tokens of every image, as many together as the mask has.

    Raises:
        UserError: The tokens of an image are in two places.
    """
    if len(set(lengths)) < 2:
        return
    places = mask.flatten().nonzero().flatten().tolist()
    row_length = mask.shape[-1]
    start = 0
    for number, length in enumerate(lengths):
        first, last = places[start], places[start + length - 1]
        if last - first != length - 1 or first // row_length != last // row_length:
            raise UserError(
                f"image {number} (from 0) has {length} features, but as many image tokens do not"
                " stand together in a prompt; give the images, and image_grids, in the order of"
                " their placeholders"
            )
        start += length


def check_patches(pixel_values: Tensor, grids: Grids, grid: PatchGrid, plan: Plan) -> None:
    """Check that patches are of the grids that are given, and of this model.

    Args:
        pixel_values: Patches, which should be [S, 1 + tiles^2, C, h, w].
        grids: Rows and columns of every image.
        grid: The views of the encoder.
        plan: The model's plan.

    Raises:
        UserError: They are not, or the plan's gates need equally many tokens of every image.
    """
    if GATES[plan.gate].module is not None:
        raise UserError(
            f"gate={plan.gate!r} pools as many tokens of every image, but images of any size"
            " (coarse='native') differ; use another gate, or coarse='squash'"
        )
    num_patches = sum(rows * columns for rows, columns in grids)
    shape = (num_patches, plan.num_views, grid.view[0], *get_patch(grid))
    if tuple(pixel_values.shape) != shape:
        raise UserError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, but with image_grids={grids} this"
            f" model's plan (tiles={plan.tiles}) and encoder need {shape}; prepare images with the"
            " model's own processor"
        )
    for rows, columns in grids:
        if rows % grid.merge or columns % grid.merge:
            raise UserError(
                f"image_grids has {rows} x {columns} patches, but the encoder takes them in squares"
                f" of {grid.merge} x {grid.merge}; prepare images with the model's own processor"
            )


@dataclass(frozen=True)
class _Map:
    """One image, coarse or fine, cut into views.

    Attributes:
        shape: Rows and columns of coarse patches.
        side: Patches of this image per side of a coarse patch.
        view: Rows and columns of a view.
        views: [views, C, height, width].
    """

    shape: tuple[int, int]
    side: int
    view: tuple[int, int]
    views: Tensor


def read_plan(read: Callable, pixels: Tensor, plan: Plan, depth: int) -> dict[int, Tensor]:
    """Read all taps of a plan; fine views run no further than the deepest of their taps.

    Args:
        read: (pixels of some views, taps) -> tap -> states, the views second.
        pixels: All views, the coarse one first.
        plan: The plan.
        depth: Number of encoder blocks.

    Returns:
        Tap -> states, of the coarse view alone where the plan reads no more.
    """
    taps = plan.resolved_taps(depth)
    fine_taps = plan.fine_taps(depth)
    if not fine_taps:
        return read(pixels[:, :1], taps)
    if max(fine_taps) == max(taps):
        features = read(pixels, taps)
        return {tap: x if tap in fine_taps else x[:, :1] for tap, x in features.items()}
    features = read(pixels[:, :1], taps)
    fine_features = read(pixels[:, 1:], fine_taps)
    for tap, fine in fine_features.items():
        features[tap] = torch.cat([features[tap], fine], dim=1)
    return features


def read_patches(
    encoder: nn.Module, grid: PatchGrid, grids: Grids, pixels: Tensor, wanted: Sequence[int]
) -> dict[int, Tensor]:
    """Run a connected encoder on images of any size, as far as the deepest wanted tap.

    Views of one size run together. So an encoder of a fixed size runs once.

    Args:
        encoder: The encoder.
        grid: Its grid.
        grids: Rows and columns of every image.
        pixels: Patches [S, V, C, h, w]: the coarse ones, the tiles^2 fine ones, or both.
        wanted: Taps to read.

    Returns:
        Tap -> [S, V, D].
    """
    maps = _cut_maps(pixels, grids, grid, _find_longest(encoder.config))
    states: dict[int, list[Tensor]] = {}
    for view in dict.fromkeys(one.view for one in maps):
        members = [number for number, one in enumerate(maps) if one.view == view]
        views = torch.cat([maps[number].views for number in members])
        read = read_taps(encoder, views, _resize_grid(grid, view), wanted)
        for tap, values in read.items():
            by_map = states.setdefault(tap, [None] * len(maps))
            parts = values.split([len(maps[number].views) for number in members])
            for number, part in zip(members, parts, strict=True):
                by_map[number] = _join_views(part, maps[number])
    return {tap: _stack_images(by_map, len(grids)) for tap, by_map in states.items()}


def _stack_images(by_map: list[Tensor], num_images: int) -> Tensor:
    """States of the maps of every image, image by image, as [S, V, D]."""
    per_image = len(by_map) // num_images
    images = []
    for start in range(0, len(by_map), per_image):
        images.append(torch.cat(by_map[start : start + per_image], dim=1))
    return torch.cat(images)


def _cut_maps(
    pixels: Tensor, grids: Grids, grid: PatchGrid, longest: tuple[int, int] | None
) -> list[_Map]:
    """The coarse and the fine image of every image, in this order, as views."""
    num_parts = pixels.shape[1]
    side = math.isqrt(num_parts)
    # The coarse patch alone, the side^2 fine ones alone, or both.
    parts = [(slice(None), side)]
    if side * side != num_parts:
        parts = [(slice(1), 1), (slice(1, None), side)]
    maps = []
    images = pixels.split([rows * columns for rows, columns in grids])
    for image, shape in zip(images, grids, strict=True):
        view = _choose_view(shape, grid, longest)
        for chosen, part_side in parts:
            views = _cut_views(image[:, chosen], shape, part_side, view)
            maps.append(_Map(shape, part_side, view, views))
    return maps


def _find_longest(config: Any) -> tuple[int, int] | None:
    """Most rows and columns of a view that positions of an encoder of any size reach, if any."""
    if config.model_type != "pixtral":
        return None
    height, width = get_fixed_view_size(config)
    return height // config.patch_size, width // config.patch_size


def _choose_view(
    shape: tuple[int, int], grid: PatchGrid, longest: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of the views that an image is cut into."""
    if grid.kind not in FREE_SIZE_KINDS:
        return grid.rows, grid.columns
    if longest is None:
        return shape
    view = []
    for number, most in zip(shape, longest, strict=True):
        num_views = -(-number // most)
        view.append(-(-number // num_views))
    return tuple(view)


def _resize_grid(grid: PatchGrid, view: tuple[int, int]) -> PatchGrid:
    if view == (grid.rows, grid.columns):
        return grid
    rows, columns = view
    pixels = (grid.view[0], rows * grid.patch[0], columns * grid.patch[1])
    return replace(grid, rows=rows, columns=columns, view=pixels)


def _cut_views(image: Tensor, shape: tuple, side: int, view: tuple[int, int]) -> Tensor:
    """An image's patches [rows * columns, side^2, C, h, w] as views [views, C, height, width]."""
    pattern = "(y x) (ty tx) c h w -> c (y ty h) (x tx w)"
    whole = rearrange(image, pattern, y=shape[0], ty=side)
    patch_height, patch_width = image.shape[-2:]
    height = view[0] * patch_height
    width = view[1] * patch_width
    filled = _fill_up(whole, height, width)
    return rearrange(filled, "c (v h) (u w) -> (v u) c h w", h=height, w=width)


def _fill_up(pixels: Tensor, height: int, width: int) -> Tensor:
    """Pixels [C, H, W] with zeros below and at the right, up to whole views of a size."""
    below = -pixels.shape[-2] % height
    right = -pixels.shape[-1] % width
    if not below and not right:
        return pixels
    return F.pad(pixels, (0, right, 0, below))


def _join_views(states: Tensor, image: _Map) -> Tensor:
    """States of an image's views [views, N, D] as [rows * columns, side^2, D], without filling."""
    rows, columns = (number * image.side for number in image.shape)
    num_down = -(-rows // image.view[0])
    pattern = "(v u) (y x) d -> (v y) (u x) d"
    whole = rearrange(states, pattern, v=num_down, y=image.view[0])[:rows, :columns]
    return rearrange(whole, "(y ty) (x tx) d -> (y x) (ty tx) d", ty=image.side, tx=image.side)
