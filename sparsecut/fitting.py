"""How the images of a model that is built are fitted to its encoder."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

from .any_size import get_patch
from .configuration import SparseCutConfig
from .cutting import check_pixel_limits
from .encoders import (
    FREE_SIZE_KINDS,
    PatchGrid,
    get_fixed_view_size,
    get_kind,
    is_audio,
    prepare_to_load,
    read_grid,
)
from .plan import GATES
from .schema import UserError
from .view_sizes import NATIVE, as_pair, check_fitting

logger = logging.getLogger(__name__)

MANY_TOKENS = 1024  # of an image; from here on `build` says what would make fewer
DEFAULT_UNITS = 16  # units per side of a view, where neither the encoder nor the user names a size


@dataclass(frozen=True)
class Fitting:
    """What `build` is told of images.

    Attributes:
        coarse: One of `COARSE_VIEWS`.
        min_pixels: With "native", the fewest pixels of an image after it was resized.
        max_pixels: With "native", the most.

    Raises:
        UserError: `coarse` is none of these, or limits are given that have no effect.
    """

    coarse: str = "squash"
    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        check_fitting(self.coarse, self.min_pixels, self.max_pixels)

    def choose_view_size(self, vision_config: Any, view_size: Any) -> Any:
        """Choose the size of a view where an encoder takes any size and none is given.

        It is the largest square that `max_pixels` allows. Costs are counted of it.

        Args:
            vision_config: The encoder's configuration.
            view_size: What the user gave, which is kept.
        """
        if self.coarse != NATIVE or view_size is not None:
            return view_size
        if get_kind(vision_config) not in FREE_SIZE_KINDS:
            return None
        unit = _get_unit(vision_config)
        fixed = get_fixed_view_size(vision_config)
        if self.max_pixels is None:
            has_size = fixed != (None, None)
            return None if has_size else [DEFAULT_UNITS * step for step in unit]
        if not isinstance(self.max_pixels, int) or self.max_pixels < 1:
            return None if fixed != (None, None) else list(unit)  # `complete` refuses it
        side = math.isqrt(self.max_pixels)
        sides = [max(side // step, 1) * step for step in unit]
        if vision_config.model_type == "pixtral":
            sides = [min(side, most) for side, most in zip(sides, fixed, strict=True)]
        return sides[0] if sides[0] == sides[1] else sides

    def complete(self, config: SparseCutConfig) -> Fitting:
        """Fill in default limits, and check that images of any size fit the model.

        Args:
            config: The model's configuration.

        Raises:
            UserError: They do not.
        """
        if self.coarse != NATIVE:
            return self
        vision = config.vision_config
        if is_audio(vision):
            raise UserError(
                f"coarse='native' is for images, but {vision.model_type} is an audio encoder;"
                " leave coarse out"
            )
        plan = config.get_plan()
        if GATES[plan.gate].module is not None:
            raise UserError(
                f"gate={plan.gate!r} pools as many tokens of every image, but with coarse='native'"
                " images differ; use another gate, or coarse='squash'"
            )
        height, width = config.grid.view[-2:]
        max_pixels = height * width if self.max_pixels is None else self.max_pixels
        min_pixels = self.min_pixels
        if min_pixels is None and isinstance(max_pixels, int):
            min_pixels = max(max_pixels // 4, 1)
        patch = get_patch(config.grid)
        unit = (patch[0] * config.grid.merge, patch[1] * config.grid.merge)
        check_pixel_limits(min_pixels, max_pixels, unit)
        return replace(self, min_pixels=min_pixels, max_pixels=max_pixels)

    def get_settings(self, config: SparseCutConfig) -> dict:
        """Return the processor's settings of images for a model of this configuration."""
        if self.coarse != NATIVE:
            return {"coarse": self.coarse}
        first = config.get_plan().shortcuts[0]
        return {
            "coarse": self.coarse,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "patch_size": list(get_patch(config.grid)),
            "merge_size": config.grid.merge,
            "mix": first.mix,
            "num_taps": len(first.taps),
        }


def _get_unit(vision_config: Any) -> tuple[int, int]:
    """Height and width in pixels that views are a multiple of."""
    height, width = as_pair(vision_config.patch_size)
    merge = getattr(vision_config, "spatial_merge_size", 1)
    if get_kind(vision_config) != "qwen":
        merge = 1
    return height * merge, width * merge


def warn_of_many_tokens(config: SparseCutConfig, *, is_loaded: bool) -> None:
    """Say how many tokens an image takes, where it takes very many, and what would make fewer.

    Nothing is said of a view size that the user chose, but where an early stage is read.

    Args:
        config: The model's configuration.
        is_loaded: The encoder is given as a module, so its configuration cannot change any more.
    """
    grid, plan = config.grid, config.get_plan()
    num_tokens = config.num_image_tokens
    remedies = _list_later_taps(config, grid)
    is_chosen = config.view_size is not None and not remedies
    if num_tokens <= MANY_TOKENS or is_chosen or is_audio(config.vision_config):
        return
    taps = plan.resolved_taps(config.vision_depth)
    side = _find_smaller_view(config, grid, taps, is_loaded=is_loaded)
    if side is not None:
        remedies.append(f"view_size={side}")
    logger.warning(
        "an image takes %s tokens: this plan reads %s x %s cells in every view%s",
        f"{num_tokens:,}",
        grid.rows,
        grid.columns,
        f"; fewer are made by {', or '.join(remedies)}" if remedies else "",
    )


def _list_later_taps(config: SparseCutConfig, grid: PatchGrid) -> list[str]:
    """From which taps on an encoder in stages has coarser grids, and how many tokens they make."""
    plan = config.get_plan()
    remedies = []
    cells = grid.num_patches
    for tap, shape in enumerate(grid.shapes):
        if shape.rows * shape.columns < cells:
            cells = shape.rows * shape.columns
            remedies.append(f"taps from {tap} on ({plan.image_tokens(cells):,})")
    return remedies


def _find_smaller_view(
    config: SparseCutConfig, grid: PatchGrid, taps: tuple[int, ...], *, is_loaded: bool
) -> int | None:
    """The largest square view that makes no more than `MANY_TOKENS`; None where none does."""
    plan = config.get_plan()
    step = max(grid.patch) * grid.merge
    for side in range(min(grid.view[-2:]) // step * step, 0, -step):
        vision = copy.deepcopy(config.vision_config)
        if not is_loaded:
            prepare_to_load(vision, side)
        try:
            num_patches = read_grid(vision, side, taps).num_patches
        except UserError:
            continue
        if plan.image_tokens(num_patches) <= MANY_TOKENS:
            return side
    return None
