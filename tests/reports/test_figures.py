"""Figures are legible on light and dark pages and in grey, reproducible, never silently empty."""

import re

import numpy as np
import pytest
from helpers.pages import check_drawing, get_font_sizes
from helpers.studies import DEPTHS, SPECS

from sparsecut.methods import make_plan
from sparsecut.reports import figures
from sparsecut.reports.figures import draw_bars, draw_curves
from sparsecut.reports.label_placement import place_labels
from sparsecut.reports.plan_drawing import draw_plan
from sparsecut.reports.scatter import Point, draw_scatter
from sparsecut.schema import UserError

LIGHT, DARK = "#ffffff", "#14171a"  # the pages' backgrounds


def draw_examples() -> list[str]:
    """A figure of each kind."""
    rows = {"plain": (0.5, 0.4, 0.6), "not run": None, "cut": (0.8, 0.7, 0.9)}
    points = [Point("plain", 1, rows["plain"], "a", True), Point("cut", 1.4, rows["cut"], "b")]
    lines = {"plain": [(1, 3), (2, 2), (3, 1)], "cut": [(1, 2), (2, 1)], "alone": [(1, 1)]}
    return [
        draw_bars(rows, title="average", reference="plain"),
        draw_scatter(points, title="quality & cost", x_label="cost"),
        draw_curves(lines, title="loss", x_label="step"),
        draw_plan(make_plan("sparsecut", *DEPTHS), *DEPTHS),
    ]


def test_equal_numbers_give_equal_figures():
    first = draw_examples()
    assert first == draw_examples()
    for drawing in first:
        check_drawing(drawing)
        assert min(get_font_sizes(drawing)) >= 11
        assert "date" not in drawing.lower()


def test_a_figure_fits_a_phone_unless_its_names_are_long():
    for drawing in draw_examples():
        assert float(re.search(r'width="([\d.]+)"', drawing)[1]) <= 358


def test_colours_stand_out_from_both_backgrounds():
    for colour in figures.COLOURS:
        assert contrast(colour, LIGHT) >= 3
        assert contrast(colour, DARK) >= 3


def test_series_differ_without_colour():
    assert len(set(figures.MARKERS)) == len(set(figures.DASHES)) == len(figures.COLOURS)


def test_nothing_to_draw_is_a_sentence():
    empty = [
        draw_bars({"plain": None}, title="average"),
        draw_bars({}, title="average"),
        draw_scatter([], title="cost", x_label="cost"),
        draw_curves({"plain": [(1, 2.0)]}, title="loss", x_label="step"),
        draw_curves({}, title="loss", x_label="step"),
    ]
    for text in empty:
        assert "<svg" not in text
        assert "is empty" in text


def test_names_are_escaped():
    rows = {"<script>alert(1)</script>": (0.5, 0.4, 0.6)}
    drawings = [
        draw_bars(rows, title="<script>"),
        draw_curves({"<script>": [(1, 2), (2, 1)]}, title="<script>", x_label="<script>"),
        draw_curves({}, title="<script>", x_label="step"),
    ]
    assert not any("<script" in drawing for drawing in drawings)


def test_labels_of_a_crowded_figure_cover_nothing():
    draw = np.random.default_rng(0)
    anchors = []
    for _ in range(25):
        column = float(draw.choice([60, 70, 300, 320, 560]))
        anchors.append((column, 400 * float(draw.random())))
    sizes = [(90.0, 14.0)] * len(anchors)
    boxes = place_labels(anchors, sizes, [], (0, -20, 640, 420))
    marks = [(x - 6, y - 6, x + 6, y + 6) for x, y in anchors]
    for i, box in enumerate(boxes):
        for other in [*boxes[:i], *marks]:
            apart = box[2] <= other[0] or other[2] <= box[0]
            assert apart or box[3] <= other[1] or other[3] <= box[1]


@pytest.mark.parametrize("name", list(SPECS))
def test_every_plan_can_be_drawn(name):
    plan = make_plan(SPECS[name], *DEPTHS)
    drawing = draw_plan(plan, *DEPTHS)
    check_drawing(drawing)
    written = {shortcut.layer for shortcut in plan.shortcuts}
    num_taps = sum(len(shortcut.flat_taps) for shortcut in plan.shortcuts)
    assert drawing.count('class="arrow"') == num_taps
    assert drawing.count('fill="#2f7fc1"') == len(plan.resolved_taps(8)) + len(written)


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        figures.check_matplotlib()


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, as the Web Content Accessibility Guidelines define it."""
    darker, lighter = sorted([luminance(one), luminance(other)])
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """The relative luminance of a colour, 0 to 1."""
    total = 0.0
    for weight, start in ((0.2126, 1), (0.7152, 3), (0.0722, 5)):
        value = int(colour[start : start + 2], 16) / 255
        total += weight * (value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4)
    return total
