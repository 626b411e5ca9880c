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
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .schema import UserError


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

    @property
    def num_patches(self) -> int:
        """Patches of one view."""
        return self.rows * self.columns


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
    "whisper": "audio",
}
FREE_SIZE_KINDS = ("qwen", "pixtral", "naflex")  # they take views of any size

# Encoders with an image size and a patch size whose blocks do not return one state per patch, row
# by row. Their widths or grids differ from block to block, patches are masked, feature maps have
# other layouts, detection tokens come last, or they take videos.
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
    """The grid of an encoder, read from its configuration.

    Args:
        config: The encoder's configuration.
        view_size: Pixels of a view, or (height, width), for encoders of images of any size.

    Raises:
        UserError: The blocks do not return one fixed grid of patches, or a view is not a whole
            number of patches. Or `view_size` is missing, or the encoder fixes it already.
    """
    kind = get_kind(config)
    if kind == "audio":
        return _read_audio_grid(config, view_size)
    patch = as_pair(getattr(config, "patch_size", None))
    _check_one_grid(config, kind, patch)
    merge = getattr(config, "spatial_merge_size", 1) if kind == "qwen" else 1
    unit = (patch[0] * merge, patch[1] * merge)
    height, width = _read_view(config, view_size, unit, is_free=kind in FREE_SIZE_KINDS)
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
    )


def get_kind(config) -> str:
    """How an encoder takes its views: a key of `INPUTS`."""
    return ENCODER_KINDS.get(config.model_type, "plain")


def is_audio(config) -> bool:
    """Whether a configuration is that of an audio encoder."""
    return get_kind(config) == "audio"


def takes_plain_views(grid: PatchGrid) -> bool:
    """Whether the encoder takes [views, 3, height, width] and nothing else."""
    return INPUTS[grid.kind] is make_plain_inputs


def as_pair(value) -> tuple:
    """One number, or two, as (height, width)."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def _check_one_grid(config, kind: str, patch: tuple) -> None:
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
        " Pixtral or Qwen2-VL's (hierarchical and masked ones are not supported)"
    )


def get_fixed_view_size(config) -> tuple:
    """Height and width of a view as a configuration fixes them; (None, None) where it does not."""
    kind = get_kind(config)
    if kind == "naflex":
        side = math.isqrt(config.num_patches) * as_pair(config.patch_size)[0]
        return side, side
    if kind == "qwen":
        return None, None
    return as_pair(getattr(config, "image_size", None))


def _read_view(config, view_size, unit: tuple[int, int], *, is_free: bool) -> tuple[int, int]:
    """Height and width of a view, checked against the encoder.

    Args:
        config: The encoder's configuration.
        view_size: What the user gave, or None.
        unit: Height and width that a view must be a multiple of.
        is_free: The encoder takes views of any size.
    """
    name = config.model_type
    fixed = get_fixed_view_size(config)
    _check_view_size(name, view_size, fixed, unit)
    view = fixed if view_size is None else as_pair(view_size)
    if not is_free and view != fixed:
        raise UserError(
            f"view_size is {view_size!r}, but the views of {name} are {fixed[0]} x {fixed[1]}"
            " pixels; leave view_size out"
        )
    if name in SQUARE_ENCODERS and view[0] * unit[1] != view[1] * unit[0]:
        raise UserError(
            f"{name} has views of {view[0]} x {view[1]} pixels and patches of {unit[0]} x"
            f" {unit[1]}, but its positions form a square; use as many rows of patches as columns,"
            " or an encoder like ViT or DINOv3"
        )
    key = "image_size" if view_size is None else "view_size"
    for side, step in zip(view, unit, strict=True):
        if side % step:
            nearest = max(1, side // step) * step
            raise UserError(
                f"{name} has {key} {side}, which is not a multiple of its patch_size {step};"
                f" set {key} to {nearest} or use another encoder"
            )
    if name == "pixtral" and (view[0] > fixed[0] or view[1] > fixed[1]):
        raise UserError(
            f"view_size is {view_size!r}, but the positions of {name} end at {fixed[0]} pixels;"
            f" give at most {fixed[0]}"
        )
    return view


def _check_view_size(name: str, view_size, fixed: tuple, unit: tuple[int, int]) -> None:
    """Refuse a view size that is no size, and a missing one where it is needed."""
    if view_size is None:
        if fixed == (None, None):
            raise UserError(
                f"the vision encoder {name} takes images of any size, and its configuration names"
                f" none; give view_size, a multiple of {unit[0]} pixels, for example"
                f" view_size={16 * unit[0]}"
            )
        return
    sides = as_pair(view_size)
    is_whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if len(sides) != 2 or not is_whole or min(sides) <= 0:
        raise UserError(
            f"view_size is {view_size!r}, but must be pixels, like 448, or (height, width), like"
            " (336, 448)"
        )


def _read_audio_grid(config, view_size) -> PatchGrid:
    num_frames = config.max_source_positions
    if view_size is not None:
        raise UserError(
            f"view_size is {view_size!r}, but {config.model_type} takes audio of {num_frames}"
            " frames; leave view_size out"
        )
    if getattr(config, "encoder_layerdrop", 0):
        raise UserError(
            f"{config.model_type} skips blocks at random"
            f" (encoder_layerdrop={config.encoder_layerdrop}), so their states may be missing; set"
            " encoder_layerdrop to 0 in its configuration"
        )
    view = (config.num_mel_bins, 2 * num_frames)  # the second convolution halves the frames
    patch = (config.num_mel_bins, 2)
    return PatchGrid("audio", view, 1, num_frames, config.d_model, patch)


def get_encoder(model: nn.Module) -> nn.Module:
    """The encoder itself; of an encoder-decoder pair such as Whisper, its encoder."""
    return model.get_encoder() if is_audio(model.config) else model


def make_encoder(config) -> nn.Module:
    """A new encoder of a configuration, its weights random."""
    # Not above: configurations are registered while transformers imports its Auto classes.
    from transformers import AutoModel

    if config.model_type == "qwen2_vl_vision":  # AutoModel does not list it
        from transformers.models.qwen2_vl import modeling_qwen2_vl

        return modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel._from_config(config)
    return get_encoder(AutoModel.from_config(config))


def make_plain_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """[views, 3, height, width] as they are."""
    return {"pixel_values": views}


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


def make_audio_inputs(grid: PatchGrid, views: Tensor) -> dict:
    """Spectrograms [views, mels, frames] under the name that speech encoders use."""
    return {"input_features": views}


INPUTS = {
    "plain": make_plain_inputs,
    "qwen": make_qwen_inputs,
    "pixtral": make_pixtral_inputs,
    "naflex": make_naflex_inputs,
    "map": make_plain_inputs,
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


def to_raster_order(grid: PatchGrid, states: Tensor, num_views: int) -> Tensor:
    """Bring states as a block returns them into raster order, without prefix tokens.

    Args:
        grid: The encoder's grid.
        states: What a block returned for all views, in the encoder's own layout.
        num_views: Number of views.

    Returns:
        [views, N, D].

    Raises:
        UserError: The states are not of this grid.
    """
    num_patches = grid.num_patches
    shape = tuple(states.shape)
    is_packed = grid.kind in ("qwen", "pixtral")
    if is_packed and states.numel() == num_views * num_patches * grid.width:
        states = states.reshape(num_views, num_patches, -1)
    if grid.kind == "map" and states.dim() == 4:
        states = states.flatten(1, 2)
    may_have_prefix = grid.kind == "plain"
    fits = states.dim() == 3 and len(states) == num_views and states.shape[1] >= num_patches
    if not fits or (not may_have_prefix and states.shape[1] != num_patches):
        tokens = f"{num_patches}{' or more' if may_have_prefix else ''} tokens"
        raise UserError(
            f"the encoder returned states of shape {shape} for {num_views} views, but [{num_views}"
            f" views, {tokens}, width] is needed: its blocks change the grid, so use another"
            " encoder"
        )
    if grid.kind == "qwen":
        return states[:, torch.argsort(get_patch_order(grid)).to(states.device)]
    return states[:, -num_patches:]


def check_extractor(feature_extractor, grid) -> None:
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
