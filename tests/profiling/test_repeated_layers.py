"""Counting one layer of each kind gives what counting every layer gives, in all numbers.

More families and all plans are in tests/conformance.
"""

import pytest
from helpers.counted_layers import CONTEXT, LANGUAGE, VISION, count_both_ways

from sparsecut.profiling import repeated_layers
from sparsecut.profiling.counting import count_plan

CASES = [("llama", "sparsecut"), ("alternating windows", CONTEXT), ("alternating experts", "llava")]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_one_layer_of_each_kind_stands_for_all(family, plan):
    whole, once = count_both_ways(family, plan)
    assert once == whole


def test_few_layers_run(monkeypatch):
    """Of eight like layers, one of each kind of input runs."""
    places = []
    run_first = repeated_layers._run_first

    def note(layer, *rest):
        places.append(layer.place)
        return run_first(layer, *rest)

    monkeypatch.setattr(repeated_layers, "_run_first", note)
    count_plan(VISION, LANGUAGE["llama"], "llava")
    assert places and max(places) <= 1
