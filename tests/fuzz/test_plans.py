"""A plan from anything: a plan that equals its JSON and can be drawn, or a sentence."""

import inspect
import json

from helpers.fuzzing import JUNK, mostly
from hypothesis import strategies as st

from sparsecut.drawing import draw
from sparsecut.methods import METHODS, PATTERNS, make_plan
from sparsecut.plan import GATES, MIXERS, Plan
from sparsecut.schema import UserError

TAPS = st.lists(mostly(st.integers(-7, 6), st.lists(st.integers(-7, 6), max_size=3)), max_size=3)
SHORTCUTS = st.fixed_dictionaries(
    {"taps": mostly(TAPS), "layer": mostly(st.integers(0, 3))},
    optional={
        "mix": mostly(st.sampled_from(list(MIXERS))),
        "grain": mostly(st.integers(0, 4)),
    },
)
SETTINGS = {
    "tiles": mostly(st.sampled_from([0, 2, 3])),
    "shared": mostly(st.booleans()),
    "norm": mostly(st.booleans()),
    "gate": mostly(st.sampled_from(list(GATES))),
    "rank": mostly(st.integers(1, 64)),
}
PLANS = st.fixed_dictionaries(
    {"shortcuts": mostly(st.lists(mostly(SHORTCUTS), min_size=1, max_size=4))}, optional=SETTINGS
)
OPTIONS = {
    **SETTINGS,
    "pattern": mostly(st.sampled_from(list(PATTERNS))),
    "mix": mostly(st.sampled_from(list(MIXERS))),
    "count": mostly(st.integers(0, 8)),
    "fine": mostly(st.floats(0, 1)),
    "tap": mostly(st.integers(-4, 4)),
    "start": mostly(st.integers(0, 4)),
    "interval": mostly(st.integers(0, 4)),
}


@st.composite
def draw_method(draw_value) -> dict:
    """A method's name and some of its options."""
    name = draw_value(st.sampled_from(list(METHODS)))
    known = set(inspect.signature(METHODS[name]).parameters) & set(OPTIONS)
    options = {key: OPTIONS[key] for key in sorted(known)}
    return {"method": name, **draw_value(st.fixed_dictionaries({}, optional=options))}


def test_plans(fuzz):
    depths = st.integers(1, 12)
    specs = mostly(PLANS, draw_method(), wrong=st.one_of(JUNK, st.sampled_from(list(METHODS))))

    def check(example):
        spec, vision_depth, language_depth = example
        try:
            plan = make_plan(spec, vision_depth, language_depth)
        except UserError as error:
            assert len(str(error)) < 2100, "an error that nobody can read"
            return
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert draw(plan, vision_depth, language_depth)
        assert set(plan.resolved_taps(vision_depth)) <= set(range(vision_depth + 1))
        assert set(plan.fused_layers) <= set(range(language_depth))
        for fine in (True, False):
            try:
                upgrade = plan.for_upgrade(fine=fine)
            except UserError:
                continue
            assert upgrade.has_base_input

    fuzz(check, st.tuples(specs, depths, depths))
