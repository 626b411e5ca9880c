"""Families that can be upgraded: the patches under an image token, identity, effect of shortcuts.

The default suite tries one family per way from patches to tokens. tests/conformance tries the rest.
"""

import pytest
import torch
from helpers import bases
from helpers.base_configs import CLIP
from helpers.bases import randomize_fusion
from helpers.upgrade_checks import (
    FAMILY_CHECKS,
    build_upgraded,
    check_fine_views,
    check_real_images,
    check_videos,
    find_patches_by_gradient,
)
from transformers import AutoConfig, AutoModelForImageTextToText

from sparsecut import upgrade
from sparsecut.families import FAMILIES
from sparsecut.upgrading import load_fusion


def test_all_known_families_are_tried():
    assert set(bases.FAMILY_NAMES) == set(FAMILIES)


@pytest.mark.parametrize("name", bases.DEFAULT_FAMILIES)
@pytest.mark.parametrize("check", FAMILY_CHECKS.values(), ids=FAMILY_CHECKS)
def test_a_family_keeps_every_claim(check, name):
    check(name)


@pytest.mark.parametrize("name", bases.DEFAULT_FAMILIES)
def test_patch_tables_hold_for_images_of_awkward_sizes(name):
    check_real_images(name)


def test_a_token_reads_the_fine_view_over_its_place():
    check_fine_views("llava")


def test_videos_are_refused_before_the_base_runs():
    check_videos("qwen2_5_vl")


@pytest.mark.parametrize("registers", [0, 4])
def test_class_and_register_tokens_in_the_prompt_show_no_patch(registers):
    config = bases.base_config("llava")
    if registers:
        kind = {
            "model_type": "dinov2_with_registers",
            "num_register_tokens": registers,
            "mlp_ratio": 2,
        }
        config.vision_config = AutoConfig.for_model(**{**CLIP, **kind})
    else:
        config.vision_feature_select_strategy = "full"
    base = AutoModelForImageTextToText.from_config(config).eval()
    two_images = bases.build_images("llava")[1]
    reached, table = find_patches_by_gradient(base, two_images, -2)
    prefix = registers or 1  # by itself, a LLaVA leaves out the class token alone
    length = prefix + 16
    assert len(reached) == 2 * length
    table = table.view(2, length)
    assert (table[:, :prefix] == -1).all()
    reached_by_patches = [reached[i] for i in range(len(reached)) if i % length >= prefix]
    assert [{number} for number in table[:, prefix:].flatten().tolist()] == reached_by_patches

    model, _ = upgrade(base)
    randomize_fusion(model)
    with torch.no_grad(), model.shortcuts_active(torch.randn(2, 4, 3, 16, 16)):
        images = base.get_image_features(**two_images).pooler_output
    shortcut_channels = torch.stack(list(images))[..., 32:]
    assert (shortcut_channels[:, :prefix] == 0).all()
    assert (shortcut_channels[:, prefix:] != 0).any(-1).all()


def test_an_interpolated_image_gives_each_token_the_nearest_patch():
    base = bases.build_base("llava_onevision")
    # so few tokens that four tiles have to be interpolated
    base.config.vision_aspect_ratio = "anyres_max_1"
    image = {"pixel_values": torch.randn(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[31, 30]])}
    reached, table = find_patches_by_gradient(base, image, -1)
    assert len(reached) < 16 + 8 * 9, "it was interpolated"
    for patches, row in zip(reached, table.tolist(), strict=True):
        assert {number for number in row if number >= 0} <= patches


@torch.no_grad()
def test_layers_that_go_on_with_the_last_positions_get_their_features_alone():
    base = bases.build_base("gemma4")  # its last two layers share keys and values
    inputs = bases.build_inputs("gemma4", base)
    model, _ = upgrade(base, {"method": "sparsecut", "count": 4})
    randomize_fusion(model)
    assert {2, 3} <= {*model.plan.fused_layers}
    logits = model(**inputs).logits
    for count in (1, 4):  # the last four positions hold an image token
        kept = model(**inputs, logits_to_keep=count).logits
        assert torch.allclose(kept, logits[:, -count:], atol=1e-5)


def test_shortcuts_of_a_base_that_was_made_on_the_spot_need_no_processor(tmp_path):
    _, model, inputs = build_upgraded("qwen2_5_vl")
    randomize_fusion(model)
    model.save_fusion(tmp_path)
    loaded, processor = load_fusion(tmp_path, bases.build_base("qwen2_5_vl"))
    assert processor is None
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
