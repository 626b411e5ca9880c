"""Counts of fake tensors against those of a real model of the same size."""

import torch
from helpers.counting import count_tiny, get_tiny_configs

from sparsecut.modeling import SparseCutForConditionalGeneration
from sparsecut.profiling.counting import count_cache_bytes
from sparsecut.profiling.fake_models import build_config, create_flop_counter


def build_real(plan, num_image_tokens: int):
    """(model, token ids) of a tiny model with random weights: image tokens, then five of text."""
    config = build_config(*get_tiny_configs(), plan)
    model = SparseCutForConditionalGeneration(config).eval()
    return model, torch.tensor([[config.image_token_id] * num_image_tokens + [1] * 5])


def check_parts_add_up(plan) -> None:
    """Assert that a prompt of two images costs what a real forward does, by part and in all."""
    cost = count_tiny(plan, num_text_tokens=5, num_images=2, dtype=torch.float32)
    model, input_ids = build_real(plan, cost.num_image_tokens)
    pixels = torch.randn(2, model.plan.num_views, 3, 16, 16)
    with torch.no_grad(), create_flop_counter() as counter:
        features = model.get_image_features(pixels)
        encoding = counter.get_total_flops()
        output = model(
            input_ids=input_ids, mm_encoder_outputs={"image": features}, logits_to_keep=1
        )
    encoder = cost.encoder_coarse_flops + cost.encoder_fine_flops
    assert encoder + cost.fusion_flops == encoding
    assert encoding + cost.language_prefill_flops == cost.prefill_total_flops
    assert cost.prefill_total_flops == counter.get_total_flops()
    assert bool(cost.encoder_fine_flops) == bool(model.plan.tiles)
    assert cost.kv_cache_bytes == count_cache_bytes(output.past_key_values)
    assert cost.num_fusion_parameters == sum(p.numel() for p in model.fusion.parameters())
    assert cost.num_total_parameters == sum(p.numel() for p in model.parameters())
    backbones = cost.num_vision_parameters + cost.num_language_parameters
    assert cost.num_total_parameters == backbones + cost.num_fusion_parameters
