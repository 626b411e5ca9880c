"""Which of vLLM's own decoders computes a language model, and before which layers features come."""

from __future__ import annotations

import copy
from typing import Any

# Decoders of pretrained VLMs for which transformers has no class with a head alone.
OF_VLMS = {
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "qwen3_vl_moe_text": "Qwen3MoeForCausalLM",
}
INTERLEAVED = ("qwen3_vl_text", "qwen3_vl_moe_text")  # always so, whatever their files say


def get_decoder_class(text_config: Any) -> str:
    """The name of the class with a head that a language model's configuration leads to."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if text_config.model_type in OF_VLMS:
        return OF_VLMS[text_config.model_type]
    if type(text_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return text_config.model_type
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)].__name__


def list_layers(config: Any) -> tuple[int, ...]:
    """Decoder layers before which features are added, ascending.

    They are those of the plan, and those to which the base of an upgraded model itself adds.

    Args:
        config: The model's configuration.
    """
    plan = config.get_plan()
    if not plan.has_base_input:
        return plan.layers
    own = getattr(config.vision_config, "deepstack_visual_indexes", None) or ()
    return tuple(sorted({*plan.fused_layers, *range(1, 1 + len(own))}))


def prepare_decoder(config: Any) -> Any:
    """The configuration of a model's decoder as vLLM reads it.

    Args:
        config: The model's configuration. vLLM copies `tie_word_embeddings` from it.
    """
    owner = getattr(config, "base_config", config.text_config)
    config.tie_word_embeddings = owner.tie_word_embeddings
    text_config = copy.deepcopy(config.text_config)
    if text_config.model_type in INTERLEAVED:
        text_config.rope_parameters["mrope_interleaved"] = True
    return text_config
