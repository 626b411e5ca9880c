"""The one contract for an encoder: views go in, and every block's states come out as [views, N, D],
patch by patch in raster order.

A `PatchGrid` says what a view is and how its patches lie; `encoder_inputs` makes of ordinary
views what an encoder takes, `to_raster_order` puts what its blocks return into raster order.
Encoders that pack pictures of any size run on views of one size. For an audio encoder a view is a
spectrogram, and its patches are one row of moments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .schema import UserError


@dataclass(frozen=True)
class PatchGrid:
    """A view and its patches: view, its shape [channels, height, width] or [mels, frames]; rows and
    columns of patches; width D.

    patch: height and width of a patch in pixels. merge: patches come in squares of merge x merge;
    window: these squares come in windows of that many squares a side, 0 where they do not; frames:
    how often a picture is given, as if it were a video.
    """

    kind: str  # a key of FEEDS
    view: tuple[int, ...]
    rows: int
    columns: int
    width: int
    patch: tuple[int, int]
    merge: int = 1
    window: int = 0
    frames: int = 1

    @property
    def num_patches(self) -> int:
        """Patches of one view."""
        return self.rows * self.columns


# How the encoder takes its views, for those that do not simply take [views, 3, height, width] and
# put prefix tokens first.
KINDS = {
    "qwen2_vl_vision": "qwen",
    "qwen2_5_vl_vision": "qwen",
    "qwen3_vl_vision": "qwen",
    "qwen3_vl_moe_vision": "qwen",
    "pixtral": "pixtral",
    "siglip2_vision_model": "naflex",
    "sam_vision_model": "map",
    "sam_hq_vision_model": "map",
    "whisper": "audio",
}

# Encoders with an image size and a patch size whose blocks do not end with one state per patch, row
# by row: widths or grids that differ from block to block, masked patches, feature maps of other
# layouts, detection tokens at the end, videos.
UNSUPPORTED_ENCODERS = (
    "convnext",
    "convnextv2",
    "donut-swin",
    "hiera",
    "maskformer-swin",
    "mgp-str",
    "sam3_vit_model",
    "swin",
    "swin2sr",
    "swinv2",
    "timesformer",
    "videomae",
    "vit_mae",
    "vitdet",
    "vivit",
    "yolos",
)

# Their own code lays positions out as a square, whatever their configuration says.
SQUARE_ENCODERS = (
    "dinov2",
    "dinov2_with_registers",
    "dpt",
    "internvl_vision",
    "pixio",
    "tipsv2_vision_model",
)


def read_grid(config, view_size: int | list | tuple | None = None) -> PatchGrid:
    """The grid of an encoder's configuration; view_size: the size of a view in pixels, or (height,
    width), where it is free.

    Raises ValueError for an encoder whose blocks are not known to put out one fixed grid of
    patches, for views that are no whole number of patches, and where a size is needed and none is
    given, or given and fixed already.
    """
    kind = KINDS.get(config.model_type, "plain")
    if kind == "audio":
        return _audio_grid(config, view_size)
    own = own_view_size(config)
    sizes = {
        name: getattr(config, name, None)
        for name in ("image_size", "patch_size", "num_hidden_layers", "hidden_size")
    }
    free = kind in ("qwen", "pixtral", "naflex")
    patch = pair(sizes["patch_size"])
    numbers = (*patch, sizes["num_hidden_layers"], sizes["hidden_size"], *(() if free else own))
    if config.model_type in UNSUPPORTED_ENCODERS or not all(isinstance(n, int) for n in numbers):
        given = ", ".join(f"{name}={value!r}" for name, value in sizes.items())
        raise UserError(
            f"the vision encoder {config.model_type} has {given}, but a stack of blocks over one"
            " fixed grid of patches is needed; use an encoder like CLIP, SigLIP, ViT, DINOv2,"
            " Pixtral or Qwen2-VL's (hierarchical and masked ones are not supported)"
        )
    merge = getattr(config, "spatial_merge_size", 1) if kind == "qwen" else 1
    view = _view_of(config, own, view_size, tuple(side * merge for side in patch), free)
    window = (
        getattr(config, "window_size", 0) // merge // patch[0]
        if config.model_type == "qwen2_5_vl_vision"
        else 0
    )
    return PatchGrid(
        kind,
        (getattr(config, "num_channels", getattr(config, "in_channels", 3)), *view),
        view[0] // patch[0],
        view[1] // patch[1],
        config.embed_dim if config.model_type == "qwen2_vl_vision" else config.hidden_size,
        patch,
        merge,
        window,
        getattr(config, "temporal_patch_size", 1) if kind == "qwen" else 1,
    )


def _view_of(config, own, view_size, unit: tuple[int, int], free: bool) -> tuple[int, int]:
    """Height and width of a view, checked: whole units, no larger than the encoder's positions
    reach, and its own where fixed.
    """
    name = config.model_type
    if view_size is not None and not (
        _whole(view_size) and all(side > 0 for side in pair(view_size))
    ):
        raise UserError(
            f"view_size is {view_size!r}, but must be pixels, like 448, or (height, width), like"
            " (336, 448)"
        )
    if view_size is None and own == (None, None):
        raise UserError(
            f"the vision encoder {name} takes pictures of any size, and its configuration names"
            f" none; say how large a view is, for example view_size={16 * unit[0]} (a multiple of"
            f" {unit[0]} pixels)"
        )
    view = own if view_size is None else pair(view_size)
    if not free and view != own:
        raise UserError(
            f"view_size is {view_size!r}, but the views of {name} are {own[0]} x {own[1]} pixels;"
            " leave view_size out"
        )
    if name in SQUARE_ENCODERS and view[0] * unit[1] != view[1] * unit[0]:
        raise UserError(
            f"{name} has views of {view[0]} x {view[1]} pixels and patches of {unit[0]} x"
            f" {unit[1]}, but its positions are a square; use as many rows of patches as columns,"
            " or an encoder like ViT or DINOv3"
        )
    for side, step in zip(view, unit, strict=True):
        if side % step:
            what = "view_size" if view_size is not None else "image_size"
            raise UserError(
                f"{name} has {what} {side}, which is not a multiple of its patch_size {step}; "
                f"set {what} to {max(1, side // step) * step} or use another encoder"
            )
    if name == "pixtral" and any(side > most for side, most in zip(view, own, strict=True)):
        raise UserError(
            f"view_size is {view_size!r}, but the positions of {name} reach {own[0]} pixels; give"
            f" {own[0]} at most"
        )
    return view


def own_view_size(config) -> tuple:
    """Height and width of a view as an encoder's configuration has them; (None, None) where it has
    none.
    """
    if KINDS.get(config.model_type) == "naflex":
        side = math.isqrt(config.num_patches) * pair(config.patch_size)[0]
        return side, side
    return (
        (None, None)
        if KINDS.get(config.model_type) == "qwen"
        else pair(getattr(config, "image_size", None))
    )


def _audio_grid(config, view_size) -> PatchGrid:
    if view_size is not None:
        raise UserError(
            f"view_size is {view_size!r}, but {config.model_type} listens to"
            f" {config.max_source_positions} moments; leave it out"
        )
    if getattr(config, "encoder_layerdrop", 0):
        raise UserError(
            f"{config.model_type} skips blocks at random"
            f" (encoder_layerdrop={config.encoder_layerdrop}), so their states may be missing; set"
            " encoder_layerdrop to 0 in its configuration"
        )
    moments = config.max_source_positions
    view = config.num_mel_bins, 2 * moments  # the second convolution halves the frames
    return PatchGrid("audio", view, 1, moments, config.d_model, (config.num_mel_bins, 2))


def is_audio(config) -> bool:
    """Whether an encoder's configuration is that of an audio encoder."""
    return KINDS.get(config.model_type) == "audio"


def pair(value) -> tuple:
    """A number, or two of them, as (height, width)."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _whole(value) -> bool:
    return len(pair(value)) == 2 and all(
        isinstance(n, int) and not isinstance(n, bool) for n in pair(value)
    )


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder itself: of a pair of encoder and decoder, such as Whisper, the encoder."""
    return model.get_encoder() if is_audio(model.config) else model


def make_encoder(config) -> nn.Module:
    """An encoder of this configuration, its weights random."""
    from transformers import (
        AutoModel,
    )  # not above: configurations are registered while transformers imports its Auto classes

    if config.model_type == "qwen2_vl_vision":  # the one that AutoModel does not list
        from transformers.models.qwen2_vl.modeling_qwen2_vl import (
            Qwen2VisionTransformerPretrainedModel,
        )

        return Qwen2VisionTransformerPretrainedModel._from_config(config)
    return encoder_of(AutoModel.from_config(config))


def plain(grid: PatchGrid, views: Tensor) -> dict:
    """[views, 3, height, width] as they are."""
    return {"pixel_values": views}


def qwen(grid: PatchGrid, views: Tensor) -> dict:
    """Patches as rows, merge x merge squares together, each picture repeated as often as a video
    has frames to a patch.
    """
    (height, width), m = grid.patch, grid.merge
    pattern = "v c (y my h) (x mx w) -> (v y x my mx) (c t h w)"
    rows = repeat(views, pattern, my=m, mx=m, h=height, w=width, t=grid.frames)
    shape = torch.tensor([[1, grid.rows, grid.columns]], device=views.device)
    return {"hidden_states": rows, "grid_thw": shape.expand(len(views), -1)}


def pixtral(grid: PatchGrid, views: Tensor) -> dict:
    """[views, 3, height, width] and the size of each."""
    return {"pixel_values": views, "image_sizes": [grid.view[1:]] * len(views)}


def naflex(grid: PatchGrid, views: Tensor) -> dict:
    """Patches as rows of each view, a mask that hides none, and rows and columns."""
    height, width = grid.patch
    rows = rearrange(views, "v c (y h) (x w) -> v (y x) (h w c)", h=height, w=width)
    shape = torch.tensor([[grid.rows, grid.columns]], device=views.device).expand(len(views), -1)
    mask = torch.ones(rows.shape[:2], dtype=torch.long, device=views.device)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shape}


def audio(grid: PatchGrid, views: Tensor) -> dict:
    """Spectrograms [views, mels, frames] under the name that speech encoders know."""
    return {"input_features": views}


FEEDS = {
    "plain": plain,
    "qwen": qwen,
    "pixtral": pixtral,
    "naflex": naflex,
    "map": plain,
    "audio": audio,
}


def encoder_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """What an encoder's forward takes for views [views, *grid.view]: names and tensors."""
    return FEEDS[grid.kind](grid, views)


def order(grid: PatchGrid) -> Tensor:
    """Which patch, counted row by row, stands at each place of what the encoder's blocks return for
    one view: long [N].
    """
    numbers = torch.arange(grid.num_patches)
    squares = rearrange(
        numbers,
        "(y my x mx) -> y x (my mx)",
        y=grid.rows // grid.merge,
        my=grid.merge,
        mx=grid.merge,
    )
    if not grid.window:
        return squares.flatten()
    side = (
        grid.window
    )  # windows from the top left corner; those at the right and lower edges are what is left
    bands = [squares[y : y + side] for y in range(0, len(squares), side)]
    return torch.cat(
        [band[:, x : x + side].flatten() for band in bands for x in range(0, band.shape[1], side)]
    )


def to_raster_order(grid: PatchGrid, states: Tensor, num_views: int) -> Tensor:
    """States as a block returns them to [views, N, D] in raster order, class and register tokens
    removed.

    Raises ValueError for states that are not of this grid.
    """
    num, given = grid.num_patches, tuple(states.shape)
    if grid.kind in ("qwen", "pixtral") and states.numel() == num_views * num * grid.width:
        states = states.reshape(num_views, num, -1)
    if grid.kind == "map" and states.dim() == 4:
        states = states.flatten(1, 2)
    exact = (
        grid.kind != "plain"
    )  # prefix tokens stand first, and only encoders that take plain views have them
    if (
        states.dim() != 3
        or len(states) != num_views
        or states.shape[1] < num
        or (exact and states.shape[1] != num)
    ):
        raise UserError(
            f"the encoder gave states of shape {given} for {num_views} views, but [{num_views}"
            f" views, {num}{'' if exact else ' or more'} tokens, width] is needed; this encoder's"
            " blocks change the grid, so use another"
        )
    if grid.kind == "qwen":
        return states[:, torch.argsort(order(grid)).to(states.device)]
    return states[:, -num:]
