"""A plan's drawing shows every shortcut, and stays within a terminal."""

import pytest

from sparsecut.drawing import ARROW, draw, fold, straight_pairs, text_table
from sparsecut.methods import METHODS, PATTERNS, make_plan
from sparsecut.plan import Plan, Shortcut

PLANS = [*METHODS, *({"method": "sparsecut", "pattern": pattern} for pattern in PATTERNS)]


def arrows(text: str) -> list[str]:
    return [line for line in text.splitlines() if ARROW in line]


@pytest.mark.parametrize("spec", PLANS, ids=str)
@pytest.mark.parametrize("depths", [(24, 40), (40, 40)], ids=str)
def test_every_layer_that_receives_features_has_one_arrow(spec, depths):
    plan = make_plan(spec, *depths)
    text = draw(plan, *depths, title="a plan")
    layers = sorted({s.layer for s in plan.shortcuts}, reverse=True)
    labels = [line.split(ARROW)[1].strip("\u2502 ") for line in arrows(text)]
    assert labels == [str(layer) if layer else "0 = input" for layer in layers]
    assert max(map(len, text.splitlines())) <= 100
    for tap in plan.resolved_taps(depths[0]):  # a wire leaves every tap that is read
        assert (
            sum(
                f" {tap} " in line.split("\u251c")[0]
                for line in text.splitlines()
                if "\u251c" in line
            )
            == 1
        )


def test_a_small_drawing_by_heart():
    text = draw(make_plan({"method": "sparsecut", "pattern": "reversed", "count": 2}, 4, 4), 4, 4)
    plain = str.maketrans("\u2500\u2502\u25b6\u22ee", "-|>:") | dict.fromkeys(
        range(9484, 9533), "+"
    )
    assert text.translate(plain).splitlines()[4:12] == [
        "  +-------------+                       +-------------+",
        "  |             |   +----- channels --->|      3      |",
        "  |      4      |   |                   |      2      |",
        "  |      3      +-+-|----- channels --->|      1      |",
        "  |      2      | | |                   |             |",
        "  |      1      +-|-+                   |             |",
        "  | 0 = patches | +------- channels --->|  0 = input  |",
        "  +-------------+                       +-------------+",
    ]


def test_straight_arrows_need_the_same_order_on_both_sides():
    ascending = [Shortcut((t,), t + 1) for t in (1, 3, 5)]
    assert straight_pairs(ascending) == [(1, 2), (3, 4), (5, 6)]
    assert straight_pairs([Shortcut((6 - t,), t) for t in (1, 2, 3, 4)]) == []
    assert straight_pairs([Shortcut((-2,), 0)]) == []


def test_unused_layers_are_folded_and_single_ones_are_not():
    assert fold({0, 2, 7}, 10) == [0, 1, 2, "\u22ee", 7, "\u22ee"]
    assert fold({0}, 2) == [0, 1]


def test_the_words_beside_the_picture():
    plan = Plan(
        (Shortcut((-2,), 0), Shortcut((3, 5), 4, "attend")),
        tiles=2,
        shared=True,
        norm=False,
        gate="zero",
    )
    text = draw(plan, 6, 8, num_patches=9)
    assert (
        text.splitlines()[0]
        == "1 shortcut, 2x2 fine views, one shared projector, no norm, gates that start at zero"
    )
    assert (
        "9 per picture (9 patches per view)" in text and "5 views: 1 coarse and 2 x 2 fine" in text
    )
    assert "attend of 2 taps" in text
    tokens = draw(make_plan("hires_tokens", 6, 8), 6, 8)
    assert "5 for each coarse patch" in tokens
    assert draw(make_plan("sparsecut_input", 6, 8), 6, 8).startswith("3 shortcuts into the input, ")
    assert draw(make_plan("llava", 6, 8), 6, 8).startswith(
        "no shortcuts, coarse view only, no norm\n"
    )


def test_a_plan_that_cannot_fire_is_not_drawn():
    with pytest.raises(ValueError, match="adds to layer 34"):
        draw(make_plan("official_13b", 24, 40), 24, 32)


def test_a_text_table_aligns_its_columns():
    rows = [["plan", "tokens"], ["llava", "576"], ["sparsecut", "1"]]
    assert text_table(rows).splitlines() == [
        "plan       tokens",
        "llava         576",
        "sparsecut       1",
    ]
    left = text_table(rows, align="<<", separator=" | ")
    assert left.splitlines()[1] == "llava     | 576"
