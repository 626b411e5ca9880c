"""Tiny upgraded models that vLLM can run, with their bases' own processors.

Processors with videos need torchvision, which vLLM on CPUs has not; here they are made without.
"""

import sys

import torch
import transformers
from helpers.tiny import tiny_tokenizer
from helpers.vllm_models import generate_answer
from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from sparsecut import upgrade

SIZE = 32  # pixels of a view's side
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
}
CLIP = {"model_type": "clip_vision_model", **SIZES, "image_size": SIZE, "patch_size": 8}
WIDTH = 128  # with heads of 32, which vLLM's attention on CPUs knows
QWEN_VISION = {
    "depth": 6,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": WIDTH,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def make_text_config(tokenizer, **settings) -> dict:
    """Settings of a language model whose answers differ."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.3,
        **settings,
    }


def make_tokenizer(*tokens: str):
    """A word-level tokenizer with further special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


def make_clip_processor():
    """Views of 32 x 32 pixels."""
    side = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size=side, crop_size=side)


def make_llava():
    """(config, processor, how an image is written)."""
    tokenizer = make_tokenizer("<image>")
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config=make_text_config(tokenizer, model_type="llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    processor = LlavaProcessor(
        make_clip_processor(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return config, processor, "<image>"


def make_qwen(name: str, config_class, **vision):
    """(config, processor, how an image is written) of a Qwen-VL."""
    tokenizer = make_tokenizer(*QWEN_TOKENS)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS))
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    config = config_class(
        vision_config={**QWEN_VISION, **vision},
        text_config=make_text_config(tokenizer, rope_parameters=rope, head_dim=32),
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
    )
    size = {"shortest_edge": 256, "longest_edge": 4096}
    image_processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=size)
    processor_class = replace_processor(name)
    return config, processor_class(image_processor, tokenizer), QWEN_IMAGE


def make_qwen2_5_vl():
    windows = {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    return make_qwen("Qwen2_5_VLProcessor", transformers.Qwen2_5_VLConfig, **windows)


def make_qwen3_vl():
    deepstack = {"num_position_embeddings": 16, "deepstack_visual_indexes": [1, 3]}
    return make_qwen("Qwen3VLProcessor", transformers.Qwen3VLConfig, **deepstack)


BASES = {"llava": make_llava, "qwen2_5_vl": make_qwen2_5_vl, "qwen3_vl": make_qwen3_vl}


def replace_processor(name: str) -> type:
    """Put a class without videos in the place of a processor class of transformers."""
    original = getattr(transformers, name)
    if getattr(original, "is_without_videos", False):
        return original

    def start(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        for token in ("image", "video"):
            setattr(self, f"{token}_token", f"<|{token}_pad|>")
            number = tokenizer.convert_tokens_to_ids(f"<|{token}_pad|>")
            setattr(self, f"{token}_token_id", number)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    members = {
        "__init__": start,
        "is_without_videos": True,
        "model_input_names": ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"],
    }
    replaced = type(name, (original,), members)
    for module in {transformers, sys.modules["transformers"]}:  # it replaces itself at import
        setattr(module, name, replaced)
    return replaced


def make_upgraded(name: str, plan="sparsecut", *, is_trained: bool = True):
    """(model, processor, how an image is written) of a random base.

    Args:
        name: The base's family.
        plan: The plan of its shortcuts.
        is_trained: Give the shortcuts weights that change the answers.
    """
    torch.manual_seed(0)
    config, processor, image = BASES[name]()
    base = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    base.generation_config.update(bos_token_id=None)
    model, processor = upgrade(base, plan, processor=processor)
    if is_trained:
        for weight in model.fusion.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval(), processor, image


def save_upgraded(folder, *args, **kwargs):
    """Make an upgraded model and save it whole; returns what `make_upgraded` does."""
    model, processor, image = make_upgraded(*args, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, image


def generate_without_upgrade(model, processor, text: str, images=()) -> list[int]:
    """What `generate` answers with all shortcuts switched off."""
    ours = [
        number for number, shortcut in enumerate(model.plan.shortcuts) if shortcut.mix != "base"
    ]
    with model.fusion.switched_off(*ours):
        return generate_answer(model, processor, text, images)
