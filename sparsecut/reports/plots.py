"""Pictures of a study as SVG text: quality against cost, rows of bars, a matrix of differences,
small drawings of plans.

As in `charts`, shape, shade and place say everything that colour says, so that a print in grey stays readable.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from ..plan import Plan
from .charts import COLOURS, frame, svg, text

INK, SOFT = COLOURS[0], "#9fb8ca"
HALO = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One arm in `scatter`: x a cost relative to the baseline's, y with its interval in 0..1, mark
    a number for its shape.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    mark: int = 0
    on_frontier: bool = False


def scatter(
    points: list[Point], marks: list[str], *, x_label: str, width: int = 1040, height: int = 560
) -> str:
    """Shares over relative cost, the arms that no other beats in both joined by a line; marks: what
    the shapes mean.

    Near 1 the x axis is stretched: it is even in the logarithm of the distance from 1. Points that
    would cover one another are moved sideways by some pixels, and labels stand where nothing else
    is.
    """
    if not points:
        return "<p>There is nothing to draw yet.</p>"
    left, top, right, bottom = 52, 12, width - 14, height - 46
    x_of = _axis([_stretched(p.x) for p in points], left + 30, right - 60)
    y_of = _axis([y for p in points for y in (p.low, p.high)], bottom - 14, top + 14)
    parts = [frame(left, top, right - left, bottom - top)]
    for tick in _ticks(min(p.low for p in points), max(p.high for p in points)):
        y = y_of(tick)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(text(left - 6, y + 4, f"{100 * tick:.0f} %", "end", 11))
    for place, tick in _cost_ticks(points, x_of):
        parts.append(f'<path d="M{place:.1f} {bottom}v5" stroke="#666"/>')
        parts.append(text(place, bottom + 18, f"{tick:g}", "middle", 11))
    parts.append(text((left + right) / 2, height - 8, x_label, "middle"))
    places = _apart(
        [(x_of(_stretched(p.x)), y_of(p.y), y_of(p.high), y_of(p.low)) for p in points], right - 8
    )
    joined = sorted(
        (place for place, p in zip(places, points, strict=True) if p.on_frontier),
        key=lambda xy: xy[0],
    )
    steps = "".join(
        f"{'H' if i else 'M'}{x:.1f}{'V' if i else ' '}{y:.1f}" for i, (x, y) in enumerate(joined)
    )
    if joined:
        parts.append(
            f'<path d="{steps}" fill="none" stroke="#777" stroke-width="1.3" stroke-dasharray="6'
            ' 4"/>'
        )
    bars = [(x, y_of(p.high), y_of(p.low)) for (x, _), p in zip(places, points, strict=True)]
    parts += [
        f'<path d="M{x:.1f} {a:.1f}V{b:.1f}" stroke="#555" stroke-width="1"/>' for x, a, b in bars
    ]
    for (x, y), p in zip(places, points, strict=True):
        words = f"{p.name}: {p.y:.1%} ({p.low:.1%} to {p.high:.1%}), {p.x:.3f} times the cost"
        parts.append(f"<g>{_mark(x, y, p.mark, p.on_frontier)}<title>{escape(words)}</title></g>")
    stairs = [(a, b - 1, c, b + 1) for (a, b), (c, _) in pairwise(joined)]
    stairs += [(c - 1, min(b, d), c + 1, max(b, d)) for (_, b), (c, d) in pairwise(joined)]
    bars = [(x - 1, a, x + 1, b) for x, a, b in bars] + stairs
    parts += _labels(points, places, bars, (left + 2, top + 2, right - 2, bottom - 2))
    keys = "".join(
        '<span class="key"><svg width="16"'
        f' height="14">{_mark(8, 7, i, False)}</svg>{escape(words)}</span>'
        for i, words in enumerate(marks)
    )
    return svg(width, height, parts) + f'<p class="legend">{keys}filled: on the frontier</p>'


def bar_rows(
    columns: list[str],
    rows: dict[str, list[tuple[float, float, float] | None]],
    *,
    reference: str | None = None,
) -> str:
    """One row per arm and one panel per column, each bar with its interval and figure; rows:
    (value, low, high) in 0..1.

    The reference arm's value goes through its panel as a broken line.
    """
    step, top, name_width, gap = 19, 26, 8 + _text_width(max(rows, key=len, default=""), 12), 52
    panel = max(120, (1040 - name_width) / max(len(columns), 1) - gap)
    height = top + step * len(rows) + 8
    parts, figures = [], []
    for c, column in enumerate(columns):
        x0 = name_width + c * (panel + gap)
        parts.append(text(x0, 14, column, "start", 12, 'font-weight="bold"'))
        parts.append(f'<path d="M{x0:.1f} {top - 4}V{height - 6}" stroke="#888"/>')
        for r, (name, values) in enumerate(rows.items()):
            y = top + r * step
            if values[c] is None:
                parts.append(text(x0 + 4, y + 11, "\N{EN DASH}", "start", 11))
                continue
            value, low, high = values[c]
            fill = "#777" if name == reference else SOFT
            a, b = x0 + panel * low, x0 + panel * high
            parts.append(
                f'<rect x="{x0:.1f}" y="{y}" width="{panel * value:.1f}" height="{step - 6}"'
                f' fill="{fill}" stroke="#555" stroke-width=".5"/><path d="M{a:.1f}'
                f' {y + 6.5}H{b:.1f}M{a:.1f} {y + 3}v7M{b:.1f} {y + 3}v7" stroke="#111"/>'
            )
            figures.append(
                text(
                    max(b, x0 + panel * value) + 4, y + 11, f"{100 * value:.1f}", "start", 11, HALO
                )
            )
        if reference in rows and rows[reference][c] is not None:
            x = x0 + panel * rows[reference][c][0]
            parts.append(
                f'<path d="M{x:.1f} {top - 4}V{height - 6}" stroke="#111" stroke-dasharray="2 3"/>'
            )
    parts += figures  # on top of the broken lines
    for r, name in enumerate(rows):
        weight = 'font-weight="bold"' if name == reference else ""
        parts.append(text(0, top + r * step + 11, name, "start", 12, weight))
    return svg(name_width + len(columns) * (panel + gap), height, parts)


def matrix(names: list[str], cells: dict[tuple[str, str], tuple[float, bool, bool]]) -> str:
    """Row minus column for every pair; cells: (difference in 0..1, its interval clear of zero,
    clear after correction).

    The darker a cell, the further the row is ahead. Bold: clear after correction. Plain: clear on
    its own. Pale: not clear.
    """
    size, left = 37, 30 + _text_width(max(names, key=len, default=""), 12)
    most = max((abs(value) for value, _, _ in cells.values()), default=0) or 1
    parts = [text(left + size * (c + 0.5), 14, str(c + 1), "middle", 11) for c in range(len(names))]
    for r, row in enumerate(names):
        y = 20 + 22 * r
        parts.append(text(left - 8, y + 15, f"{row}  {r + 1}", "end", 12))
        for c, column in enumerate(names):
            x = left + size * c
            fill, words = "#eee", ""
            style = ""
            if (row, column) in cells:
                value, clear, sure = cells[row, column]
                shade = 0.5 * max(0.0, value) / most
                fill = (
                    f"rgb({255 - shade * 226:.0f},{255 - shade * 175:.0f},{255 - shade * 138:.0f})"
                )
                colour = "#111" if clear else "#555"
                words = f"{100 * value:+.1f}" if abs(value) < 0.0995 else f"{100 * value:+.0f}"
                style = f'style="fill:{colour};font-weight:{700 if sure else 400};font-style:{"normal" if clear else "italic"}"'
            parts.append(
                f'<rect x="{x}" y="{y}" width="{size}" height="22" fill="{fill}" stroke="#ccc"/>'
            )
            parts.append(text(x + size / 2, y + 15, words, "middle", 11, style))
    return svg(left + size * len(names) + 4, 26 + 22 * len(names), parts)


def plan_sketch(plan: Plan, vision_depth: int, language_depth: int, *, height: int = 120) -> str:
    """A plan as a thumbnail: encoder left, decoder right, from the bottom up; read and written
    layers dark.

    The strip beside the encoder is as high as fine views run. Lines of shortcuts that read fine
    grains are thick, others thin.
    """
    left, right, box, base = 16, 104, 18, height - 4
    step_v, step_l = (height - 8) / (vision_depth + 1), (height - 8) / language_depth
    taps, fine = set(plan.resolved_taps(vision_depth)), plan.fine_taps(vision_depth)
    parts = []
    for x, step, number, used in (
        (left, step_v, vision_depth + 1, taps),
        (right, step_l, language_depth, None),
    ):
        for i in range(number):
            dark = i in used if used is not None else any(s.layer == i for s in plan.shortcuts)
            top, tall = base - step * (i + 1), max(step - 1, 0.8)
            fill = INK if dark else "#e2e2e2"
            parts.append(
                f'<rect x="{x}" y="{top:.1f}" width="{box}" height="{tall:.1f}" fill="{fill}"/>'
            )
    if fine:
        tall = step_v * (max(fine) + 1)
        parts.append(
            f'<rect x="6" y="{base - tall:.1f}" width="6" height="{tall:.1f}" fill="{SOFT}"'
            ' stroke="#555"/>'
        )
    for s in plan.shortcuts:
        thick = plan.tiles and not s.is_coarse
        for tap in s.flat_taps:
            y1, y2 = (
                base - step_v * (tap % (vision_depth + 1) + 0.5),
                base - step_l * (s.layer + 0.5),
            )
            x1, x2 = left + box, right
            parts.append(
                f'<path d="M{x1} {y1:.1f}C{x1 + 26} {y1:.1f} {x2 - 26} {y2:.1f} {x2} {y2:.1f}"'
                f' fill="none" stroke="#222" stroke-width="{1.8 if thick else 0.8}"/>'
            )
    return svg(right + box + 6, height, parts)


def _stretched(cost: float) -> float:
    return math.asinh((cost - 1) / 0.03)


def _axis(values: list[float], start: float, end: float):
    """A function from values to pixels, the least at `start` and the largest at `end`."""
    least, most = min(values), max(values)
    span = (most - least) or 1
    return lambda value: start + (end - start) * (value - least) / span


def _ticks(least: float, most: float) -> list[float]:
    step = next((s for s in (0.01, 0.02, 0.05, 0.1, 0.2) if (most - least) / s <= 9), 0.25)
    first = math.ceil(least / step - 1e-9)
    return [step * k for k in range(first, math.floor(most / step + 1e-9) + 1)]


def _cost_ticks(points: list[Point], x_of) -> list[tuple[float, float]]:
    """(pixel, cost) of round costs within the range, at least 26 pixels apart, 1 first of all."""
    least, most = min(p.x for p in points), max(p.x for p in points)
    wanted = (
        1,
        2,
        5,
        10,
        1.1,
        0.5,
        1.2,
        1.5,
        3,
        4,
        1.05,
        0.9,
        1.3,
        0.8,
        1.02,
        7,
        1.01,
        0.95,
        0.7,
        0.6,
        6,
        8,
    )
    kept: list[tuple[float, float]] = []
    for tick in wanted:
        place = x_of(_stretched(tick))
        if least * 0.999 <= tick <= most * 1.001 and all(
            abs(place - other) >= 26 for other, _ in kept
        ):
            kept.append((place, tick))
    return sorted(kept)


def _apart(
    wanted: list[tuple[float, float, float, float]], right: float
) -> list[tuple[float, float]]:
    """Places of marks (x, y, top and bottom of the interval), moved sideways where marks or
    intervals would cover one another.
    """
    kept: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        x, y, top, bottom = wanted[i]

        def free(here: float, y=y, top=top, bottom=bottom) -> bool:
            for j, (a, b) in kept.items():
                along = abs(here - a) < 5 and top < wanted[j][3] and wanted[j][2] < bottom
                if along or math.hypot(here - a, y - b) < 11:
                    return False
            return True

        shifts = (0, *(sign * k for k in range(6, 43, 6) for sign in (1, -1)))
        shift = next((s for s in shifts if x + s < right and free(x + s)), 0)
        kept[i] = (x + shift, y)
    return [kept[i] for i in range(len(wanted))]


def _mark(x: float, y: float, number: int, filled: bool) -> str:
    """A circle, square, triangle, diamond, triangle downwards or cross-like star, by number."""
    fill = f'fill="{INK if filled else "#fff"}" stroke="{INK}" stroke-width="1.6"'
    if number % 6 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.6" {fill}/>'
    shapes = (
        ((-4.2, -4.2), (4.2, -4.2), (4.2, 4.2), (-4.2, 4.2)),
        ((0, -5.6), (5.4, 4.2), (-5.4, 4.2)),
        ((0, -6), (6, 0), (0, 6), (-6, 0)),
        ((0, 5.6), (5.4, -4.2), (-5.4, -4.2)),
        ((-5, -5), (0, -2), (5, -5), (2, 0), (5, 5), (0, 2), (-5, 5), (-2, 0)),
    )
    corners = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in shapes[number % 6 - 1])
    return f'<polygon points="{corners}" {fill}/>'


def _labels(
    points: list[Point], places: list[tuple[float, float]], thin: list[Box], room: Box
) -> list[str]:
    """Every point's name where it covers no mark, no other name and as few lines as can be; far
    ones with a line to their point.
    """
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in places]
    leaders: list[tuple[tuple[float, float], tuple[float, float]]] = []
    parts = []
    crowd = [sum(math.hypot(x - a, y - b) < 60 for a, b in places) for x, y in places]
    for i in sorted(range(len(points)), key=lambda i: -crowd[i]):
        (x, y), wide = places[i], _text_width(points[i].name, 11)
        best = None
        for away in (9, 14, 22, 34, 48, 64, 84, 108, 136, 168, 204, 244, 288):
            for turn in range(20):
                angle = 2 * math.pi * turn / 20
                cx, cy = x + away * math.cos(angle), y + away * math.sin(angle)
                x0 = (
                    cx
                    if math.cos(angle) > 0.2
                    else cx - wide
                    if math.cos(angle) < -0.2
                    else cx - wide / 2
                )
                box = (x0, cy - 7, x0 + wide, cy + 6)
                if box[0] < room[0] or box[1] < room[1] or box[2] > room[2] or box[3] > room[3]:
                    continue
                end = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
                cost = (
                    away
                    + 60 * sum(_meet(box, other) for other in thin)
                    + 1000 * sum(_meet(box, t) for t in taken)
                )
                cost += 300 * sum(_cut(a, b, box) for a, b in leaders)
                if away > 14:
                    cost += 12 + 80 * sum(_cross((x, y), end, a, b) for a, b in leaders)
                    cost += 300 * sum(_cut((x, y), end, t) for j, t in enumerate(taken) if j != i)
                if best is None or cost < best[0]:
                    best = (cost, box, end, away)
        if best is None:
            continue
        _, box, end, away = best
        taken.append(box)
        if away > 14:
            leaders.append(((x, y), end))
            parts.append(
                f'<path d="M{x:.1f} {y:.1f}L{end[0]:.1f} {end[1]:.1f}" stroke="#999"'
                ' stroke-width=".7"/>'
            )
        parts.append(text(box[0], box[3] - 3, points[i].name, "start", 11, HALO))
    return parts


def _text_width(words: str, size: int) -> float:
    return 0.57 * size * len(words)


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _cut(a, b, box: Box) -> bool:
    """Whether the way from a to b goes through the box, looked at in sixteen places."""
    steps = ((a[0] + (b[0] - a[0]) * k / 16, a[1] + (b[1] - a[1]) * k / 16) for k in range(17))
    return any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in steps)


def _cross(a, b, c, d) -> bool:
    """Whether the ways from a to b and from c to d cross."""

    def side(p, q, r):
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0
