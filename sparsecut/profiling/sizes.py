"""Configurations of well-known models, so that costs are counted without files or the hub."""

from __future__ import annotations

import copy

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, SiglipVisionConfig

from ..building import SHAPES, resolve
from ..config.places import check_size_place
from ..loading import load_pretrained

# Sizes by the names that the command `cost` takes. The language models are Vicuna's.
REFERENCE = {
    "vision": {
        "clip-l-336": CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        # 378 of its 384 pixels: 27 x 27 whole patches, which is what its encoder reads of them
        "siglip-so400m-384": SiglipVisionConfig(
            hidden_size=1152,
            intermediate_size=4304,
            num_hidden_layers=27,
            num_attention_heads=16,
            image_size=378,
            patch_size=14,
        ),
    },
    "language": {
        "llama-7b": LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
        ),
        "llama-13b": LlamaConfig(
            hidden_size=5120,
            intermediate_size=13824,
            num_hidden_layers=40,
            num_attention_heads=40,
        ),
    },
}
# Models that the recipes that ship with the package name, by hub name.
PUBLISHED_CONFIGS = {
    "openai/clip-vit-large-patch14-336": REFERENCE["vision"]["clip-l-336"],
    "lmsys/vicuna-7b-v1.5": REFERENCE["language"]["llama-7b"],
    "lmsys/vicuna-13b-v1.5": REFERENCE["language"]["llama-13b"],
    "google/siglip-base-patch16-256": SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=256,
        patch_size=16,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}
# Pretrained VLMs by hub name, with the encoder and the language model that they consist of.
PUBLISHED_BASES = {
    "llava-hf/llava-1.5-7b-hf": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
}


def read_backbone_config(source: str, part: str):
    """Read the configuration of an encoder or of a language model.

    Args:
        source: A name of `REFERENCE`, "shapes", a folder, or a hub name.
        part: "vision" or "language".

    Returns:
        A configuration of transformers, which the caller may change.

    Raises:
        UserError: If there is none.
    """
    if source in REFERENCE[part]:
        return copy.deepcopy(REFERENCE[part][source])
    names = [*REFERENCE[part], SHAPES]
    message = (
        f"the {part} model {source!r} is neither a known size nor a folder or hub name that"
        f" can be read; known sizes are {', '.join(names)}"
    )
    check_size_place(source, part)  # a typing error asks no hub
    folder = resolve(source, part)
    config = load_pretrained(AutoConfig, folder, message)
    return getattr(config, f"{part}_config", config)
