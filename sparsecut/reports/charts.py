"""Pictures of numbers as SVG text: bars with intervals, curves, and a plan. No library, so that a
report is one file.

Arms are told apart by shade and by pattern or dash, so that a print in grey stays readable.
"""

from __future__ import annotations

from html import escape

from ..plan import Plan

COLOURS = ("#1b4f72", "#c0692b", "#7d8a2e", "#8e5ea2", "#5f6a6a", "#2e86ab")
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 4")
FONT = 'font-family="system-ui, sans-serif" font-size="12" fill="#222"'


def bars(
    groups: list[str],
    arms: dict[str, list[tuple[float, float, float] | None]],
    *,
    height: int = 230,
) -> str:
    """Grouped bars in per cent. arms: name -> per group (value, low, high) in 0..1, or None where
    nothing was measured.
    """
    bar, gap, left, top = 34, 44, 44, 14
    group_width = bar * len(arms) + gap
    width, plot = left + group_width * len(groups) + 10, height - top - 26
    parts = [_percent_axis(left, top, width, plot)]
    for g, group in enumerate(groups):
        x0 = left + gap / 2 + g * group_width
        parts.append(text(x0 + bar * len(arms) / 2, height - 8, group, "middle"))
        for a, (name, values) in enumerate(arms.items()):
            if values[g] is None:
                continue
            value, low, high = values[g]
            x, y = x0 + a * bar, top + plot * (1 - value)
            middle = x + bar / 2 - 1
            parts += [
                (
                    f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar - 3}" height="{plot * value:.1f}"'
                    f' fill="{COLOURS[a % 6]}"><title>{escape(name)}, {escape(group)}: {value:.1%}'
                    f" ({low:.1%} to {high:.1%})</title></rect>"
                ),
                (
                    f'<path d="M{middle:.1f}'
                    f' {top + plot * (1 - high):.1f}V{top + plot * (1 - low):.1f}" stroke="#111" />'
                ),
                text(middle, top + plot * (1 - high) - 4, f"{100 * value:.0f}", "middle", 11),
            ]
    return svg(width, height, parts) + legend(list(arms))


def curves(
    lines: dict[str, list[tuple[float, float]]],
    *,
    x_label: str,
    width: int = 620,
    height: int = 260,
    y_most: float | None = None,
) -> str:
    """Lines through (x, y) points, one per arm, from 0 to y_most: by default the largest y after
    the first tenth of the points.
    """
    left, top, bottom = 44, 14, 34
    points = [p for line in lines.values() for p in line]
    if not points:
        return "<p>No points were logged.</p>"
    x_most = max(x for x, _ in points) or 1
    y_most = (
        y_most or max(y for line in lines.values() for _, y in line[len(line) // 10 :]) * 1.05 or 1
    )
    plot_width, plot = width - left - 22, height - top - bottom
    parts = [frame(left, top, plot_width, plot)]
    for tick in range(5):
        y = top + plot * (1 - tick / 4)
        parts.append(text(left - 6, y + 4, f"{y_most * tick / 4:.2g}", "end"))
        parts.append(
            text(
                left + plot_width * tick / 4, top + plot + 15, f"{x_most * tick / 4:.0f}", "middle"
            )
        )
    parts.append(text(left + plot_width / 2, height - 4, x_label, "middle"))
    for i, line in enumerate(lines.values()):
        path = " ".join(
            f"{left + plot_width * x / x_most:.1f},{top + plot * (1 - min(y, y_most) / y_most):.1f}"
            for x, y in line
        )
        dash = f'stroke-dasharray="{DASHES[i % 6]}"' if DASHES[i % 6] else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[i % 6]}" stroke-width="1.6"'
            f" {dash}/>"
        )
    return svg(width, height, parts) + legend(list(lines), line=True)


def plan_drawing(plan: Plan, vision_depth: int, language_depth: int) -> str:
    """Encoder layers on the left, decoder layers on the right, both from the bottom up, and an
    arrow per shortcut.
    """
    step = max(9, min(24, 300 // max(vision_depth, language_depth)))
    top, box, left, right = 26, 64, 10, 250
    height = top + step * max(vision_depth + 1, language_depth) + 12
    taps = set(plan.resolved_taps(vision_depth))

    def y_vision(tap: int) -> float:
        return height - 12 - step * (tap + 0.5)

    def y_language(layer: int) -> float:
        return height - 12 - step * (layer + 0.5)

    views = f"encoder, {plan.num_views} view{'s' * (plan.num_views > 1)}"
    parts = [text(left, 16, views, "start"), text(right + box / 2, 16, "decoder", "middle")]
    for tap in range(vision_depth + 1):
        parts.append(
            _box(left, y_vision(tap), box, step, tap in taps, "patches" if tap == 0 else str(tap))
        )
    for layer in range(language_depth):
        used = layer == 0 or layer in plan.layers
        parts.append(
            _box(
                right,
                y_language(layer),
                box,
                step,
                used,
                f"input, {layer}" if layer == 0 else str(layer),
            )
        )
    for s in plan.shortcuts:
        for tap in s.flat_taps:
            y1, y2 = y_vision(tap % (vision_depth + 1)), y_language(s.layer)
            x1, x2 = left + box, right - 6
            colour = COLOURS[0] if s.layer else COLOURS[1]
            parts.append(
                f'<path d="M{x1} {y1:.1f}C{x1 + 70} {y1:.1f} {x2 - 70} {y2:.1f} {x2} {y2:.1f}"'
                f' fill="none" stroke="{colour}" stroke-width="1.5"/><path d="M{x2} {y2 - 3:.1f}l6'
                f' 3l-6 3z" fill="{colour}"/>'
            )
    return svg(right + box + 10, height, parts)


def legend(names: list[str], line: bool = False) -> str:
    """The arms' names beside their colours (and dashes)."""
    rows = []
    for i, name in enumerate(names):
        colour, dash = COLOURS[i % 6], DASHES[i % 6]
        sign = (
            f'<path d="M0 6H26" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
            if line
            else f'<rect width="14" height="12" fill="{colour}"/>'
        )
        rows.append(
            f'<span class="key"><svg width="28" height="12">{sign}</svg>{escape(name)}</span>'
        )
    return f'<p class="legend">{"".join(rows)}</p>'


def svg(width: float, height: float, parts: list[str]) -> str:
    """A drawing of so many pixels from its parts."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {FONT}>{"".join(parts)}</svg>'


def text(x: float, y: float, words: str, anchor: str, size: int = 12, style: str = "") -> str:
    """Words at a point; anchor: start, middle or end; style: further attributes."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
        f" {style}>{escape(words)}</text>"
    )


def frame(x: float, y: float, width: float, height: float) -> str:
    """The border of a plot."""
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="#999"/>'


def _percent_axis(left: float, top: float, width: float, plot: float) -> str:
    rows = []
    for tick in (0, 25, 50, 75, 100):
        y = top + plot * (1 - tick / 100)
        rows.append(
            f'<path d="M{left} {y:.1f}H{width - 6}" stroke="#ddd"/>'
            + text(left - 6, y + 4, f"{tick} %", "end", 11)
        )
    return "".join(rows)


def _box(x: float, y: float, width: float, step: float, used: bool, words: str) -> str:
    fill = "#dce6ee" if used else "#f6f6f6"
    label = text(x + width / 2, y + 4, words, "middle", 11) if used or step >= 16 else ""
    return (
        f'<rect x="{x}" y="{y - step / 2 + 1:.1f}" width="{width}" height="{step - 2}"'
        f' fill="{fill}" stroke="#bbb"/>{label}'
    )
