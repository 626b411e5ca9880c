"""Counting one layer of each kind gives what counting every layer gives, for families and plans."""

import pytest
from helpers.counted_layers import LANGUAGE, count_both_ways

from sparsecut.methods import METHODS
from sparsecut.schema import UserError

CASES = [
    *((family, "sparsecut") for family in LANGUAGE if family != "llama"),
    *(("llama", plan) for plan in METHODS if plan != "sparsecut"),
]


@pytest.mark.parametrize(("family", "plan"), CASES)
def test_one_layer_of_each_kind_stands_for_all(family, plan):
    try:
        whole, once = count_both_ways(family, plan)
    except UserError:
        pytest.skip(f"{plan} does not fit these depths")
    assert once == whole
