"""Tiny random pretrained VLMs of every family that can be upgraded, and inputs for them.

The encoder has width 16 and four blocks, the language model width 32 and four layers. The inputs
are what a family's processor would return for two prompts of different lengths, padded on the left.
The images differ in size where a family allows it.
"""

import torch
import transformers as hf

IMAGE, VIDEO, START, END = 63, 62, 61, 60
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}
CLIP = {"model_type": "clip_vision_model", **SIZES, "image_size": 16, "patch_size": 4}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
TILES = {"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
PACKED = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 32, **PACKED}

FAMILY_NAMES = (
    "llava",
    "vipllava",
    "paligemma",
    "gemma3",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "idefics3",
    "smolvlm",
    "internvl",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
# One family per way from patches to image tokens: one view, tiles, pixel shuffle, merged patches.
# The others run in tests/conformance.
DEFAULT_FAMILIES = ("llava", "llava_next", "idefics3", "qwen2_5_vl")
OTHER_FAMILIES = tuple(name for name in FAMILY_NAMES if name not in DEFAULT_FAMILIES)
VIDEO_FAMILIES = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def text(kind: str, **settings) -> dict:
    """Settings of a tiny language model."""
    return {"model_type": kind, **TEXT, **settings}


def base_config(name: str):
    """Configuration of a tiny model of a family."""
    common = {"image_token_id": IMAGE}
    llama, qwen2 = text("llama"), text("qwen2")
    shuffled = {**common, "text_config": llama, "scale_factor": 2}
    return {
        "llava": lambda: hf.LlavaConfig(vision_config=CLIP, text_config=llama, **common),
        "vipllava": lambda: hf.VipLlavaConfig(
            vision_config=CLIP, text_config=llama, vision_feature_layers=[-2, -3], **common
        ),
        "paligemma": lambda: hf.PaliGemmaConfig(
            vision_config={**SIGLIP, "projection_dim": 32},
            text_config=text("gemma"),
            projection_dim=32,
            **common,
        ),
        "gemma3": lambda: hf.Gemma3Config(
            vision_config=SIGLIP,
            text_config=text("gemma3_text", query_pre_attn_scalar=8),
            mm_tokens_per_image=4,
            **common,
        ),
        "llava_next": lambda: hf.LlavaNextConfig(
            vision_config=CLIP, text_config=llama, **TILES, **common
        ),
        "llava_onevision": lambda: hf.LlavaOnevisionConfig(
            vision_config=SIGLIP,
            text_config=qwen2,
            vision_feature_select_strategy="full",
            video_token_id=VIDEO,
            **TILES,
            **common,
        ),
        "mistral3": lambda: hf.Mistral3Config(
            vision_config={
                "model_type": "pixtral",
                **SIZES,
                "head_dim": 8,
                "image_size": 32,
                "patch_size": 4,
            },
            text_config=text("mistral"),
            spatial_merge_size=2,
            **common,
        ),
        "idefics3": lambda: hf.Idefics3Config(
            vision_config={**SIGLIP, "model_type": "idefics3_vision"}, **shuffled
        ),
        "smolvlm": lambda: hf.SmolVLMConfig(
            vision_config={**SIGLIP, "model_type": "smolvlm_vision"}, **shuffled
        ),
        "internvl": lambda: hf.InternVLConfig(
            vision_config={
                **CLIP,
                "model_type": "internvl_vision",
                "image_size": [16, 16],
                "patch_size": [4, 4],
            },
            text_config=qwen2,
            **common,
        ),
        "qwen2_vl": lambda: hf.Qwen2VLConfig(
            vision_config={"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2, **PACKED},
            text_config={**TEXT, **ROPE},
            **IDS,
        ),
        "qwen2_5_vl": lambda: hf.Qwen2_5_VLConfig(
            vision_config={**QWEN, "window_size": 16, "fullatt_block_indexes": [1, 3]},
            text_config={**TEXT, **ROPE},
            **IDS,
        ),
        "qwen3_vl": lambda: hf.Qwen3VLConfig(
            vision_config={
                **QWEN,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [1, 2],
            },
            text_config={**TEXT, **ROPE},
            **IDS,
        ),
    }[name]()


def build_base(name: str):
    """A tiny random model of a family, in evaluation mode, which never generates placeholders."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(base_config(name)).eval().float()
    if name == "gemma3":  # starts at zero, which would hide every image
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def build_images(name: str) -> list[dict]:
    """Encoder inputs of each of two prompts: one image each, or two images in the second prompt."""
    generator = torch.Generator().manual_seed(1)

    def pixels(*shape):
        return torch.randn(*shape, generator=generator)

    if name.startswith("qwen"):
        grids = [(8, 12), (4, 4)]
        return [
            {"pixel_values": pixels(h * w, 96), "image_grid_thw": torch.tensor([[1, h, w]])}
            for h, w in grids
        ]
    if name in ("llava_next", "llava_onevision"):
        most_views = 5
        return [
            {"pixel_values": pixels(1, most_views, 3, 16, 16), "image_sizes": torch.tensor([size])}
            for size in ([30, 20], [12, 32])
        ]
    if name == "mistral3":
        return [
            {"pixel_values": pixels(1, 3, 32, 32), "image_sizes": torch.tensor([size])}
            for size in ([32, 16], [16, 24])
        ]
    if name in ("idefics3", "smolvlm"):
        padding = torch.zeros(1, 1, 3, 16, 16)  # the second prompt has two views
        first = torch.cat([pixels(1, 1, 3, 16, 16), padding], dim=1)
        return [{"pixel_values": first}, {"pixel_values": pixels(1, 2, 3, 16, 16)}]
    return [{"pixel_values": pixels(1, 3, 16, 16)}, {"pixel_values": pixels(2, 3, 16, 16)}]


def build_inputs(name: str, model, rows: list[dict] | None = None) -> dict:
    """Model inputs of prompts with these images (by default `build_images`), padded on the left."""
    rows = build_images(name) if rows is None else rows
    counts = [count_image_tokens(model, row) for row in rows]
    length = max(counts) + 6
    ids = torch.full((len(rows), length), 5)
    mask = torch.ones(len(rows), length, dtype=torch.long)
    for row, count in enumerate(counts):
        pad = max(counts) - count
        ids[row, :pad] = mask[row, :pad] = 0
        ids[row, pad + 1] = START
        ids[row, pad + 2 : pad + 2 + count] = IMAGE
        ids[row, -2] = 7 + count % 3
    inputs = {"input_ids": ids, "attention_mask": mask}
    for key in rows[0]:
        inputs[key] = torch.cat([row[key] for row in rows])
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if name in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


@torch.no_grad()
def count_image_tokens(model, row: dict) -> int:
    """Number of image tokens that a prompt's images take."""
    features = model.get_image_features(**row).pooler_output
    return sum(image.shape[0] if image.dim() > 1 else 1 for image in features)


def build_fine_views(model, inputs: dict) -> dict:
    """Finer views of the images, where an upgraded model reads them."""
    if not model.plan.tiles:
        return {}
    generator = torch.Generator().manual_seed(2)
    pixels = inputs["pixel_values"]
    shape = (len(pixels), model.plan.tiles**2, *pixels.shape[1:])
    return {"fine_pixel_values": torch.randn(shape, generator=generator)}


def add_video(name: str, inputs: dict) -> dict:
    """Add a video to each prompt before its last two tokens: two frames of 4 x 4 patches."""
    generator = torch.Generator().manual_seed(6)
    frame = [START, *[VIDEO] * 4, END]
    video = {
        # each frame is pooled to 2 x 2, and a newline ends the whole
        "llava_onevision": [VIDEO] * 9,
        "qwen3_vl": frame + frame,
    }.get(name, [START, *[VIDEO] * 8, END])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    rows = len(ids)
    ids = torch.cat([ids[:, :-2], torch.tensor([video]).expand(rows, -1), ids[:, -2:]], dim=1)
    mask = torch.cat([mask, torch.ones(rows, len(video)).to(mask)], dim=1)
    longer = inputs | {"input_ids": ids, "attention_mask": mask}
    if name == "llava_onevision":
        frames = torch.randn(rows, 2, 3, 16, 16, generator=generator)
        return longer | {"pixel_values_videos": frames}
    return longer | {
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
        "pixel_values_videos": torch.randn(rows * 32, 96, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * rows),
    }


def randomize_fusion(model):
    """Give the fusion weights that have an effect; returns the model."""
    torch.manual_seed(1)
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model
