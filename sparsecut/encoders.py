"""One contract for every encoder: views in, every block's states out as [views, N, D].

A `PatchGrid` says what a view is and how its patches lie. `encoder_inputs` turns ordinary views
into what an encoder takes. `to_raster_order` turns what its blocks return into raster order.
Encoders that pack images of any size run on views of one size. For an audio encoder a view is a
spectrogram, and its patches are one row of frames.

To add an encoder whose inputs or outputs are of another form: add its `model_type` to
`ENCODER_KINDS`, and the kind to `INPUTS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .encoder_classes import INTERPOLATION, asks_for_interpolation, find_encoder_class
from .schema import UserError
from .staged_encoders import is_staged, read_stages, to_common
from .stages import TapShape, choose_common, list_shapes
from .timm_encoders import allow_view_size
from .view_sizes import as_pair, read_view


@dataclass(frozen=True)
class PatchGrid:
    """A view and its patches.

    Attributes:
        kind: How the encoder takes its views: a key of `INPUTS`.
        view: Shape of a view, [channels, height, width], or [mels, frames] for audio.
        rows: Rows of patches in a view.
        columns: Columns of patches in a view.
        width: D, the width of the states.
        patch: Height and width of a patch in pixels.
        merge: Patches come in squares of merge x merge.
        window: These squares come in windows of window x window squares; 0 for no windows.
        frames: How often an image is repeated, as if it were a video.
        interpolates: The encoder is asked to interpolate its positions, for views of another size
            than its own.
        shapes: Of encoders in stages: what each tap has by itself, from tap 0 on.
        layout: Of encoders in stages: how their states lie, see `staged_encoders.Stages`.
        blocks: Of encoders in stages: the names of their lists of blocks.
    """

    kind: str
    view: tuple[int, ...]
    rows: int
    columns: int
    width: int
    patch: tuple[int, int]
    merge: int = 1
    window: int = 0
    frames: int = 1
    interpolates: bool = False
    shapes: tuple[TapShape, ...] = ()
    layout: str = ""
    blocks: tuple[str, ...] = ()

    @property
    def num_patches(self) -> int:
        """Patches of one view."""
        return self.rows * self.columns

    @property
    def tap_widths(self) -> tuple[int, ...]:
        """Width of each tap from 0 on, where they differ; else none."""
        return tuple(shape.width for shape in self.shapes)


# Encoders that do not simply take [views, 3, height, width] and put prefix tokens first.
ENCODER_KINDS = {
    "qwen2_vl_vision": "qwen",
    "qwen2_5_vl_vision": "qwen",
    "qwen3_vl_vision": "qwen",
    "qwen3_vl_moe_vision": "qwen",
    "pixtral": "pixtral",
    "siglip2_vision_model": "naflex",
    "sam_vision_model": "map",
    "sam_hq_vision_model": "map",
    "sam3_vit_model": "map",
    "got_ocr2_vision": "map",
    "deepseek_ocr2_sam_vision_model": "map",
    "slanext_vision": "map",
    "vitdet": "channels",
    "llama4_vision_model": "class_last",
    "yolos": "detection",
    "vit_mae": "masked",
    "whisper": "audio",
}
FREE_SIZE_KINDS = ("qwen", "pixtral", "naflex")  # they take views of any size

# Encoders with an image size and a patch size whose blocks do not return one state per patch, row
# by row. Their widths or grids differ from block to block, or they take videos.
UNSUPPORTED_ENCODERS = (
    "mgp-str",
    "swin2sr",
    "timesformer",
    "videomae",
    "vivit",
)


def read_grid(
    config: Any,
    view_size: int | list | tuple | None = None,
    taps: Iterable[int] | None = None,
) -> PatchGrid:
    """The grid of an encoder, read from its configuration.

    Args:
        config: The encoder's configuration.
        view_size: Pixels of a view, or (height, width). Encoders of images of any size may need
            it. Those that interpolate their positions take it in place of their own.
        taps: The taps that are read; None for all. They decide the grid of encoders in stages.

    Raises:
        UserError: The blocks do not return one fixed grid of patches, or a view is not a whole
            number of patches. Or `view_size` is missing, or the encoder cannot take it.
    """
    kind = get_kind(config)
    if kind == "audio":
        return _read_audio_grid(config, view_size)
    if kind == "staged":
        return _read_staged_grid(config, view_size, taps)
    patch = as_pair(getattr(config, "patch_size", None))
    _check_one_grid(config, kind, patch)
    _check_nothing_is_random(config)
    merge = getattr(config, "spatial_merge_size", 1) if kind == "qwen" else 1
    unit = (patch[0] * merge, patch[1] * merge)
    is_free = kind in FREE_SIZE_KINDS
    fixed = get_fixed_view_size(config)
    asks = not is_free and view_size is not None and asks_for_interpolation(config)
    height, width = read_view(config, view_size, fixed, unit, is_free=is_free, asks=asks)
    channels = getattr(config, "num_channels", getattr(config, "in_channels", 3))
    window = 0
    if config.model_type == "qwen2_5_vl_vision":
        window = getattr(config, "window_size", 0) // merge // patch[0]
    # hidden_size of Qwen2-VL's encoder is the language model's.
    has_own_width = config.model_type != "qwen2_vl_vision"
    return PatchGrid(
        kind=kind,
        view=(channels, height, width),
        rows=height // patch[0],
        columns=width // patch[1],
        width=config.hidden_size if has_own_width else config.embed_dim,
        patch=patch,
        merge=merge,
        window=window,
        frames=getattr(config, "temporal_patch_size", 1) if kind == "qwen" else 1,
        interpolates=asks and (height, width) != fixed,
    )


def get_kind(config: Any) -> str:
    """How an encoder takes its views: a key of `INPUTS`."""
    if is_staged(config):
        return "staged"
    return ENCODER_KINDS.get(config.model_type, "plain")


def count_blocks(config: Any) -> int:
    """Blocks of an encoder, over all its stages."""
    return sum(read_stages(config).depths) if is_staged(config) else config.num_hidden_layers


def is_audio(config: Any) -> bool:
    """Whether a configuration is that of an audio encoder."""
    return get_kind(config) == "audio"


def takes_plain_views(grid: PatchGrid) -> bool:
    """Whether the encoder takes [views, 3, height, width] and nothing else."""
    return INPUTS[grid.kind] in (make_plain_inputs, make_masked_inputs)


def _check_one_grid(config: Any, kind: str, patch: tuple) -> None:
    """Refuse encoders whose configuration does not describe blocks over one fixed grid."""
    names = ("image_size", "patch_size", "num_hidden_layers", "hidden_size")
    sizes = {name: getattr(config, name, None) for name in names}
    numbers = [*patch, sizes["num_hidden_layers"], sizes["hidden_size"]]
    if kind not in FREE_SIZE_KINDS:
        numbers += get_fixed_view_size(config)
    has_numbers = all(isinstance(number, int) for number in numbers)
    if has_numbers and config.model_type not in UNSUPPORTED_ENCODERS:
        return
    values = ", ".join(f"{name}={value!r}" for name, value in sizes.items())
    raise UserError(
        f"the vision encoder {config.model_type} has {values}, but SparseCut needs a stack of"
        " blocks over one fixed grid of patches; use an encoder like CLIP, SigLIP, ViT, DINOv2,"
        " Swin, ConvNeXt, Pixtral or Qwen2-VL's"
    )


def _check_nothing_is_random(config: Any) -> None:
    """Refuse encoders that leave out patches or blocks at random, so that states may be missing."""
    for name, what in (("mask_ratio", "hides patches"), ("encoder_layerdrop", "skips blocks")):
        share = getattr(config, name, 0)
        if share and config.model_type in ("vit_mae", "whisper"):
            raise UserError(
                f"{config.model_type} {what} at random ({name}={share}), so their states may be"
                f" missing; set {name} to 0 in its configuration"
            )


def prepare_to_load(config: Any, view_size: Any = None) -> None:
    """Change the configuration of an encoder that is about to be loaded, so that it can be read.

    A masked autoencoder hides none of its patches. An encoder of timm takes views of another size.
    """
    if config.model_type == "vit_mae":
        config.mask_ratio = 0.0
    allow_view_size(config, view_size)


def get_fixed_view_size(config: Any) -> tuple:
    """Height and width of a view as a configuration fixes them; (None, None) where it does not."""
    kind = get_kind(config)
    if kind == "naflex":
        side = math.isqrt(config.num_patches) * as_pair(config.patch_size)[0]
        return side, side
    if kind == "qwen":
        return None, None
    return as_pair(getattr(config, "image_size", None))


def _read_staged_grid(config: Any, view_size: Any, taps: Iterable[int] | None) -> PatchGrid:
    stages = read_stages(config)
    unit = (stages.unit, stages.unit)
    fixed = stages.own_view or as_pair(getattr(config, "image_size", None))
    asks = view_size is not None and asks_for_interpolation(config)
    is_free = stages.is_any_size
    height, width = read_view(config, view_size, fixed, unit, is_free=is_free, asks=asks)
    shapes = list_shapes(stages, height, width)
    common = choose_common(shapes, taps)
    return PatchGrid(
        kind="staged",
        view=(getattr(config, "num_channels", 3), height, width),
        rows=common.rows,
        columns=common.columns,
        width=common.width,
        patch=(height // common.rows, width // common.columns),
        interpolates=asks and (height, width) != fixed,
        shapes=shapes,
        layout=stages.layout,
        blocks=stages.blocks,
    )


def _read_audio_grid(config: Any, view_size: Any) -> PatchGrid:
    num_frames = config.max_source_positions
    if view_size is not None:
        raise UserError(
            f"view_size is {view_size!r}, but {config.model_type} takes audio of {num_frames}"
            " frames; leave view_size out"
        )
    _check_nothing_is_random(config)
    view = (config.num_mel_bins, 2 * num_frames)  # the second convolution halves the frames
    patch = (config.num_mel_bins, 2)
    return PatchGrid("audio", view, 1, num_frames, config.d_model, patch)


def get_encoder(model: nn.Module) -> nn.Module:
    """The encoder itself; of an encoder-decoder pair such as Whisper, its encoder."""
    return model.get_encoder() if is_audio(model.config) else model


def make_encoder(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A new encoder of a configuration, its weights random."""
    return get_encoder(find_encoder_class(config)._from_config(config, dtype=dtype))


def make_plain_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """[views, 3, height, width] as they are."""
    inputs = {"pixel_values": views}
    return inputs | {INTERPOLATION: True} if grid.interpolates else inputs


def make_qwen_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """Patches as rows, merge x merge squares together, an image repeated like a video's frames."""
    height, width = grid.patch
    pattern = "v c (y my h) (x mx w) -> (v y x my mx) (c t h w)"
    sizes = {"my": grid.merge, "mx": grid.merge, "h": height, "w": width, "t": grid.frames}
    rows = repeat(views, pattern, **sizes)
    shape = torch.tensor([[1, grid.rows, grid.columns]], device=views.device)
    return {"hidden_states": rows, "grid_thw": shape.expand(len(views), -1)}


def make_pixtral_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """[views, 3, height, width] and the size of each."""
    return {"pixel_values": views, "image_sizes": [grid.view[1:]] * len(views)}


def make_naflex_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """Patches as rows of each view, a mask that hides none, and rows and columns."""
    height, width = grid.patch
    rows = rearrange(views, "v c (y h) (x w) -> v (y x) (h w c)", h=height, w=width)
    shape = torch.tensor([[grid.rows, grid.columns]], device=views.device)
    return {
        "pixel_values": rows,
        "pixel_attention_mask": torch.ones(rows.shape[:2], dtype=torch.long, device=views.device),
        "spatial_shapes": shape.expand(len(views), -1),
    }


def make_masked_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """[views, 3, height, width], and numbers by which all patches stay in their order."""
    numbers = torch.arange(grid.num_patches, device=views.device)
    return make_plain_inputs(grid, views) | {"noise": numbers.expand(len(views), -1)}


def make_audio_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """Spectrograms [views, mels, frames] under the name that speech encoders use."""
    return {"input_features": views}


INPUTS = {
    "plain": make_plain_inputs,
    "qwen": make_qwen_inputs,
    "pixtral": make_pixtral_inputs,
    "naflex": make_naflex_inputs,
    "map": make_plain_inputs,
    "channels": make_plain_inputs,
    "class_last": make_plain_inputs,
    "detection": make_plain_inputs,
    "masked": make_masked_inputs,
    "staged": make_plain_inputs,
    "audio": make_audio_inputs,
}


def encoder_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """Arguments of an encoder's forward for views [views, *grid.view]."""
    return INPUTS[grid.kind](grid, views)


def get_patch_order(grid: PatchGrid) -> Tensor:
    """Which patch, in raster order, is at each place of what a block returns for one view, [N]."""
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
    # Windows start in the top left corner; those at the right and lower edges may be smaller.
    windows = []
    for y in range(0, squares.shape[0], grid.window):
        band = squares[y : y + grid.window]
        for x in range(0, squares.shape[1], grid.window):
            windows.append(band[:, x : x + grid.window].flatten())
    return torch.cat(windows)


# Tokens of a view besides its patches: which come before them, and whether others may follow.
PREFIXED_KINDS = ("plain", "masked")
MIXED_KINDS = {"class_last": 0, "detection": 1}


def to_raster_order(
    grid: PatchGrid, states: Tensor, num_views: int, tap: int | None = None
) -> Tensor:
    """Bring states as a block returns them into raster order, without prefix tokens.

    Args:
        grid: The encoder's grid.
        states: What a block returned for all views, in the encoder's own layout.
        num_views: Number of views.
        tap: Which tap it is, needed for encoders in stages.

    Returns:
        [views, N, D].

    Raises:
        UserError: The states are not of this grid.
    """
    if grid.shapes:
        common = TapShape(grid.rows, grid.columns, grid.width)
        return to_common(states, grid.shapes[tap], common, grid.layout)
    num_patches = grid.num_patches
    shape = tuple(states.shape)
    is_packed = grid.kind in ("qwen", "pixtral")
    if is_packed and states.numel() == num_views * num_patches * grid.width:
        states = states.reshape(num_views, num_patches, -1)
    if grid.kind == "map" and states.dim() == 4:
        states = states.flatten(1, 2)
    if grid.kind == "channels" and states.dim() == 4:
        states = states.flatten(2).transpose(1, 2)
    may_have_others = grid.kind in (*PREFIXED_KINDS, *MIXED_KINDS)
    fits = states.dim() == 3 and len(states) == num_views and states.shape[1] >= num_patches
    if not fits or (not may_have_others and states.shape[1] != num_patches):
        tokens = f"{num_patches}{' or more' if may_have_others else ''} tokens"
        raise UserError(
            f"the encoder returned states of shape {shape} for {num_views} views, but [{num_views}"
            f" views, {tokens}, width] is needed: its blocks change the grid, so use another"
            " encoder"
        )
    if grid.kind == "qwen":
        return states[:, torch.argsort(get_patch_order(grid)).to(states.device)]
    if grid.kind in MIXED_KINDS:
        return states[:, MIXED_KINDS[grid.kind] :][:, :num_patches]
    return states[:, -num_patches:]


def check_extractor(feature_extractor: Any, grid: Any) -> None:
    """Check that a feature extractor makes spectrograms of the shape of the encoder's grid.

    Raises:
        UserError: Mels or frames differ.
    """
    num_mels = feature_extractor.feature_size
    num_frames = feature_extractor.nb_max_frames
    if (num_mels, num_frames) != grid.view:
        raise UserError(
            f"the feature extractor makes {num_mels} mels and {num_frames} frames per clip, but"
            f" the encoder takes {grid.view[0]} and {grid.view[1]}; set its feature_size, or its"
            " chunk_length in seconds"
        )
