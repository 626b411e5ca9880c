"""Figures of reports as SVG text, drawn by matplotlib and embedded in a page.

A figure is as many CSS pixels wide as its SVG says, and its text is at least `FONT_SIZE` pixels
high. Text and axes take the colour of the page's text, so that a figure is legible on a light and
on a dark page. Markers, dashes and hatches show the same as colours, for prints in grey.
"""

from __future__ import annotations

import io
import re
from importlib.util import find_spec
from pathlib import Path

from markupsafe import Markup, escape

from ..schema import UserError, write_text_file

FONT_SIZE = 12  # CSS pixels
INK = "#010203"  # stands for the colour of the page's text
COLOURS = ("#2f7fc1", "#c8702a", "#3f9156", "#9b66c4", "#7b848e", "#b5548a")  # on white and black
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
NARROW = 340  # pixels: a figure that a phone shows without scrolling
CHARACTER = 6.8  # pixels of a character, rather too many
BAR_HEIGHT = 0.62  # of a row
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
    width = max(NARROW, label_width + 170)
    height = 58 + 22 * len(rows)

    with begin_figure(width, height) as (figure, axes):
        set_margins(axes, left=label_width, right=46, top=24, bottom=26)
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
        return to_svg(figure, title)


def _draw_bar(axes, place: int, interval: Interval, *, is_reference: bool) -> None:
    value, low, high = interval
    colour = COLOURS[4] if is_reference else COLOURS[0]
    axes.barh(place, value, height=BAR_HEIGHT, color=colour, alpha=0.55, edgecolor="none")
    if is_reference:
        axes.barh(
            place,
            value,
            height=BAR_HEIGHT,
            color="none",
            edgecolor=INK,
            hatch="////",
            alpha=0.6,
        )

    below = max(0.0, value - low)
    above = max(0.0, high - value)
    axes.errorbar(value, place, xerr=[[below], [above]], color=INK, linewidth=1.2, capsize=3)
    axes.text(
        1.17,
        place,
        f"{100 * value:.1f}",
        ha="right",
        va="center",
        transform=axes.get_yaxis_transform(),  # x in fractions of the axes, y in rows
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

    with begin_figure(NARROW, height) as (figure, axes):
        set_margins(axes, left=40, right=14, top=26, bottom=48 + 18 * len(lines))
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
        return to_svg(figure, title)


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
    first_marked = number * interval // 6
    style = number % len(COLOURS)
    axes.plot(
        xs,
        ys,
        label=name,
        color=COLOURS[style],
        linestyle=DASHES[style],
        linewidth=1.6,
        marker=MARKERS[style],
        markersize=4.5,
        markevery=(first_marked, interval),
    )


def write_empty(reason: str, title: str = "") -> Markup:
    """Return the sentence that stands where a chart has nothing to show."""
    name = f"“{title}”" if title else "This chart"
    return Markup('<p class="empty">{} is empty: {}.</p>').format(name, reason)


def is_drawn(chart: Markup) -> bool:
    """Whether a chart is a drawing, and not the sentence of `write_empty`."""
    return chart.startswith("<svg")


class begin_figure:
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


def set_margins(axes, *, left: float, right: float, top: float, bottom: float) -> None:
    """Leave so many pixels around the axes."""
    width, height = 72 * axes.figure.get_size_inches()
    axes.set_position(
        [left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height]
    )


def write_svg(path: Path, svg: Markup) -> None:
    """Write a drawing of `to_svg` into a file of its own, dark on white."""
    text = str(svg).replace("currentColor", INK)  # Markup would escape what is put in
    text = text.replace("<svg ", '<svg style="background: white" ', 1)
    write_text_file(path, f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n')


def to_svg(figure, label: str) -> Markup:
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
