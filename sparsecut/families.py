"""Families of vision-language models that can be upgraded: where they keep their parts, and which
patches lie under a token.

The answer to the second question is an index table for one call of `get_image_features`. Wherever a family has a
rearrangement of its own, the table is what that makes of the patches' numbers, so that nothing is worked out twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .schema import UserError


@dataclass(frozen=True)
class VLMParts:
    """Where a model keeps things: the module with get_image_features, the encoder whose blocks are
    read, the decoder.
    """

    inner: nn.Module
    vision: nn.Module
    language: nn.Module


@dataclass(frozen=True)
class VLMFamily:
    """How a family is laid out.

    parts(model) -> VLMParts. patches_under(model): patches under one image token.
    patch_index(inner, shape, call) -> [tokens, patches], for one call of get_image_features
    (`call`: its arguments) in which a block put out states of `shape`: for every token of the
    concatenated pooler_output the numbers of the patches under it, in the flattened states and in
    raster order, -1 where it shows none. has_one_view(model): whether a picture is one view of a
    fixed size, to which finer ones can be added.
    """

    parts: Callable[[nn.Module], VLMParts]
    patches_under: Callable[[nn.Module], int]
    patch_index: Callable[[nn.Module, tuple, dict], Tensor]
    has_one_view: Callable[[nn.Module], bool] = lambda model: False


def _tower(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.vision_tower, model.model.language_model)


def _idefics_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.vision_model, model.model.text_model)


def _qwen_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.visual, model.model.language_model)


def _one(model: nn.Module) -> int:
    return 1


def _has_one_view(model: nn.Module) -> bool:
    return (
        model.config.vision_config.model_type != "pixtral"
    )  # a LLaVA may have an encoder of pictures of any size


def _numbers(shape: tuple, prefix: int = 0) -> Tensor:
    """Numbers of all patches of states [views, tokens, D], without `prefix` tokens in front of each
    view: [views, N].
    """
    views, length = shape[0], shape[1]
    return torch.arange(views * length).view(views, length)[:, prefix:]


def _prefix(inner: nn.Module, call: dict) -> int:
    """Class tokens that a LLaVA leaves out, by its way of selecting features."""
    strategy = (
        call.get("vision_feature_select_strategy") or inner.config.vision_feature_select_strategy
    )
    return 1 if strategy == "default" else 0


def _llava(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    numbers = _numbers(shape, _prefix(inner, call))
    if _has_one_view(inner):  # class and register tokens that are left in the prompt show no patch
        patch = inner.config.vision_config.patch_size
        high, wide = (patch, patch) if isinstance(patch, int) else patch
        height, width = call["pixel_values"].shape[-2:]
        numbers = numbers.masked_fill(
            numbers % shape[1] < shape[1] - height // high * (width // wide), -1
        )
    return numbers.reshape(-1, 1)


def _vipllava(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    return _numbers(shape, 1).reshape(-1, 1)


def _paligemma(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    return _numbers(shape).reshape(-1, 1)


def _gemma3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    projector = inner.multi_modal_projector
    side, kernel = projector.patches_per_image, projector.kernel_size
    return _windows(_numbers(shape).view(-1, side, side), kernel)


def _windows(maps: Tensor, size: int) -> Tensor:
    """Numbers [views, rows, columns] -> [tokens, size^2], windows in raster order and raster order
    within.
    """
    views, rows, columns = maps.shape
    maps = maps.view(views, rows // size, size, columns // size, size)
    return maps.transpose(2, 3).reshape(-1, size * size)


def _gemma3_under(model: nn.Module) -> int:
    return model.model.multi_modal_projector.kernel_size**2


def _llava_next(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    sizes = call["image_sizes"]
    tiles = [
        image_size_to_num_patches(
            size, inner.config.image_grid_pinpoints, inner.config.vision_config.image_size
        )
        for size in sizes
    ]
    strategy = (
        call.get("vision_feature_select_strategy") or inner.config.vision_feature_select_strategy
    )
    numbers = _numbers(shape, _prefix(inner, call)).double().unsqueeze(-1)
    packed, _ = inner.pack_image_features(
        torch.split(numbers, tiles),
        sizes,
        vision_feature_select_strategy=strategy,
        image_newline=_none(inner),
    )
    return torch.cat(list(packed)).round().long()


def _none(inner: nn.Module) -> Tensor | None:
    return None if inner.image_newline is None else torch.full((1,), -1.0, dtype=torch.float64)


def _llava_onevision(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    from transformers.models.llava_onevision.modeling_llava_onevision import (
        get_anyres_image_grid_shape,
        image_size_to_num_patches,
    )

    config, sizes = inner.config, call["image_sizes"]
    counts = call.get("batch_num_images")
    alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(n)]
    size = config.vision_config.image_size
    tiles = [
        image_size_to_num_patches(s, config.image_grid_pinpoints, size) if cut else 1
        for s, cut in zip(sizes, alone, strict=True)
    ]
    numbers = _numbers(shape, _prefix(inner, call))
    side = size // config.vision_config.patch_size
    # Too many tokens are interpolated: numbers cannot be, but places can. Each patch sends its row
    # and column in the tiles put together, which come out as those of the nearest patch.
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places, grids = [], []
    for s, n in zip(sizes, tiles, strict=True):
        rows, columns = (
            get_anyres_image_grid_shape(s, config.image_grid_pinpoints, size) if n > 1 else (1, 1)
        )
        grids.append((rows, columns))
        tile = torch.arange(max(n - 1, 1))
        of_tile = torch.stack(
            [
                y.flatten() + (tile // columns * side)[:, None],
                x.flatten() + (tile % columns * side)[:, None],
            ],
            dim=-1,
        )
        coarse = torch.stack([y.flatten(), x.flatten()], -1)[None]
        places.append(torch.cat([coarse, of_tile]) if n > 1 else coarse)
    newline = None if inner.image_newline is None else torch.full((2,), -1.0, dtype=torch.float64)
    ratio = call.get("vision_aspect_ratio") or config.vision_aspect_ratio
    packed, _ = inner.pack_image_features(
        [p.double() for p in places], sizes, image_newline=newline, vision_aspect_ratio=ratio
    )
    table, first = [], 0
    for place, n, (_, columns) in zip(packed, tiles, grids, strict=True):
        of_picture, place = numbers[first : first + n], place.round().long()
        y, x = place.unbind(-1)
        tile = y // side * columns + x // side + 1
        tile[: side * side] = 0  # the picture as a whole comes first
        patch = of_picture[tile.clamp(0, n - 1), (y % side * side + x % side).clamp(min=0)]
        table.append(torch.where(y < 0, -1, patch))
        first += n
    return torch.cat(table).unsqueeze(-1)


def _mistral3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    patch, size = inner.vision_tower.patch_size, inner.config.spatial_merge_size
    table, first = [], 0
    for height, width in torch.as_tensor(call["image_sizes"]).tolist():
        rows, columns = height // patch, width // patch
        numbers = torch.arange(first, first + rows * columns).view(1, rows, columns)
        whole = numbers[:, : rows // size * size, : columns // size * size]
        table.append(_windows(whole.contiguous(), size))
        first += rows * columns
    return torch.cat(table)


def _mistral3_under(model: nn.Module) -> int:
    return model.config.spatial_merge_size**2


def _idefics3(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    scale = inner.connector.scale_factor
    shuffled = inner.connector.pixel_shuffle(_numbers(shape).double().unsqueeze(-1), scale)
    return shuffled.flatten(0, 1).round().long()


def _idefics3_under(model: nn.Module) -> int:
    return model.model.connector.scale_factor**2


def _internvl(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    numbers = _numbers(shape, _prefix(inner, call))
    side = math.isqrt(numbers.shape[1])
    maps = numbers.double().view(-1, side, side, 1)
    shuffled = inner.pixel_shuffle(maps, scale_factor=inner.config.downsample_ratio)
    return shuffled.flatten(0, 2).round().long()


def _internvl_under(model: nn.Module) -> int:
    return round(1 / model.config.downsample_ratio) ** 2


def _qwen(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    # The processor puts the patches of a token one after the other.
    return torch.arange(shape[0]).view(-1, inner.visual.spatial_merge_size**2)


def _qwen2_5(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    # Blocks work on tokens in the order of windows, and the merged tokens are put back.
    from transformers.vision_utils import get_vision_window_index

    vision = inner.visual
    sizes = {"spatial_merge_size": vision.spatial_merge_size, "window_size": vision.window_size}
    order, _ = get_vision_window_index(
        call["image_grid_thw"].cpu(), **sizes, patch_size=vision.patch_size, kwargs={}
    )
    return _qwen(inner, shape, call)[torch.argsort(torch.as_tensor(order))]


def _qwen_under(model: nn.Module) -> int:
    return model.model.visual.spatial_merge_size**2


FAMILIES = {
    "llava": VLMFamily(_tower, _one, _llava, _has_one_view),
    "vipllava": VLMFamily(_tower, _one, _vipllava, _has_one_view),
    "paligemma": VLMFamily(_tower, _one, _paligemma, _has_one_view),
    "gemma3": VLMFamily(_tower, _gemma3_under, _gemma3, _has_one_view),
    "llava_next": VLMFamily(_tower, _one, _llava_next),
    "llava_onevision": VLMFamily(_tower, _one, _llava_onevision),
    "mistral3": VLMFamily(_tower, _mistral3_under, _mistral3),
    "idefics3": VLMFamily(_idefics_parts, _idefics3_under, _idefics3),
    "smolvlm": VLMFamily(_idefics_parts, _idefics3_under, _idefics3),
    "internvl": VLMFamily(_tower, _internvl_under, _internvl),
    "qwen2_vl": VLMFamily(_qwen_parts, _qwen_under, _qwen),
    "qwen2_5_vl": VLMFamily(_qwen_parts, _qwen_under, _qwen2_5),
    "qwen3_vl": VLMFamily(_qwen_parts, _qwen_under, _qwen),
}


def family_of(model: nn.Module) -> VLMFamily:
    """The family of a loaded model; ValueError for others, and where the model has not the parts
    that its family has.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UserError(
            f"{type(model).__name__} ({kind}) is not a vision-language model that can be upgraded;"
            f" known are {', '.join(sorted(FAMILIES))}. An encoder and a language model can be"
            " joined with sparsecut.build"
        )
    family = FAMILIES[kind]
    try:
        parts, _ = family.parts(model), family.patches_under(model)
        parts.inner.get_image_features, parts.vision.config, parts.language.config  # noqa: B018  they must be there
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} says it is a {kind}, but the parts of one cannot be read from"
            f" it ({error}); give the whole model, as AutoModelForImageTextToText loads it"
        ) from error
    return family
