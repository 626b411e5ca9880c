"""The figure of quality against cost, one mark for each variant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from .figures import (
    CHARACTER,
    COLOURS,
    FONT_SIZE,
    INK,
    MARKERS,
    NARROW,
    Interval,
    begin_figure,
    set_margins,
    to_svg,
    write_empty,
)
from .label_placement import Box, Place, find_leader_end, place_labels

LEADER_FROM = 14  # pixels between a mark and its name from which a line joins them
STRETCHED_WITHIN = 0.03  # costs so near to 1 are even on the axis, others logarithmic
TICK_DISTANCE = 34  # pixels between two ticks of the cost axis, at least
COST_TICKS = (1, 2, 5, 10, 1.1, 0.5, 1.2, 1.5, 3, 4, 1.05, 0.9, 1.3, 0.8, 1.02, 7, 1.01, 0.7)
FEW = 5  # points that a narrow figure has room for
WIDE = 680


@dataclass(frozen=True)
class Point:
    """One variant in `draw_scatter`.

    Attributes:
        name: The text beside the mark.
        cost: Cost divided by the baseline's cost.
        interval: (value, low, high), 0 to 1.
        family: The group it belongs to; it decides on the mark.
        on_frontier: Whether no other variant is both better and cheaper.
    """

    name: str
    cost: float
    interval: Interval
    family: str
    on_frontier: bool = False


def draw_scatter(points: Sequence[Point], *, title: str, x_label: str) -> Markup:
    """Draw quality against relative cost, one mark for each variant, with its name.

    The x axis is stretched near 1: it is even in asinh((cost - 1) / 0.03). A broken line joins the
    variants on the frontier.

    Returns:
        An SVG, or a sentence where there are no points.
    """
    if not points:
        return write_empty("no finished variant has a counted cost", title)
    families = list(dict.fromkeys(point.family for point in points))
    width = NARROW if len(points) <= FEW else WIDE
    legend_height = 20 * (len(families) + 1)

    with begin_figure(width, 360 + legend_height) as (figure, axes):
        set_margins(axes, left=56, right=12, top=26, bottom=50 + legend_height)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        _set_cost_axis(axes, [point.cost for point in points])
        _set_percent_axis(axes, [point.interval for point in points])
        _draw_frontier(axes, [point for point in points if point.on_frontier])
        for point in points:
            _draw_point(axes, point, families.index(point.family))
        _draw_names(axes, points)
        _draw_family_legend(axes, families)
        return to_svg(figure, title)


def _set_cost_axis(axes, costs: list[float]) -> None:
    def stretch(costs):
        return np.arcsinh((np.asarray(costs) - 1) / STRETCHED_WITHIN)

    def unstretch(places):
        return 1 + STRETCHED_WITHIN * np.sinh(np.asarray(places))

    axes.set_xscale("function", functions=(stretch, unstretch))
    first, last = stretch([min(costs), max(costs)])
    margin = 0.09 * (last - first) or 1
    axes.set_xlim(*unstretch([first - margin, last + 2 * margin]))
    axes.minorticks_off()
    ticks = _choose_cost_ticks(axes)
    labels = [f"{tick:g}" for tick in ticks]
    axes.set_xticks(ticks, labels)


def _choose_cost_ticks(axes) -> list[float]:
    """Round costs within the axis, not too close together."""
    low, high = axes.get_xlim()

    chosen: list[float] = []
    places: list[float] = []
    for tick in COST_TICKS:
        if not low <= tick <= high:
            continue
        place, _ = _to_pixels(axes, tick, 0)
        nearest = min((abs(place - other) for other in places), default=math.inf)
        if nearest >= TICK_DISTANCE:
            chosen.append(tick)
            places.append(place)

    return sorted(chosen)


def _set_percent_axis(axes, intervals: list[Interval]) -> None:
    low = min(interval[1] for interval in intervals)
    high = max(interval[2] for interval in intervals)
    margin = 0.05 * (high - low) or 0.02
    axes.set_ylim(low - margin, high + margin)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.grid(axis="y", color=INK, alpha=0.15)


def _draw_frontier(axes, points: list[Point]) -> None:
    points = sorted(points, key=lambda point: (point.cost, point.interval[0]))
    costs = [point.cost for point in points]
    values = [point.interval[0] for point in points]
    axes.plot(
        costs, values, drawstyle="steps-post", color=INK, alpha=0.6, linewidth=1, linestyle="--"
    )


def _find_frontier_boxes(axes, points: list[Point]) -> list[Box]:
    """The broken line's horizontal and vertical pieces as thin boxes, in pixels."""
    places = [_to_pixels(axes, point.cost, point.interval[0]) for point in points]
    places.sort(key=lambda place: place[0])

    boxes = []
    for (x1, y1), (x2, y2) in pairwise(places):
        lower = min(y1, y2)
        upper = max(y1, y2)
        boxes.append((x1, y1 - 1, x2, y1 + 1))
        boxes.append((x2 - 1, lower, x2 + 1, upper))

    return boxes


def _draw_point(axes, point: Point, family: int) -> None:
    value, low, high = point.interval
    axes.vlines(point.cost, low, high, color=INK, alpha=0.6, linewidth=1)
    _draw_mark(axes, [point.cost], [value], family, is_filled=point.on_frontier)


def _draw_mark(axes, x: list, y: list, family: int, *, is_filled: bool):
    colour = COLOURS[family % len(COLOURS)]
    [line] = axes.plot(
        x,
        y,
        linestyle="none",
        marker=MARKERS[family % len(MARKERS)],
        markersize=8,
        markeredgecolor=colour,
        markeredgewidth=1.8,
        markerfacecolor=colour if is_filled else "none",
    )
    return line


def _draw_names(axes, points: Sequence[Point]) -> None:
    """Write the names where they cover nothing, far ones with a line to their mark."""
    anchors = []
    sizes = []
    lines = _find_frontier_boxes(axes, [point for point in points if point.on_frontier])

    for point in points:
        value, low, high = point.interval
        x, y = _to_pixels(axes, point.cost, value)
        _, bottom = _to_pixels(axes, point.cost, low)
        _, top = _to_pixels(axes, point.cost, high)
        anchors.append((x, y))
        lines.append((x - 1, bottom, x + 1, top))
        width = CHARACTER * len(point.name)
        sizes.append((width, FONT_SIZE + 2))

    frame = axes.get_window_extent()
    room = (frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1)
    boxes = place_labels(anchors, sizes, lines, room)

    for point, anchor, box in zip(points, anchors, boxes, strict=True):
        _draw_name(axes, point.name, anchor, box)


def _to_pixels(axes, cost: float, value: float) -> Place:
    x, y = axes.transData.transform((cost, value))
    return x, y


def _draw_name(axes, name: str, anchor: Place, box: Box) -> None:
    left, bottom, _, _ = box
    end = find_leader_end(box, anchor)
    if math.dist(anchor, end) > LEADER_FROM:
        axes.annotate(
            "",
            xy=anchor,
            xytext=end,
            xycoords="figure pixels",
            textcoords="figure pixels",
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.8},
        )

    axes.annotate(name, (left, bottom + 2), xycoords="figure pixels", va="bottom")


def _draw_family_legend(axes, families: list[str]) -> None:
    marks = [_draw_mark(axes, [], [], i, is_filled=False) for i in range(len(families))]
    frontier = axes.plot([], [], color=INK, alpha=0.6, linewidth=1, linestyle="--")
    names = [*families, "frontier (filled marks)"]
    axes.legend(
        [*marks, *frontier],
        names,
        loc="upper left",
        bbox_to_anchor=(0, -48 / 284),  # 48 of the 284 pixels that the axes are high
        borderaxespad=0,
        borderpad=0,
        labelspacing=0.4,
    )
