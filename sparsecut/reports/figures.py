"""Figures of reports as SVG text, drawn by matplotlib and embedded in a page.

A figure is as many CSS pixels wide as its SVG says, and its text is at least `FONT_SIZE` pixels
high. Text and axes take the colour of the page's text, so that a figure is legible on a light and on
a dark page. Markers, dashes and hatches tell apart what colours tell apart, for prints in grey.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape

from ..schema import UserError
from .labels import Box, find_leader_end, place_labels

FONT_SIZE = 12  # CSS pixels
INK = "#010203"  # stands for the colour of the page's text
COLOURS = ("#2f7fc1", "#c8702a", "#3f9156", "#9b66c4", "#7b848e", "#b5548a")  # on white and black
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
NARROW = 340  # pixels: a figure that a phone shows without scrolling
WIDE = 680
FEW = 5  # points that a narrow figure has room for
CHARACTER = 6.8  # pixels of a character, rather too many
STYLE = {
    "svg.fonttype": "none",
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "hatch.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

Interval = tuple[float, float, float]


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


def check_matplotlib() -> None:
    """Refuse to begin work whose report could not be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError(
            "the report needs matplotlib, which is not installed; run `pip install matplotlib`"
            " (the extra `reports` brings it) and try again"
        )


def draw_bars(
    rows: dict[str, Interval | None], *, title: str, reference: str | None = None
) -> Markup:
    """Draw a bar with its interval for each row.

    Args:
        rows: Name of a row to (value, low, high), 0 to 1, or None where nothing was measured.
        title: The text above the bars.
        reference: The row whose value is drawn through all rows as a broken line.

    Returns:
        An SVG, or a sentence where no row has a value.
    """
    if not any(rows.values()):
        return write_empty("nothing was measured for it", title)
    label_width = 10 + CHARACTER * max(len(name) for name in rows)
    width = max(NARROW, label_width + 200)
    height = 58 + 22 * len(rows)
    with _begin_figure(width, height) as (figure, axes):
        _set_margins(axes, left=label_width, right=46, top=24, bottom=26)
        for place, (name, interval) in enumerate(rows.items()):
            if interval is None:
                axes.text(0.01, place, "not measured", va="center")
            else:
                _draw_bar(axes, place, interval, is_reference=name == reference)
        if rows.get(reference):
            axes.axvline(rows[reference][0], color=INK, linestyle=(0, (2, 3)), linewidth=1)
        axes.set_title(title)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0)
        return _to_svg(figure, title)


def _draw_bar(axes, place: int, interval: Interval, *, is_reference: bool) -> None:
    value, low, high = interval
    colour = COLOURS[4] if is_reference else COLOURS[0]
    axes.barh(place, value, height=0.62, color=colour, alpha=0.55, edgecolor="none")
    if is_reference:
        axes.barh(place, value, height=0.62, color="none", edgecolor=INK, hatch="////", alpha=0.6)
    distances = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar(value, place, xerr=distances, color=INK, linewidth=1.2, capsize=3)
    label = f"{100 * value:.1f}"
    right_edge = axes.get_yaxis_transform()  # x in fractions of the axes, y in rows
    axes.text(1.17, place, label, ha="right", va="center", transform=right_edge)


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
    with _begin_figure(width, 360 + legend_height) as (figure, axes):
        _set_margins(axes, left=48, right=12, top=26, bottom=50 + legend_height)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        _set_cost_axis(axes, [point.cost for point in points])
        _set_percent_axis(axes, [point.interval for point in points])
        _draw_frontier(axes, [point for point in points if point.on_frontier])
        for point in points:
            _draw_point(axes, point, families.index(point.family))
        _draw_names(axes, points)
        _draw_family_legend(axes, families)
        return _to_svg(figure, title)


def _set_cost_axis(axes, costs: list[float]) -> None:
    def stretch(costs):
        return np.arcsinh((np.asarray(costs) - 1) / 0.03)

    def unstretch(places):
        return 1 + 0.03 * np.sinh(places)

    axes.set_xscale("function", functions=(stretch, unstretch))
    first, last = stretch([min(costs), max(costs)])
    margin = 0.09 * (last - first) or 1
    axes.set_xlim(*unstretch(np.array([first - margin, last + 2 * margin])))
    axes.minorticks_off()
    ticks = _choose_cost_ticks(axes)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def _choose_cost_ticks(axes) -> list[float]:
    """Round costs within the axis, at least 34 pixels apart; the first of the list come first."""
    wanted = (1, 2, 5, 10, 1.1, 0.5, 1.2, 1.5, 3, 4, 1.05, 0.9, 1.3, 0.8, 1.02, 7, 1.01, 0.7)
    low, high = axes.get_xlim()
    chosen: dict[float, float] = {}
    for tick in wanted:
        place = axes.transData.transform((tick, 0))[0]
        is_free = all(abs(place - other) >= 34 for other in chosen.values())
        if low <= tick <= high and is_free:
            chosen[tick] = place
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
    places = [axes.transData.transform((point.cost, point.interval[0])) for point in points]
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(sorted(places, key=lambda place: place[0])):
        boxes.append((x1, y1 - 1, x2, y1 + 1))
        boxes.append((x2 - 1, min(y1, y2), x2 + 1, max(y1, y2)))
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
    lines: list[Box] = []
    for point in points:
        value, low, high = point.interval
        x, y = axes.transData.transform((point.cost, value))
        _, bottom = axes.transData.transform((point.cost, low))
        _, top = axes.transData.transform((point.cost, high))
        anchors.append((x, y))
        lines.append((x - 1, bottom, x + 1, top))
    lines += _find_frontier_boxes(axes, [point for point in points if point.on_frontier])
    sizes = [(CHARACTER * len(point.name), FONT_SIZE + 2) for point in points]
    frame = axes.get_window_extent()
    room = (frame.x0 + 2, frame.y0 + 2, frame.x1 - 2, frame.y1)
    boxes = place_labels(anchors, sizes, lines, room)
    for point, (x, y), box in zip(points, anchors, boxes, strict=True):
        left, bottom, _, _ = box
        end = find_leader_end(box, (x, y))
        if math.dist((x, y), end) > 14:
            axes.annotate(
                "",
                xy=(x, y),
                xytext=end,
                xycoords="figure pixels",
                textcoords="figure pixels",
                arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.8},
            )
        axes.annotate(point.name, (left, bottom + 2), xycoords="figure pixels", va="bottom")


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


def draw_curves(
    lines: dict[str, list[tuple[float, float]]],
    *,
    title: str,
    x_label: str,
    y_limit: float | None = None,
) -> Markup:
    """Draw a line for each name.

    Args:
        lines: Name to its points (x, y), y not below 0.
        title: The text above the lines.
        x_label: What x is.
        y_limit: The top of the y axis. By default the largest y after the first tenth of a line.

    Returns:
        An SVG, or a sentence where no line has two points.
    """
    lines = {name: points for name, points in lines.items() if len(points) > 1}
    if not lines:
        return write_empty(
            "no run logged two values; more steps, or smaller logging_steps, give a curve", title
        )
    y_limit = y_limit or get_curve_limit(lines.values())
    height = 220 + 18 * len(lines)
    with _begin_figure(NARROW, height) as (figure, axes):
        _set_margins(axes, left=40, right=14, top=26, bottom=48 + 18 * len(lines))
        for i, (name, points) in enumerate(lines.items()):
            _draw_curve(axes, i, name, points)
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_xlim(0, None)
        axes.set_ylim(0, y_limit)
        axes.grid(axis="y", color=INK, alpha=0.15)
        axes.locator_params(nbins=5)
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, -46 / 146),
            borderaxespad=0,
            borderpad=0,
            labelspacing=0.35,
            handlelength=3,
        )
        return _to_svg(figure, title)


def get_curve_limit(lines) -> float:
    """Return a top of the y axis that leaves out the first, steep tenth of each line."""
    limit = 0.0
    for points in lines:
        rest = points[len(points) // 10 :]
        limit = max([limit, *(y for _, y in rest)])
    return 1.05 * limit or 1.0


def _draw_curve(axes, number: int, name: str, points: list[tuple[float, float]]) -> None:
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    interval = max(1, len(points) // 6)
    axes.plot(
        xs,
        ys,
        label=name,
        color=COLOURS[number % len(COLOURS)],
        linestyle=DASHES[number % len(DASHES)],
        linewidth=1.6,
        marker=MARKERS[number % len(MARKERS)],
        markersize=4.5,
        markevery=(number * interval // 6, interval),
    )


def write_empty(reason: str, title: str = "") -> Markup:
    """Return the sentence that stands where a chart has nothing to show."""
    name = f"“{title}”" if title else "This chart"
    return Markup('<p class="empty">{} is empty: {}.</p>').format(name, reason)


class _begin_figure:
    """A figure of so many CSS pixels with one axes, drawn in this module's style."""

    def __init__(self, width: float, height: float):
        from matplotlib import rc_context

        self.size = width / 72, height / 72  # inches; an SVG has 72 units an inch
        self.style = rc_context(STYLE)

    def __enter__(self):
        from matplotlib.figure import Figure

        self.style.__enter__()
        figure = Figure(figsize=self.size, dpi=72)
        return figure, figure.add_subplot()

    def __exit__(self, *error) -> None:
        self.style.__exit__(*error)


def _set_margins(axes, *, left: float, right: float, top: float, bottom: float) -> None:
    """Leave so many pixels around the axes."""
    width, height = 72 * axes.figure.get_size_inches()
    axes.set_position(
        [left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height]
    )


def _to_svg(figure, label: str) -> Markup:
    """Return the figure as an SVG element: no date, no random names, sizes in CSS pixels."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    with rc_context({"svg.hashsalt": label}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="\w+_\d+"', "", svg)
    svg = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', svg)
    svg = re.sub(r"(font: [\w. ]*px) [^;\"]*", r"\1 system-ui, sans-serif", svg)
    svg = svg.replace(INK, "currentColor")
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))
