"""A plan's drawing shows every shortcut, and stays within a terminal."""

import pytest

from sparsecut.drawing import (
    ARROW,
    draw,
    find_straight_pairs,
    fold,
    list_arrows,
    summarize,
    text_table,
)
from sparsecut.methods import METHODS, PATTERNS, make_plan
from sparsecut.plan import GATES, MIXERS, Plan, Shortcut
from sparsecut.schema import UserError

PLANS = [*METHODS, *({"method": "sparsecut", "pattern": pattern} for pattern in PATTERNS)]


@pytest.mark.parametrize("spec", PLANS, ids=str)
@pytest.mark.parametrize("depths", [(24, 40), (40, 40)], ids=str)
def test_every_layer_that_receives_features_has_one_arrow(spec, depths):
    plan = make_plan(spec, *depths)
    lines = draw(plan, *depths, title="a plan").splitlines()
    layers = sorted({s.layer for s in plan.shortcuts}, reverse=True)
    ends = [line.split(ARROW)[1].strip("\u2502 ") for line in lines if ARROW in line]
    assert ends == [str(layer) if layer else "0 = input" for layer in layers]
    assert max(map(len, lines)) <= 100
    starts = [line.split("\u251c")[0] for line in lines if "\u251c" in line]
    for tap in plan.resolved_taps(depths[0]):  # a line leaves every tap that is read
        assert sum(f" {tap} " in start for start in starts) == 1


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


def find_straight(*shortcuts: Shortcut) -> list[tuple[int, int]]:
    return find_straight_pairs(list_arrows(Plan((Shortcut((8,), 0), *shortcuts)), 8))


def test_straight_arrows_need_the_same_order_on_both_sides():
    ascending = [Shortcut((t,), t + 1) for t in (1, 3, 5)]
    assert find_straight(*ascending) == [(1, 2), (3, 4), (5, 6)]
    assert find_straight(*(Shortcut((6 - t,), t) for t in (1, 2, 3, 4))) == []
    assert find_straight() == []


def test_arrows_say_what_drawings_show():
    plan = Plan((Shortcut((-2,), 0), Shortcut(((1, -3), 2), 3, "channels")), tiles=2)
    plain, fine = list_arrows(plan, 4)
    assert (plain.taps, plain.label, plain.reads_fine) == ((3,), "pick", False)
    assert (fine.taps, fine.label, fine.reads_fine) == ((1, 2), "channels of 2 taps", True)
    base, _ = list_arrows(plan.for_upgrade(fine=True), 4)
    assert base.taps == () and not base.has_weights


def test_unused_layers_are_folded_and_single_ones_are_not():
    assert fold({0, 2, 7}, 10) == [0, 1, 2, "\u22ee", 7, "\u22ee"]
    assert fold({0}, 2) == [0, 1]


def test_the_text_beside_the_drawing():
    shortcuts = (Shortcut((-2,), 0), Shortcut((3, 5), 4, "attend"))
    plan = Plan(shortcuts, tiles=2, shared=True, norm=False, gate="zero")
    text = draw(plan, 6, 8, num_patches=9)
    first = text.splitlines()[0]
    for words in ("1 shortcut,", "2x2 fine views", "shared", "no norm", GATES["zero"].description):
        assert words in first
    assert "9 per image" in text and "5 views" in text and "attend of 2 taps" in text
    assert MIXERS["attend"].description in text
    assert "5 for each coarse patch" in draw(make_plan("hires_tokens", 6, 8), 6, 8)
    assert summarize(make_plan("sparsecut_input", 6, 8)).startswith("3 shortcuts into the input")
    assert summarize(make_plan("llava", 6, 8)).startswith("no shortcuts, coarse view only")


def test_a_plan_that_cannot_fire_is_not_drawn():
    with pytest.raises(UserError, match="layer 34"):
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
