"""Tiny upgraded models that vLLM can run, with their bases' own processors.

Processors with videos need torchvision, which vLLM on CPUs has not; here they are made without.
"""

import re
import sys
from importlib.util import find_spec

import torch
import transformers
from helpers.tiny import tiny_tokenizer
from helpers.vllm_models import generate_answer
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.pixtral import image_processing_pil_pixtral
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
    facts = {"image_token_id": image, "video_token_id": video}
    facts |= {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    processor_class = replace_processor(name, **facts)
    return config, processor_class(image_processor, tokenizer), QWEN_IMAGE


def make_qwen2_5_vl():
    windows = {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    return make_qwen("Qwen2_5_VLProcessor", transformers.Qwen2_5_VLConfig, **windows)


def make_qwen3_vl():
    deepstack = {"num_position_embeddings": 16, "deepstack_visual_indexes": [1, 3]}
    return make_qwen("Qwen3VLProcessor", transformers.Qwen3VLConfig, **deepstack)


def make_qwen2_vl():
    """Its blocks have another width than its tokens."""
    vision = {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 2}
    return make_qwen("Qwen2VLProcessor", transformers.Qwen2VLConfig, **vision)


def make_vipllava():
    """LLaVA with features of several layers."""
    config, processor, image = make_llava()
    vip = transformers.VipLlavaConfig(
        vision_config=CLIP,
        text_config=config.text_config.to_dict(),
        vision_feature_layers=[-2, -3],
        image_token_id=config.image_token_id,
        image_seq_length=16,
    )
    return vip, processor, image


def make_llava_next():
    """With crops of one to four views."""
    tokenizer = make_tokenizer("<image>")
    grids = [[32, 64], [64, 32], [64, 64]]
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config=make_text_config(tokenizer, model_type="llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=grids,
    )
    settings = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, LlavaNextProcessor(images, tokenizer, patch_size=8, **settings), "<image>"


def make_idefics3():
    """With crops and rows of them, which the prompt names."""
    tokenizer = tiny_tokenizer()
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": SIZE}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    config = transformers.Idefics3Config(
        vision_config={**CLIP, "model_type": "idefics3_vision"},
        text_config=make_text_config(tokenizer, model_type="llama"),
        scale_factor=2,
        image_token_id=processor.image_token_id,
    )
    return config, processor, "<image>"


def make_mistral3():
    """With rows of image tokens that end in other tokens."""
    tokenizer = make_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    images = image_processing_pil_pixtral.PixtralImageProcessorPil(
        size={"longest_edge": 48}, patch_size=8
    )
    processor = find_pixtral_processor()(images, tokenizer, patch_size=4, spatial_merge_size=2)
    config = transformers.Mistral3Config(
        vision_config={
            **SIZES,
            "model_type": "pixtral",
            "head_dim": 16,
            "image_size": 64,
            "patch_size": 4,
        },
        text_config=make_text_config(tokenizer, model_type="mistral", head_dim=32),
        spatial_merge_size=2,
        image_token_id=processor.image_token_id,
    )
    return config, processor, "[IMG]"


def make_internvl():
    """With crops of one to four views, of windows of 2 x 2 patches."""
    marks = {"start_image_token": "<img>", "end_image_token": "</img>"}
    tokens = {**marks, "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer = make_tokenizer(*tokens.values())
    facts = {**tokens}
    for name, token in tokens.items():
        facts[f"{name}_id"] = tokenizer.convert_tokens_to_ids(token)
    facts |= {"image_token": "<IMG_CONTEXT>", "image_token_id": facts["context_image_token_id"]}
    pattern = re.compile("(?P<image><IMG_CONTEXT>)|(?P<video><video>)")
    facts |= {"image_seq_length": 4, "multimodal_pattern": pattern}
    side = {"height": SIZE, "width": SIZE}
    images = GotOcr2ImageProcessorPil(size=side, crop_to_patches=True, max_patches=4)
    config = transformers.InternVLConfig(
        vision_config={
            **SIZES,
            "model_type": "internvl_vision",
            "image_size": [SIZE, SIZE],
            "patch_size": [8, 8],
        },
        text_config=make_text_config(tokenizer, model_type="qwen2"),
        image_token_id=facts["image_token_id"],
        image_seq_length=4,
    )
    processor = replace_processor("InternVLProcessor", **facts)(images, tokenizer)
    return config, processor, "<IMG_CONTEXT>"


BASES = {
    "llava": make_llava,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "vipllava": make_vipllava,
    "llava_next": make_llava_next,
    "idefics3": make_idefics3,
    "mistral3": make_mistral3,
    "internvl": make_internvl,
    "qwen2_vl": make_qwen2_vl,
}
DEFAULT_BASES = ("llava", "qwen2_5_vl", "qwen3_vl")  # the others run in tests/conformance


def replace_processor(name: str, **facts) -> type:
    """Put a class without videos in the place of a processor class of transformers.

    Args:
        name: The class.
        **facts: What the class itself would read from its tokenizer and its settings.
    """
    original = getattr(transformers, name)
    original = getattr(original, "original", original)

    def start(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        vars(self).update(facts)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return put_in_place(type(name, (original,), {"__init__": start, "original": original}))


def find_pixtral_processor() -> type:
    """Pixtral's processor; its module imports torchvision for a function that needs none."""
    if find_spec("torchvision") is None:
        name = "transformers.models.pixtral.image_processing_pixtral"
        sys.modules.setdefault(name, image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    return put_in_place(PixtralProcessor)


def put_in_place(processor_class: type) -> type:
    """Let transformers find a class under its name."""
    for module in {transformers, sys.modules["transformers"]}:  # it replaces itself at import
        setattr(module, processor_class.__name__, processor_class)
    return processor_class


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
