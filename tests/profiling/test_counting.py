"""What plans cost: parts that add up, closed forms, and the arithmetic by hand at full size.

More plans and sizes are counted in tests/conformance/test_costs.py.
"""

import json

import pytest
import torch
from helpers.counting import check_by_hand, check_closed_form, count_tiny, get_tiny_configs
from helpers.real_counts import build_real, check_parts_add_up
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

from sparsecut.cli.main import app
from sparsecut.config.places import DEPTHS
from sparsecut.profiling import timing
from sparsecut.profiling.counting import PlanCost, count_plan, format_costs
from sparsecut.profiling.fake_models import count_saved_bytes, create_flop_counter
from sparsecut.profiling.sizes import REFERENCE, read_backbone_config

SMALL_LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    vocab_size=128,
)


def test_a_7b_model_costs_its_closed_form_and_the_arithmetic_by_hand():
    vision = read_backbone_config("clip-l-336", "vision")
    language = read_backbone_config("llama-7b", "language")
    cost = count_plan(vision, language, "llava")
    assert cost.num_image_tokens == 576
    assert cost.num_language_parameters == pytest.approx(6.74e9, rel=0.001)
    assert cost.num_vision_parameters == pytest.approx(303.5e6, rel=0.001)
    check_closed_form(cost, language)
    check_by_hand(cost, "llava", language)


def test_shortcuts_leave_the_closed_form_of_the_language_model():
    vision, _ = get_tiny_configs()
    check_closed_form(count_plan(vision, SMALL_LLAMA, "sparsecut"), SMALL_LLAMA)


CONTEXT = {"method": "sparsecut", "fine": 0.5, "gate": "context", "rank": 2}


@pytest.mark.parametrize("plan", ["llava", CONTEXT])
def test_parts_add_up_to_a_whole_real_forward(plan):
    check_parts_add_up(plan)


def test_what_training_keeps_is_what_a_padded_batch_keeps():
    cost = count_tiny("sparsecut", num_text_tokens=5, batch_size=3, dtype=torch.float32)
    model, input_ids = build_real("sparsecut", cost.num_image_tokens)
    pixels = torch.randn(1, model.plan.num_views, 3, 16, 16)
    mask = torch.ones(3, input_ids.shape[1], dtype=torch.long)
    mask[0, -1] = 0
    fusion = count_saved_bytes(model, input_ids, pixels, mask, ["fusion"])
    both = count_saved_bytes(model, input_ids, pixels, mask, ["fusion", "language"])
    assert cost.training_fusion_bytes == fusion
    assert cost.training_fusion_language_bytes == both
    assert fusion < both


def test_attention_of_every_kernel_counts_the_same():
    """The formula for the kernel that torch's counter lacks agrees with plain matrix products."""
    query = torch.randn(2, 4, 6, 8)
    key = torch.randn(2, 4, 10, 8)
    with create_flop_counter() as ours:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    with FlopCounterMode(display=False) as plain:
        (query @ key.transpose(-1, -2)).softmax(-1) @ key
    assert ours.get_total_flops() == plain.get_total_flops() > 0


def test_more_costs_more():
    one = count_tiny("sparsecut")
    two = count_tiny("sparsecut", num_images=2)
    none = count_tiny("sparsecut", num_images=0)
    assert two.encoder_fine_flops == 2 * one.encoder_fine_flops
    assert two.fusion_flops == 2 * one.fusion_flops
    assert none.num_image_tokens == 0
    assert none.encoder_coarse_flops == none.encoder_fine_flops == none.fusion_flops == 0
    assert none.prefill_total_flops < one.prefill_total_flops < two.prefill_total_flops
    wide = count_tiny("sparsecut", dtype=torch.float32, batch_size=2)
    assert wide.weight_bytes == 2 * one.weight_bytes
    assert wide.prefill_total_flops == one.prefill_total_flops
    assert wide.training_fusion_bytes > 2 * one.training_fusion_bytes


def test_added_features_cost_the_language_model_nothing_that_is_counted():
    """Sums are not counted; benchmarks/llm_side.py times them."""
    plain = count_tiny("llava")
    added = count_tiny("sparsecut")
    assert added.language_prefill_flops == plain.language_prefill_flops
    assert added.language_per_new_token_flops == plain.language_per_new_token_flops


def test_counting_changes_no_configuration_and_no_default_dtype():
    vision, language = get_tiny_configs()
    before = vision.to_dict(), language.to_dict(), torch.get_default_dtype()
    cost = count_plan(vision, language, "llava")
    assert (vision.to_dict(), language.to_dict(), torch.get_default_dtype()) == before
    assert PlanCost.from_dict(json.loads(json.dumps(cost.to_dict()))) == cost


def test_depths_that_are_known_without_models_are_those_of_the_sizes():
    for part, sizes in REFERENCE.items():
        depths = {name: config.num_hidden_layers for name, config in sizes.items()}
        assert depths == DEPTHS[part]


def test_unknown_sizes_name_the_known_ones():
    with pytest.raises(ValueError, match="'llama-7b'"):
        read_backbone_config("lama-7b", "language")
    with pytest.raises(ValueError, match="clip-l-336"):
        read_backbone_config("llama-7b", "vision")


def test_numbers_that_are_too_small_are_named():
    with pytest.raises(ValueError, match=r"num_text_tokens is 0.*1"):
        count_plan(*get_tiny_configs(), "llava", num_text_tokens=0)
    plain = count_tiny("llava").to_dict()
    del plain["dtype"]
    with pytest.raises(ValueError, match="dtype"):
        PlanCost.from_dict(plain)
    with pytest.raises(ValueError, match="at least one"):
        format_costs({})


def test_the_command_prints_and_writes_counts_and_times(tmp_path, monkeypatch):
    measure_all = timing.measure_all

    def measure_briefly(models, **options):
        return measure_all(models, **options, repeats=1, warmup=1, num_new_tokens=2)

    monkeypatch.setattr(timing, "measure_all", measure_briefly)
    file = tmp_path / "costs" / "all.json"
    backbones = ["--vision", "shapes", "--language", "shapes"]
    command = ["cost", "llava", "sparsecut", *backbones, "--measure", "--json", str(file)]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines[:3]] == ["plan", "llava", "sparsecut"]
    assert "1.000" in lines[1]
    assert "first token ms" in result.stdout
    written = json.loads(file.read_text())
    assert PlanCost.from_dict(written["sparsecut"]["count"]).num_fusion_parameters > 0
    assert written["llava"]["measured"]["repeats"] == 1
