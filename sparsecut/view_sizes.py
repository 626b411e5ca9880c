"""How large a view is: what an encoder's configuration fixes, and what a user may choose."""

from __future__ import annotations

from typing import Any

from .schema import UserError, nearest

# Their own code lays positions out as a square, whatever their configuration says.
SQUARE_ENCODERS = (
    "dinov2",
    "dinov2_with_registers",
    "dpt",
    "internvl_vision",
    "pixio",
    "tipsv2_vision_model",
)
# They fit learned positions to any view, without being asked.
INTERPOLATING_ENCODERS = (
    *SQUARE_ENCODERS,
    "beit",
    "data2vec-vision",
    "radio",
    "vitdet",
    "yolos",
)
# They compute positions from rows and columns.
ROTARY_ENCODERS = ("dinov3_vit", "mlcd_vision_model", "sapiens2")


NATIVE = "native"
COARSE_VIEWS = ("squash", "crop", NATIVE)  # how an image is fitted to an encoder


def check_fitting(coarse: str, min_pixels: int | None, max_pixels: int | None) -> None:
    """Check what is said of how images are fitted to an encoder.

    Args:
        coarse: One of `COARSE_VIEWS`.
        min_pixels: With "native", the fewest pixels of an image after it was resized.
        max_pixels: With "native", the most.

    Raises:
        UserError: `coarse` is none of these, or limits are given that have no effect.
    """
    if coarse not in COARSE_VIEWS:
        raise UserError(
            f"coarse is {coarse!r}, but must be one of {', '.join(COARSE_VIEWS)}"
            f"{nearest(coarse, COARSE_VIEWS)}"
        )
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if coarse != NATIVE and value is not None:
            raise UserError(
                f"{name} is {value}, but with coarse={coarse!r} every image has the size"
                " of a view; remove it, or use coarse='native'"
            )


def as_pair(value: Any) -> tuple:
    """One number, or two, as (height, width)."""
    return tuple(value) if isinstance(value, list | tuple) else (value, value)


def read_view(
    config: Any, view_size: Any, fixed: tuple, unit: tuple[int, int], *, is_free: bool, asks: bool
) -> tuple[int, int]:
    """Height and width of a view, checked against the encoder.

    Args:
        config: The encoder's configuration.
        view_size: What the user gave, or None.
        fixed: Height and width that the configuration fixes; (None, None) where it does not.
        unit: Height and width that a view must be a multiple of.
        is_free: The encoder takes views of any size.
        asks: The encoder's forward takes `interpolate_pos_encoding`.

    Raises:
        UserError: The encoder cannot take views of this size.
    """
    name = getattr(config, "architecture", config.model_type)  # that of timm
    _check_view_size(name, view_size, fixed, unit)
    view = fixed if view_size is None else as_pair(view_size)
    if not is_free:
        _check_positions(config, view_size, fixed, unit, asks=asks)
    key = "image_size" if view_size is None else "view_size"
    for side, step in zip(view, unit, strict=True):
        if side % step:
            nearest = max(1, side // step) * step
            raise UserError(
                f"{name} has {key} {side}, which is not a multiple of its patch_size {step};"
                f" give view_size={nearest}, or use another encoder"
            )
    if name == "pixtral" and (view[0] > fixed[0] or view[1] > fixed[1]):
        raise UserError(
            f"view_size is {view_size!r}, but the positions of {name} end at {fixed[0]} pixels;"
            f" give at most {fixed[0]}"
        )
    return view


def _check_positions(config: Any, view_size: Any, fixed: tuple, unit: tuple, *, asks: bool) -> None:
    """Refuse a view that an encoder with a fixed size has no positions for."""
    name = getattr(config, "architecture", config.model_type)  # that of timm
    is_other = view_size is not None and as_pair(view_size) != fixed
    if name in ROTARY_ENCODERS or getattr(config, "is_native", False):  # AIMv2's native ones
        return
    if is_other and not asks and name not in INTERPOLATING_ENCODERS:
        raise UserError(
            f"view_size is {view_size!r}, but {name} has learned positions for views of {fixed[0]}"
            f" x {fixed[1]} pixels and does not interpolate them; leave view_size out, or use an"
            " encoder that does, such as DINOv2, DINOv3, SigLIP, CLIP or ViT"
        )
    rows, columns = fixed[0] // unit[0], fixed[1] // unit[1]
    if rows != columns and (is_other or name in SQUARE_ENCODERS):
        raise UserError(
            f"{name} has views of {fixed[0]} x {fixed[1]} pixels and patches of {unit[0]} x"
            f" {unit[1]}, but it takes its positions for a square"
            f"{' where it interpolates them' if is_other else ''}; use as many rows of patches as"
            " columns, or an encoder like DINOv3"
        )


def _check_view_size(name: str, view_size: Any, fixed: tuple, unit: tuple[int, int]) -> None:
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
