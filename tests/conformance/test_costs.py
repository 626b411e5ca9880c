"""Costs of more plans and sizes than the default suite counts."""

import pytest
from helpers.counting import BY_HAND, check_by_hand
from helpers.real_counts import check_parts_add_up

from sparsecut.profiling.counting import count_plan
from sparsecut.profiling.sizes import REFERENCE, read_backbone_config

PAIRS = list(zip(*REFERENCE.values(), strict=True))
NUM_IMAGE_TOKENS = {"clip-l-336": 576, "siglip-so400m-384": 729}
NUM_PARAMETERS = {"llama-7b": 6.74e9, "llama-13b": 13.0e9}


@pytest.mark.parametrize("method", BY_HAND)
def test_totals_agree_with_the_arithmetic_by_hand(method):
    vision = read_backbone_config("clip-l-336", "vision")
    language = read_backbone_config("llama-7b", "language")
    check_by_hand(count_plan(vision, language, method), method, language)


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_every_named_size_can_be_counted(vision, language):
    vision_config = read_backbone_config(vision, "vision")
    language_config = read_backbone_config(language, "language")
    cost = count_plan(vision_config, language_config, "llava")
    assert cost.num_image_tokens == NUM_IMAGE_TOKENS[vision]
    assert cost.num_language_parameters == pytest.approx(NUM_PARAMETERS[language], rel=0.01)


@pytest.mark.parametrize("plan", ["hires_tokens", "sparsecut", "mmfuser"])
def test_parts_of_more_mixers_add_up_to_a_whole_real_forward(plan):
    check_parts_add_up(plan)
