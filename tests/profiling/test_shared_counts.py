"""What is counted for several plans, or in a dry run, is what running every layer gives."""

from dataclasses import replace

import pytest
from helpers.counted_layers import LANGUAGE, VISION
from helpers.dry_runs import estimate, write_backbones

from sparsecut.profiling import dry_run
from sparsecut.profiling.counting import PlanCounter

PROMPTS = [("llava", {}), ("hires_tokens", {"num_text_tokens": 8, "batch_size": 2})]


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """A folder with configurations of a tiny encoder and a tiny language model."""
    return write_backbones(tmp_path_factory.mktemp("backbones"))


def test_plans_that_share_backbones_cost_what_each_costs_alone():
    """Windows make a new token's cost depend on what the cache holds."""
    language = LANGUAGE["alternating windows"]
    shared = PlanCounter(VISION, language)
    for plan, prompt in PROMPTS:
        whole = PlanCounter(VISION, language, whole=True)
        cost = whole.count(plan, **prompt)
        assert shared.count(plan, **prompt) == cost, plan
    untrained = {"training_fusion_bytes": None, "training_fusion_language_bytes": None}
    assert shared.count(plan, **prompt, training=False) == replace(cost, **untrained)


@pytest.mark.parametrize(("train", "checkpointing"), [("fusion", True), ("language", False)])
def test_a_dry_run_of_one_layer_of_each_kind_gives_all_figures(
    backbones, train, checkpointing, monkeypatch
):
    settings = {"train": [train], "args": {"gradient_checkpointing": checkpointing}}
    once = estimate(backbones, **settings)
    monkeypatch.setattr(dry_run, "run_alike_layers_of_model_once", lambda model: None)
    assert once == estimate(backbones, **settings)
