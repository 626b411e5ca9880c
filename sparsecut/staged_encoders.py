"""Encoders of several stages, each with a width and a grid of its own: Swin, ConvNeXt, Hiera, PVT.

Their blocks are numbered through over all stages, so tap k is the output of block k, as in any
encoder. Taps are brought to one grid, the finest of those that a plan reads: each patch has the
state of the cell that covers it. They are brought to one width, that of the widest of these taps,
by zeros behind their own channels. Both leave every value as the encoder computed it. The cost is
that of so many patches, and in a projector that of the channels that are zero.

To add an encoder: add its `model_type` to `STAGED_ENCODERS`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .schema import UserError
from .stages import Stages, TapShape
from .timm_encoders import TIMM, read_timm


def _name_lists(pattern: str, config: Any) -> tuple[str, ...]:
    return tuple(pattern.format(stage) for stage in range(len(config.depths)))


def _double(first: int, config: Any) -> tuple[int, ...]:
    """A number that doubles from stage to stage."""
    return tuple(first * 2**stage for stage in range(len(config.depths)))


def _read_swin(config: Any) -> Stages:
    return Stages(
        blocks=_name_lists("layers.{}.blocks", config),
        depths=tuple(config.depths),
        widths=_double(config.embed_dim, config),
        strides=_double(config.patch_size, config),
        layout="tokens",
    )


def _read_focalnet(config: Any) -> Stages:
    return Stages(
        blocks=_name_lists("stages.{}.layers", config),
        depths=tuple(config.depths),
        widths=_double(config.embed_dim, config),
        strides=_double(config.patch_size, config),
        layout="tokens",
    )


def _read_convnext(config: Any) -> Stages:
    return Stages(
        blocks=_name_lists("stages.{}.layers", config),
        depths=tuple(config.depths),
        widths=tuple(config.hidden_sizes),
        strides=_double(getattr(config, "patch_size", 4), config),
        layout="channels",
        is_any_size=True,
    )


def _read_resnet(config: Any) -> Stages:
    first = 8 if config.downsample_in_first_stage else 4
    return Stages(
        blocks=_name_lists("stages.{}.layers", config),
        depths=tuple(config.depths),
        widths=tuple(config.hidden_sizes),
        strides=_double(first, config),
        layout="channels",
        stem=(config.embedding_size, 4),
        is_any_size=True,
    )


def _read_pyramid(pattern: str, layout: str = "tokens", is_any_size: bool = True) -> Callable:
    """For encoders that cut patches anew in every stage, each with a stride of its own."""

    def read(config: Any) -> Stages:
        return Stages(
            blocks=_name_lists(pattern, config),
            depths=tuple(config.depths),
            widths=tuple(config.hidden_sizes),
            strides=tuple(itertools.accumulate(config.strides, lambda a, b: a * b)),
            layout=layout,
            is_any_size=is_any_size,
        )

    return read


def _read_hiera(config: Any) -> Stages:
    num_pools = config.num_query_pool
    pools = [min(stage, num_pools) for stage in range(len(config.depths))]
    stride = config.query_stride[0]
    unrolled = stride ** (len(config.depths) - 1)
    return Stages(
        blocks=_name_lists("stages.{}.layers", config),
        depths=tuple(config.depths),
        widths=tuple(
            int(config.embed_dim * config.embed_dim_multiplier**stage)
            for stage in range(len(config.depths))
        ),
        strides=tuple(config.patch_stride[0] * stride**pool for pool in pools),
        layout="tokens",
        stem=(config.embed_dim, config.patch_stride[0]),
        is_unrolled=True,
        least_unit=config.patch_stride[0] * math.lcm(unrolled, *config.masked_unit_size),
    )


STAGED_ENCODERS: dict[str, Callable] = {
    "swin": _read_swin,
    "swinv2": _read_swin,
    "donut-swin": _read_swin,
    "maskformer-swin": _read_swin,
    "focalnet": _read_focalnet,
    "convnext": _read_convnext,
    "convnextv2": _read_convnext,
    "dinov3_convnext": _read_convnext,
    "resnet": _read_resnet,
    "hiera": _read_hiera,
    "segformer": _read_pyramid("stages.{}.blocks"),
    "glpn": _read_pyramid("block.{}"),
    "pvt": _read_pyramid("block.{}", is_any_size=False),
    "pvt_v2": _read_pyramid("layers.{}.blocks"),
    "poolformer": _read_pyramid("block.{}", "channels"),
    TIMM: read_timm,
}


def is_staged(config: Any) -> bool:
    """Whether an encoder has stages of several widths and grids."""
    return config.model_type in STAGED_ENCODERS


def read_stages(config: Any) -> Stages:
    """The stages of an encoder, read from its configuration."""
    return STAGED_ENCODERS[config.model_type](config)


def get_unrolled_order(shape: TapShape) -> Tensor:
    """Which cell, in raster order, is at each place of Hiera's states, [rows * columns].

    Hiera takes squares of 2 x 2 cells apart, again and again, so that cells which are pooled
    together later lie at the same place of equal parts.
    """
    numbers = torch.arange(shape.rows * shape.columns).view(1, shape.rows, shape.columns)
    for _ in range(shape.unrolled):
        numbers = rearrange(numbers, "b (y sy) (x sx) -> (b sy sx) y x", sy=2, sx=2)
    return numbers.flatten()


def to_common(states: Tensor, shape: TapShape, common: TapShape, layout: str) -> Tensor:
    """Bring the states of a tap to the common grid and width.

    Args:
        states: What the block returned, in the encoder's own layout.
        shape: Its grid and width.
        common: Those of all taps.
        layout: As in `Stages`.

    Returns:
        [views, rows * columns, D] of the common grid.

    Raises:
        UserError: The states are not of this grid.
    """
    num_cells = shape.rows * shape.columns
    own_shape = tuple(states.shape)
    if layout == "channels" and states.dim() == 4:
        states = rearrange(states, "v d y x -> v (y x) d")
    if layout == "map" and states.dim() == 4:
        states = rearrange(states, "v y x d -> v (y x) d")
    fits = states.dim() == 3 and states.shape[1] >= num_cells and states.shape[2] == shape.width
    if not fits:
        raise UserError(
            f"the encoder returned states of shape {own_shape}, but {shape.rows} x {shape.columns}"
            f" cells of width {shape.width} are needed: its blocks have another grid than its"
            " configuration describes, so use another encoder"
        )
    states = states[:, -num_cells:]
    if shape.unrolled:
        states = states[:, torch.argsort(get_unrolled_order(shape)).to(states.device)]
    cells = rearrange(states, "v (y x) d -> v y x d", y=shape.rows)
    cells = cells.repeat_interleave(common.rows // shape.rows, dim=1)
    cells = cells.repeat_interleave(common.columns // shape.columns, dim=2)
    return F.pad(cells.flatten(1, 2), (0, common.width - shape.width))


def make_skipped_states(states: Tensor, shape: TapShape, layout: str) -> Tensor:
    """What a block that is skipped passes on: its input, or zeros where it changes the shape."""
    width = states.shape[1 if layout == "channels" else -1]
    num_cells = states[0].numel() // width
    if width == shape.width and num_cells >= shape.rows * shape.columns:
        return states
    sizes = {
        "tokens": (shape.rows * shape.columns, shape.width),
        "map": (shape.rows, shape.columns, shape.width),
        "channels": (shape.width, shape.rows, shape.columns),
    }
    return states.new_zeros(len(states), *sizes[layout])
