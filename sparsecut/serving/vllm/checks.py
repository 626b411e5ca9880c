"""What vLLM serves exactly, checked before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...configuration import SparseCutUpgradeConfig
from ...loading import is_quantized
from ...modeling_upgraded import FACTS
from ...plan import GATES
from ...schema import UserError
from .decoders import get_decoder_class, list_layers

LOCAL = "serve it with `sparsecut serve MODEL --engine local`"

# Decoders whose answers in vLLM were equal to those of `generate`, token for token;
# tests/conformance/test_vllm_families.py runs them.
NAMES = """
    Apertus Arcee Bloom Cohere Cohere2 Ernie4_5 Exaone4 Falcon Gemma Gemma2 Gemma3 Glm Glm4
    Granite GraniteMoe HunYuanDenseV1 Llama Ministral3 Mistral Mixtral Nemotron Olmo Olmo2
    Olmo3 Olmoe OPT Phi Phi3 Qwen2 Qwen3 Qwen3Moe SeedOss SmolLM3 StableLm Starcoder2
"""
FAMILIES = tuple(NAMES.split())
DECODERS = tuple(f"{family}ForCausalLM" for family in FAMILIES)


# Pretrained VLMs whose upgrades answered in vLLM as they do here; tests/conformance has them too.
BASES = (
    "llava",
    "vipllava",
    "llava_next",
    "idefics3",
    "internvl",
    "mistral3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
BOTH_WAYS = "its image tokens attend to later ones, which vLLM's decoder does not let them do"
WHY_NOT = {
    "gemma3": BOTH_WAYS,
    "paligemma": BOTH_WAYS,
    "llava_onevision": (
        "it cuts an image otherwise beside another one, but vLLM keeps each by itself"
    ),
    "smolvlm": "its processor does not say how many tokens an image of a size takes",
}


def check_servable(config: Any) -> None:
    """Check that vLLM computes what a model computes.

    Args:
        config: The model's configuration.

    Raises:
        UserError: It would compute something else, or it was never compared.
    """
    plan = config.get_plan()
    if GATES[plan.gate].module is not None:
        raise UserError(
            f"vLLM cannot serve gate={plan.gate!r}: its gates need whole images, but vLLM cuts"
            f" prompts into chunks; {LOCAL}"
        )
    if plan.needs_prompt:
        mix = next(s.mix for s in plan.shortcuts if s.mixer.needs_prompt)
        raise UserError(
            f"vLLM cannot serve mix={mix!r}: it reads the prompt, but vLLM encodes an image without"
            f" it, once for all prompts; {LOCAL}"
        )
    parts = [config, config.text_config, config.vision_config]
    if isinstance(config, SparseCutUpgradeConfig):
        _check_base(config)
        parts.append(config.base_config)
    elif config.grid.kind == "audio":
        raise UserError(
            f"vLLM serves models of images here, but this one takes audio"
            f" ({config.vision_config.model_type}); {LOCAL}"
        )
    if any(map(is_quantized, parts)):
        raise UserError(
            "the model's weights are quantized (quantization_config), which vLLM would read"
            " differently; save the model unquantized and let vLLM quantize its decoder, for"
            f" example with --quantization fp8, or {LOCAL}"
        )
    decoder = get_decoder_class(config.text_config)
    if decoder not in DECODERS:
        raise UserError(
            f"the decoder {decoder} was not found to answer in vLLM as it does here; those of"
            f" {len(DECODERS)} families were, such as LlamaForCausalLM and Qwen3ForCausalLM"
            f" (docs/serving.md lists them); {LOCAL}"
        )


def _check_base(config: SparseCutUpgradeConfig) -> None:
    """Check the base of an upgraded model."""
    model_type = config.base_config.model_type
    if model_type not in BASES:
        reason = WHY_NOT.get(model_type, "it was never compared")
        raise UserError(
            f"an upgraded {model_type} was not found to answer in vLLM as it does here ({reason});"
            f" upgrades of {', '.join(BASES)} were; {LOCAL}"
        )
    layers = list_layers(config)
    if layers and layers[-1] >= config.language_depth:
        raise UserError(
            f"the {model_type} adds image features after its last layer"
            f" (deepstack_visual_indexes names {layers[-1]} blocks, but the decoder has"
            f" {config.language_depth} layers), for which vLLM has no place here; {LOCAL}"
        )


def check_whole(model: str) -> None:
    """Check that a folder holds a whole model.

    Args:
        model: The model's folder; nothing is known of models on the hub.

    Raises:
        UserError: It holds the shortcuts of an upgraded model alone.
    """
    folder = Path(model)
    if (folder / FACTS).is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{model} holds the shortcuts alone ({FACTS}), but vLLM loads whole models; load it"
            " with sparsecut.load, write model and processor into a new folder with save_pretrained"
            f" and serve that, or {LOCAL}"
        )


def check_adapters(model: str, takes_lora: bool) -> None:
    """Check that no adapter beside a model is left out.

    Args:
        model: The model's folder; nothing is known of models on the hub.
        takes_lora: vLLM takes adapters of the language model.

    Raises:
        UserError: There is an adapter that vLLM would not use.
    """
    parts = sorted(path.parent.name for path in Path(model).glob("adapters/*/adapter_config.json"))
    if not parts or (parts == ["language"] and takes_lora):
        return
    remedy = "merge it into the model and save that"
    if parts == ["language"]:
        folder = Path(model) / "adapters" / "language"
        remedy += f", or give vLLM --enable-lora --lora-modules NAME={folder}"
    raise UserError(
        f"beside the model there is an adapter of its {' and '.join(parts)} part, which vLLM would"
        f" not use; {remedy}, or {LOCAL}"
    )
