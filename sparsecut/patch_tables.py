"""Patch tables: which patches lie under each image token, for every family of pretrained VLMs.

Every function has the signature of `VLMFamily.patch_index`. Some families rearrange patches by a
function of their own. Their table is the output of this function for the patches' numbers, so that
no rule is written twice.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .schema import UserError


def has_one_view(model: nn.Module) -> bool:
    """Whether each image is one view of a fixed size: not with encoders of any size."""
    # A LLaVA may have Pixtral's encoder, which takes images of any size.
    return model.config.vision_config.model_type != "pixtral"


def _number_patches(shape: tuple, num_prefix: int = 0) -> Tensor:
    """Number the patches of states [views, tokens, D], without prefix tokens: [views, N]."""
    num_views, length = shape[:2]
    numbers = torch.arange(num_views * length).view(num_views, length)
    return numbers[:, num_prefix:]


def _get_selection(inner: nn.Module, call: dict) -> str:
    """How a LLaVA selects features: "default" (without the class token) or "full"."""
    strategy = call.get("vision_feature_select_strategy")
    return strategy or inner.config.vision_feature_select_strategy


def _count_prefix(inner: nn.Module, call: dict) -> int:
    """Number of class tokens that a LLaVA leaves out."""
    return 1 if _get_selection(inner, call) == "default" else 0


def _split_windows(maps: Tensor, size: int) -> Tensor:
    """[views, rows, columns] -> [tokens, size^2]: windows, and numbers inside them, row by row."""
    num_views, rows, columns = maps.shape
    maps = maps.view(num_views, rows // size, size, columns // size, size)
    return maps.transpose(2, 3).reshape(-1, size * size)


def index_llava(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """The patches of each view; class and register tokens show none."""
    numbers = _number_patches(shape, _count_prefix(inner, call))
    if has_one_view(inner):
        # Class and register tokens that stay in the prompt show no patch.
        num_prefix = shape[1] - _count_patches_of_view(inner.config.vision_config, call)
        numbers = numbers.masked_fill(numbers % shape[1] < num_prefix, -1)
    return numbers.reshape(-1, 1)


def _count_patches_of_view(vision_config: Any, call: dict) -> int:
    patch = vision_config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    height, width = call["pixel_values"].shape[-2:]
    return height // patch_height * (width // patch_width)


def index_vipllava(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """The patches of each view, without the class token."""
    return _number_patches(shape, 1).reshape(-1, 1)


def index_paligemma(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """The patches of each view; the encoder has no prefix tokens."""
    return _number_patches(shape).reshape(-1, 1)


def index_gemma3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches that are pooled to one token."""
    projector = inner.multi_modal_projector
    side = projector.patches_per_image
    return _split_windows(_number_patches(shape).view(-1, side, side), projector.kernel_size)


def index_llava_next(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Patches of tiles, unpadded and packed by the model itself."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    image_sizes = call["image_sizes"]
    pinpoints = inner.config.image_grid_pinpoints
    view_size = inner.config.vision_config.image_size
    num_views = [image_size_to_num_patches(size, pinpoints, view_size) for size in image_sizes]
    numbers = _number_patches(shape, _count_prefix(inner, call)).double().unsqueeze(-1)
    packed, _ = inner.pack_image_features(
        torch.split(numbers, num_views),
        image_sizes,
        vision_feature_select_strategy=_get_selection(inner, call),
        image_newline=_make_newline(inner, 1),
    )
    return torch.cat(list(packed)).round().long()


def _make_newline(inner: nn.Module, width: int) -> Tensor | None:
    """The number of a newline token, -1, where the model has newlines."""
    if inner.image_newline is None:
        return None
    return torch.full((width,), -1.0, dtype=torch.float64)


def index_llava_onevision(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Patches of tiles; of interpolated ones, the nearest patch."""
    # The model interpolates where an image has too many tokens. Numbers cannot be interpolated, but
    # places can. Each patch sends its row and column in the joined tiles. The result is rounded to
    # the nearest patch.
    config = inner.config
    image_sizes = call["image_sizes"]
    side = config.vision_config.image_size // config.vision_config.patch_size
    grids = _get_onevision_grids(config, image_sizes, call.get("batch_num_images"))
    packed, _ = inner.pack_image_features(
        [_make_places(side, grid).double() for grid in grids],
        image_sizes,
        image_newline=_make_newline(inner, 2),
        vision_aspect_ratio=call.get("vision_aspect_ratio") or config.vision_aspect_ratio,
    )
    numbers = _number_patches(shape, _count_prefix(inner, call))
    table = []
    first_view = 0
    for places, grid in zip(packed, grids, strict=True):
        num_views = _count_views(grid)
        image_numbers = numbers[first_view : first_view + num_views]
        table.append(_look_up_places(image_numbers, places.round().long(), side, grid))
        first_view += num_views
    return torch.cat(table).unsqueeze(-1)


def _get_onevision_grids(
    config: Any, image_sizes: Any, num_images: Any
) -> list[tuple[int, int] | None]:
    """Rows and columns of tiles of each image; None for an image that is one view.

    num_images: images per prompt. Images of a prompt with several are not cut into tiles.
    """
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    pinpoints = config.image_grid_pinpoints
    view_size = config.vision_config.image_size
    is_alone = [True] * len(image_sizes)
    if num_images is not None:
        is_alone = [count == 1 for count in num_images for _ in range(count)]
    grids = []
    for size, alone in zip(image_sizes, is_alone, strict=True):
        if alone and image_size_to_num_patches(size, pinpoints, view_size) > 1:
            grids.append(get_anyres_image_grid_shape(size, pinpoints, view_size))
        else:
            grids.append(None)
    return grids


def _count_views(grid: tuple[int, int] | None) -> int:
    """Views of an image: the whole, and its tiles."""
    return 1 if grid is None else 1 + grid[0] * grid[1]


def _make_places(side: int, grid: tuple[int, int] | None) -> Tensor:
    """Row and column of each patch, in the whole view and in the joined tiles: [views, N, 2]."""
    patch = torch.arange(side * side)
    row = patch // side
    column = patch % side
    whole_view = torch.stack([row, column], dim=-1)[None]
    if grid is None:
        return whole_view
    num_rows, num_columns = grid
    tile = torch.arange(num_rows * num_columns)[:, None]
    first_row = tile // num_columns * side
    first_column = tile % num_columns * side
    tiles = torch.stack([first_row + row, first_column + column], dim=-1)
    return torch.cat([whole_view, tiles])


def _look_up_places(
    numbers: Tensor, places: Tensor, side: int, grid: tuple[int, int] | None
) -> Tensor:
    """Patch numbers at places [tokens, 2] of an image with `numbers` [views, N]; -1 at newlines."""
    row, column = places.unbind(-1)
    num_columns = 1 if grid is None else grid[1]
    tile_row = row // side
    tile_column = column // side
    view = 1 + tile_row * num_columns + tile_column
    view[: side * side] = 0  # the whole view comes first
    view = view.clamp(0, len(numbers) - 1)
    row_in_tile = row % side
    column_in_tile = column % side
    patch = row_in_tile * side + column_in_tile
    patch = patch.clamp(min=0)
    is_newline = row < 0
    return torch.where(is_newline, -1, numbers[view, patch])


def index_mistral3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches of images of any size."""
    patch = inner.config.vision_config.patch_size
    size = inner.config.spatial_merge_size
    table = []
    first = 0
    for height, width in torch.as_tensor(call["image_sizes"]).tolist():
        rows = height // patch
        columns = width // patch
        numbers = torch.arange(first, first + rows * columns).view(1, rows, columns)
        whole_rows = rows // size * size  # patches beside the last whole window are dropped
        whole_columns = columns // size * size
        in_windows = numbers[:, :whole_rows, :whole_columns].contiguous()
        table.append(_split_windows(in_windows, size))
        first += rows * columns
    return torch.cat(table)


def index_idefics3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches, by the connector's own pixel shuffle."""
    numbers = _number_patches(shape).double().unsqueeze(-1)
    shuffled = inner.connector.pixel_shuffle(numbers, inner.connector.scale_factor)
    return shuffled.flatten(0, 1).round().long()


def index_internvl(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches, by the model's own pixel shuffle."""
    numbers = _number_patches(shape, _count_prefix(inner, call))
    side = math.isqrt(numbers.shape[1])
    maps = numbers.double().view(-1, side, side, 1)
    shuffled = inner.pixel_shuffle(maps, scale_factor=inner.config.downsample_ratio)
    return shuffled.flatten(0, 2).round().long()


def index_qwen(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Merged patches, which follow one another."""
    # The processor puts the patches of a token next to each other.
    return torch.arange(shape[-2]).view(-1, inner.config.vision_config.spatial_merge_size**2)


def index_qwen2_5(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Merged patches; blocks hold them in the order of attention windows."""
    # Blocks hold the tokens in the order of windows. The merged tokens return to raster order.
    from transformers.vision_utils import get_vision_window_index

    vision_config = inner.config.vision_config
    window_order, _ = get_vision_window_index(
        call["image_grid_thw"].cpu(),
        spatial_merge_size=vision_config.spatial_merge_size,
        window_size=vision_config.window_size,
        patch_size=vision_config.patch_size,
        kwargs={},
    )
    return index_qwen(inner, shape, call)[torch.argsort(torch.as_tensor(window_order))]


def index_shuffled(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Projectors that shuffle the patches of a view themselves, as Cohere's do."""
    numbers = _number_patches(shape).double().unsqueeze(-1)
    shuffled = inner.multi_modal_projector.pixel_shuffle(numbers)
    return shuffled.flatten(0, 2).sort(-1).values.round().long()


def index_ovis2(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches that become one visual word."""
    side = math.isqrt(shape[1])
    stride = inner.config.vision_config.hidden_stride
    if side % stride:
        raise UserError(
            f"the encoder has {side} x {side} patches, which windows of {stride} x {stride} do not"
            " divide, so the last windows hold patches that do not exist; shortcuts need an"
            " image_size without such a rest"
        )
    return _split_windows(_number_patches(shape).view(-1, side, side), stride)


def index_lfm2(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches of images of any size, padded to one length."""
    table = []
    for numbers, (rows, columns) in zip(
        _number_patches(shape), call["spatial_shapes"].tolist(), strict=True
    ):
        maps = numbers[: rows * columns].view(1, rows, columns)  # the rest is padding
        table.append(_split_windows(maps, inner.config.downsample_factor))
    return torch.cat(table)


def index_paddleocr(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches that the projector merges."""
    return _index_windows(call["image_grid_thw"], inner.config.vision_config.spatial_merge_size)


def _index_windows(grids: Tensor, size: int) -> Tensor:
    """Windows of patches of images, whose patches follow one another row by row."""
    table = []
    first = 0
    for frames, rows, columns in grids.tolist():
        num_patches = frames * rows * columns
        maps = torch.arange(first, first + num_patches).view(frames, rows, columns)
        table.append(_split_windows(maps, size))
        first += num_patches
    return torch.cat(table)


def index_kimi(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches that the encoder merges at its end."""
    return _index_windows(call["image_grid_thw"], inner.vision_tower.merge_kernel_size[0])


def index_muse(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches; blocks hold the patches in the order of attention windows."""
    from transformers.vision_utils import get_vision_window_index

    vision = inner.vision_tower
    window_order, _ = get_vision_window_index(
        call["image_grid_thw"].cpu(),
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
        kwargs={},
    )
    places = torch.argsort(torch.as_tensor(window_order))
    return places[index_muse_pixels(inner, shape, call)]


def index_muse_pixels(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """The same windows, of patches in the order of `pixel_values`."""
    return _index_windows(call["image_grid_thw"], inner.vision_tower.merge_size)


def index_inkling2(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Merged patches, which follow one another after the class token of their image."""
    num_merged = inner.config.vision_config.spatial_merge_size**2
    table = []
    first = 0
    for num_tokens in call["image_grid_thw"].prod(-1).tolist():
        first += 1  # the class token
        num_patches = num_tokens * num_merged
        table.append(torch.arange(first, first + num_patches).view(num_tokens, num_merged))
        first += num_patches
    return torch.cat(table)


def index_gemma4(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches that are pooled to one token, of images padded to one length."""
    size = inner.config.vision_config.pooling_kernel_size
    table = []
    for numbers, places in zip(
        _number_patches(shape), call["image_position_ids"].cpu(), strict=True
    ):
        is_patch = (places >= 0).all(-1)
        column, row = places[is_patch].unbind(-1)
        maps = numbers.new_empty(int(row.max()) + 1, int(column.max()) + 1)
        maps[row, column] = numbers[is_patch]
        table.append(_split_windows(maps[None], size))
    return torch.cat(table)


def index_granite_docling(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """Windows of patches, by the connector's own pixel shuffle."""
    if call.get("tile_fine_mask") is not None:
        raise UserError(
            "tile_fine_mask was given, which cuts four times as many image tokens, but shortcuts"
            " are for the coarse route; call the processor without fine_route"
        )
    path = inner.vision_model.connector.coarse
    numbers = _number_patches(shape).double().unsqueeze(-1)
    return path.pixel_shuffle(numbers, path.scale_factor).flatten(0, 1).round().long()


def index_video_llama3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    """One patch under a token, as images have it."""
    sizes = call["image_merge_sizes"].tolist()
    if set(sizes) != {1}:
        raise UserError(
            f"image_merge_sizes is {sizes}, but shortcuts need one patch under every image token,"
            " which is 1, as the model's processor sets it for images"
        )
    return torch.arange(shape[-2]).view(-1, 1)
