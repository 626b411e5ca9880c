"""What an encoder in stages is, as plain data: its blocks, and what each returns for one view."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class TapShape:
    """What a block returns for one view.

    Attributes:
        rows: Rows of cells.
        columns: Columns of cells.
        width: Channels of a cell's state.
        unrolled: How often 2 x 2 squares of cells were taken apart, see `get_unrolled_order`.
    """

    rows: int
    columns: int
    width: int
    unrolled: int = 0


@dataclass(frozen=True)
class Stages:
    """The stages of an encoder.

    Attributes:
        blocks: Names of the lists of blocks, one for each stage, from any place inside.
        depths: Blocks of each stage.
        widths: Channels of each stage.
        strides: Pixels of a cell's side in each stage.
        layout: "tokens" for [views, cells, channels], which may begin with a class token; "map" for
            [views, rows, columns, channels]; "channels" for [views, channels, rows, columns].
        stem: Channels and stride of what enters the first block; None for those of its stage.
        is_unrolled: Cells are not row by row, see `get_unrolled_order`.
        is_any_size: The encoder needs no positions, so it takes views of any size.
        least_unit: Pixels that a view's sides must be a multiple of, besides the strides.
        own_view: Height and width of a view, where the configuration itself does not name them.
    """

    blocks: tuple[str, ...]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    layout: str
    stem: tuple[int, int] | None = None
    is_unrolled: bool = False
    is_any_size: bool = False
    least_unit: int = 1
    own_view: tuple[int, int] | None = None

    @property
    def unit(self) -> int:
        """Pixels that a view's sides must be a multiple of, so that every stage has whole cells."""
        return math.lcm(self.least_unit, *self.strides)


def list_shapes(stages: Stages, height: int, width: int) -> tuple[TapShape, ...]:
    """What every tap has for views of this size in pixels, from tap 0 on."""
    stem = stages.stem or (stages.widths[0], stages.strides[0])
    kinds = [stem]
    for kind, depth in zip(
        zip(stages.widths, stages.strides, strict=True), stages.depths, strict=True
    ):
        kinds += [kind] * depth
    shapes = []
    for channels, stride in kinds:
        unrolled = 0
        if stages.is_unrolled:  # each pooling uses up one of the times
            unrolled = len(stages.depths) - 1 - round(math.log2(stride // stem[1]))
        shapes.append(TapShape(height // stride, width // stride, channels, unrolled))
    return tuple(shapes)


def choose_common(shapes: tuple[TapShape, ...], taps: Iterable[int] | None) -> TapShape:
    """The finest grid and the largest width of some taps; None for all taps."""
    chosen = shapes if taps is None else [shapes[tap] for tap in taps]
    finest = max(chosen, key=lambda shape: shape.rows * shape.columns)
    return TapShape(finest.rows, finest.columns, max(shape.width for shape in chosen))
