"""A plan is frozen data, equal to its JSON, and refuses what could not fire."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsecut.methods import (
    METHODS,
    PATTERNS,
    make_plan,
    official_7b_as_run,
    official_13b,
    place_shortcuts,
    sparsecut,
)
from sparsecut.plan import Plan, Shortcut
from sparsecut.schema import UserError


@pytest.mark.parametrize("name", [m for m in METHODS if m != "official_13b"])
def test_a_plan_equals_its_json_and_its_yaml(name):
    plan = make_plan(name, 24, 32)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan
    assert make_plan(plan.to_dict(), 24, 32) == plan


def test_taps_and_shortcuts_may_be_any_sequence():
    assert Shortcut(range(1, 3), 0, "channels") == Shortcut((1, 2), 0, "channels")
    assert Plan(Shortcut((tap,), 0) for tap in (1, 2)) == Plan((Shortcut(1, 0), Shortcut(2, 0)))


def test_a_plan_cannot_be_changed():
    with pytest.raises(AttributeError):
        sparsecut(24, 32).tiles = 3


def test_plans_are_made_and_drawn_without_torch():
    code = """
import sys
from sparsecut import METHODS, draw, make_plan
for name in METHODS:
    draw(make_plan(name, 24, 40), 24, 40)
sys.exit(bool({"torch", "transformers"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_released_lists_come_out_of_the_even_spread():
    assert official_13b(24, 40) == sparsecut(24, 40, pattern="sparse", shared=True, norm=False)
    assert [s.layer for s in official_7b_as_run(24, 32).shortcuts] == [0, 4, 9, 14, 19, 24, 29]
    assert [s.taps[0] for s in official_7b_as_run(24, 32).shortcuts] == [-2, 1, 4, 7, 10, 13, 16]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("depths", [(24, 32), (24, 40), (8, 6), (12, 12), (2, 2)])
def test_every_pattern_fits_every_depth(pattern, depths):
    plan = make_plan({"method": "sparsecut", "pattern": pattern}, *depths)
    taps, layers = place_shortcuts(*depths, pattern=pattern)
    assert len(set(layers)) == len(layers) == len(taps) == len(plan.shortcuts) - 1
    assert sorted(layers) == layers and all(1 <= t <= depths[0] for t in taps)


def test_patterns_are_what_they_are_called():
    taps = {}
    layers = {}
    for pattern in ("sparse", "bottom", "top", "reversed"):
        taps[pattern], layers[pattern] = place_shortcuts(24, 32, 8, pattern)
    # The list in comments of the released code, plus one.
    assert taps["bottom"] == [1, 2, 4, 7, 10, 14, 19, 24]
    assert sum(taps["bottom"]) < sum(taps["top"])
    assert sum(layers["bottom"]) < sum(layers["sparse"]) < sum(layers["top"])
    assert taps["reversed"] == taps["sparse"][::-1]
    assert layers["reversed"] == layers["sparse"]
    assert place_shortcuts(24, 24, pattern="dense")[1] == list(range(24))


def test_the_variants_of_the_method_page_are_plans_of_models_of_every_depth():
    page = (Path(__file__).parents[1] / "docs" / "method.md").read_text()
    (block,) = re.findall(r"```yaml\n(arms:.*?)```", page, re.S)
    arms = yaml.safe_load(block)["arms"]
    for depths in ((12, 6), (12, 16), (12, 30)):
        plans = {name: make_plan(spec, *depths) for name, spec in arms.items()}
        dummy = plans["deepstack_dummy"]
        assert [(s.taps, s.layer, s.grain) for s in dummy.shortcuts] == [
            ((-2,), layer, 0) for layer in range(5)
        ]
        assert dummy.tiles == 0 and dummy.shared
        taps = [s.taps[0] for s in plans["middle"].shortcuts[1:]]
        assert len(set(taps)) == len(taps) and all(6 <= tap <= 9 for tap in taps)
        assert plans["middle"].layers and not plans["middle_at_input"].layers
        assert plans["levels_only"].num_views == 1 and plans["sparsecut"].num_views == 5
        kept = [s.taps for s in plans["levels_only"].shortcuts]
        assert kept == [s.taps for s in plans["sparsecut"].shortcuts]
        assert len(set(map(str, plans.values()))) == len(plans)  # no two are the same


def get_places(name: str, *depths: int) -> list[tuple]:
    """(tap, layer) of each shortcut but the first."""
    return [(s.taps[0], s.layer) for s in make_plan(name, *depths).shortcuts[1:]]


def test_published_lists_come_out_of_the_functions_of_depth():
    assert make_plan("dense_connector_sci", 24, 32).shortcuts[0].taps == (-2, 7, 15)
    assert make_plan("mmfuser", 24, 32).shortcuts[0].taps == (3, 8, 13, 18, -2)
    assert make_plan("external_direct", 24, 32).shortcuts[0].taps == (3, 18, 23)
    assert make_plan("external_direct", 27, 32).shortcuts[0].taps == (3, 20, 25)
    both = make_plan({"method": "external_direct", "states": "all"}, 24, 32)
    assert both.shortcuts[0].taps == (tuple(range(1, 13)), tuple(range(13, 25)), -2)
    assert make_plan("molmo", 24, 32).shortcuts[0].taps == (22, 15)
    assert get_places("lsf_internal_direct", 24, 32) == [(3, 3), (18, 23), (23, 29)]
    assert get_places("qwen3_vl", 27, 36) == [(9, 1), (17, 2), (25, 3)]
    assert get_places("granite4", 27, 40)[:3] == [(-7, 3), (-13, 6), (-19, 9)]
    phases = make_plan("granite4", 27, 40).shortcuts[4:]
    assert [(s.grain, s.layer) for s in phases] == [(1, 12), (2, 15), (3, 18), (4, 21)]


def test_the_control_has_the_same_taps_at_the_input():
    plan, control = make_plan("sparsecut", 24, 32), make_plan("sparsecut_input", 24, 32)
    assert [s.taps for s in control.shortcuts] == [s.taps for s in plan.shortcuts]
    assert control.layers == () and control.num_views == plan.num_views == 5


def deep(*shortcuts, **settings) -> Plan:
    """A plan of the last block but one into the input, and further shortcuts."""
    return Plan((Shortcut((-2,), 0), *shortcuts), **settings)


def made(depths=(24, 32), **spec) -> Plan:
    return make_plan(spec, *depths)


# What is wrong -> a call that does it, and what the error must name.
MISTAKES = {
    "layer": (lambda: deep(Shortcut((3,), 32)).check(24, 32), ["shortcut 1", "32", "0 to 31"]),
    "tap": (lambda: Plan((Shortcut((25,), 0),)).check(24, 32), ["shortcut 0", "25", "0 to 24"]),
    "depth": (lambda: make_plan("official_13b", 24, 36), ["shortcut 8", "layer 39"]),
    "no input": (lambda: Plan((Shortcut((1,), 3),)), ["layer 0"]),
    "mix": (lambda: Shortcut((1,), 0, "chanels"), ["'chanels'", "did you mean 'channels'"]),
    "no grain": (lambda: Plan((Shortcut((1,), 0, "pick", 4),)), ["grain 4", "tiles=0"]),
    "idle grain": (lambda: Shortcut((1,), 0, "channels", 2), ["grain=2", "'channels'"]),
    "nothing else": (lambda: Plan((Shortcut((-2,), 0, "attend"),)), ["'attend'", "tiles=0"]),
    "tokens": (lambda: deep(Shortcut((1,), 2, "tokens"), tiles=2), ["pick 1", "tokens 5"]),
    "tiles": (lambda: deep(tiles=1), ["tiles is 1"]),
    "gate": (lambda: deep(gate="half"), ["'half'", "zero_vector"]),
    "shared gate": (lambda: deep(gate="zero_projector", shared=True), ["shared=True"]),
    "rank": (lambda: deep(rank=0), ["rank is 0"]),
    "method": (lambda: made(method="sparscut"), ["'sparscut'", "did you mean 'sparsecut'"]),
    "option": (lambda: made(method="sparsecut", cuont=3), ["'cuont'", "did you mean 'count'"]),
    "count": (lambda: made((8, 6), method="sparsecut", count=9), ["count is 9", "1 to 6"]),
    "key": (
        lambda: Plan.from_dict({"shortcuts": [{"taps": [1], "layre": 0}]}),
        ["shortcuts.0.layre", "did you mean 'layer'"],
    ),
    "states": (
        lambda: made(method="external_direct", states="formr"),
        ["'formr'", "did you mean 'former'"],
    ),
    "no shortcuts": (lambda: Plan.from_dict({"tiles": 2}), ["lacks shortcuts"]),
    "no taps": (lambda: Shortcut((), 0), ["taps=()"]),
    "tap's type": (lambda: Shortcut((True,), 0), ["(True,)"]),
    # A list in a file cannot be looked up in a dict.
    "mix's type": (lambda: Shortcut((1,), 0, ["pick"]), ["['pick']"]),
    "gate's type": (lambda: deep(gate=["zero"]), ["['zero']"]),
    "method's type": (lambda: made(method=["llava"]), ["['llava']"]),
    "pattern's type": (lambda: made(method="sparsecut", pattern=["top"]), ["['top']"]),
    "spec's type": (lambda: make_plan(5, 24, 32), ["5", "keys and values"]),
    "shortcut's type": (lambda: Plan(({"taps": [1], "layer": 0},)), ["Plan.from_dict"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_fire_is_refused_with_the_facts(mistake):
    call, facts = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        call()
    assert all(fact in str(error.value) for fact in facts), error.value
