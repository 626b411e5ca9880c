"""Counted costs of tiny models, each counted once, and closed forms to hold them against."""

import functools
import json

from helpers.tiny import tiny_language, tiny_vision
from transformers import LlamaConfig

from sparsecut.profiling.counting import PlanCost, count_plan


@functools.cache
def get_tiny_configs():
    """Configurations of the tiny encoder and of the tiny language model."""
    return tiny_vision().config, tiny_language().config


def count_tiny(plan, **options) -> PlanCost:
    """Cost of a plan between the tiny backbones."""
    return _count_tiny(json.dumps(plan), tuple(options.items()))


@functools.cache
def _count_tiny(plan: str, options: tuple) -> PlanCost:
    return count_plan(*get_tiny_configs(), json.loads(plan), **dict(options))


def flops_per_token(config: LlamaConfig) -> int:
    """FLOPs of a token in all layers of a Llama: two a weight of projections and feed-forward."""
    projections = 4 * config.hidden_size**2
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * 2 * (projections + feed_forward)


def attention_flops(config: LlamaConfig, num_tokens: int) -> int:
    """Both products of attention over a prompt in all layers, every position with every other."""
    return config.num_hidden_layers * 4 * num_tokens**2 * config.hidden_size


def check_closed_form(cost: PlanCost, config: LlamaConfig) -> None:
    """Assert that a Llama without grouped heads costs what its sizes say."""
    num_tokens = cost.num_prompt_tokens
    head = 2 * config.hidden_size * config.vocab_size
    prefill = num_tokens * flops_per_token(config) + attention_flops(config, num_tokens) + head
    assert abs(cost.language_prefill_flops / prefill - 1) < 0.01
    new_attention = config.num_hidden_layers * 4 * (num_tokens + 1) * config.hidden_size
    new_token = flops_per_token(config) + new_attention + head
    assert abs(cost.language_per_new_token_flops / new_token - 1) < 0.01
    values_per_token = config.num_hidden_layers * 2 * config.hidden_size
    assert cost.kv_cache_bytes == num_tokens * values_per_token * 2
    assert cost.weight_bytes == 2 * cost.num_total_parameters


# The survey's arithmetic by hand for an image and 64 text tokens, at the sizes of CLIP-L/336 and a
# 7B Llama, in TFLOP. Beside it, what it has that ours has not: newline tokens, and fusions that the
# released 7B code computes and throws away.
BY_HAND = {
    "llava": (8.80, 0, 0),
    "hires_tokens": (43.1, 48, 0),
    "official_7b_as_run": (10.7, 0, 2),
    "dense_connector_sti": (10.7, 0, 0),
    "deepstack": (10.4, 0, 0),
    "lsf_internal_direct": (8.88, 0, 0),
}


def check_by_hand(cost: PlanCost, method: str, config: LlamaConfig) -> None:
    """Assert that a method's cost is that of the arithmetic by hand.

    By hand, the encoder's last block runs too, attention is halved for the causal mask, and the
    head is left out.
    """
    total, num_newlines, num_thrown_away = BY_HAND[method]
    num_tokens = cost.num_prompt_tokens + num_newlines
    encoder = (cost.encoder_coarse_flops + cost.encoder_fine_flops) * 24 / 23
    fusion = cost.fusion_flops * (1 + num_thrown_away / 7)
    language = num_tokens * flops_per_token(config) + attention_flops(config, num_tokens) / 2
    assert abs((encoder + fusion + language) / (total * 1e12) - 1) < 0.006
    assert abs(cost.prefill_total_flops / (total * 1e12) - 1) < 0.04
