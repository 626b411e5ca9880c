"""What an upgrade is said to cost is what it has."""

import pytest
from helpers.example_bases import build_example_base

from sparsecut import upgrade
from sparsecut.profiling.upgraded import count_upgrades

PLANS = {
    "default": None,
    "wide": "sparsecut",
    "two": {"method": "sparsecut", "count": 2},
    "shared": {"method": "sparsecut", "shared": True, "rank": 4},
    "other": "qwen3_vl",
}


@pytest.mark.parametrize("kind", ["llava", "qwen"])
def test_counted_parameters_are_those_of_the_upgraded_model(kind, tmp_path):
    for part in build_example_base(kind):
        part.save_pretrained(tmp_path)
    costs = count_upgrades(str(tmp_path), PLANS)
    for name, plan in PLANS.items():
        model, _ = upgrade(tmp_path, plan)
        parts = model.count_parameters()
        assert costs[name].num_fusion_parameters == parts["fusion"]
        assert costs[name].num_base_parameters == sum(
            p.numel() for p in model.detach().parameters()
        )
    assert costs["default"].num_fusion_parameters < costs["wide"].num_fusion_parameters
