"""Tiny random vision-language models of every family that can be upgraded, and inputs for them,
made on the spot.

Widths are 16 and 32, four blocks and four layers. Inputs are what the families' processors would give for two prompts that differ
in length, padded on the left, the pictures differing in size where a family allows that.
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


def text(kind: str, **more) -> dict:
    return {"model_type": kind, **TEXT, **more}


def config(name: str):
    """The configuration of a tiny model."""
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


NAMES = (
    *("llava", "vipllava", "paligemma", "gemma3", "llava_next", "llava_onevision", "mistral3"),
    *("idefics3", "smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)


def base_of(name: str):
    """A tiny random model of a family, in evaluation mode, which never says the placeholders."""
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config(name)).eval().float()
    if name == "gemma3":  # starts at zero, which would hide every picture
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    model.generation_config.suppress_tokens = [IMAGE, VIDEO]
    return model


def pictures(name: str) -> list[dict]:
    """What the encoder is given for each of two prompts: one picture, or two in the second prompt
    of some families.
    """
    draw = torch.Generator().manual_seed(1)

    def views(*shape):
        return torch.randn(*shape, generator=draw)

    if name.startswith("qwen"):
        grids = [[1, 8, 12], [1, 4, 4]]
        return [
            {"pixel_values": views(h * w, 96), "image_grid_thw": torch.tensor([[1, h, w]])}
            for _, h, w in grids
        ]
    if name in ("llava_next", "llava_onevision"):
        sizes, most = [[30, 20], [12, 32]], 5
        return [
            {"pixel_values": views(1, most, 3, 16, 16), "image_sizes": torch.tensor([size])}
            for size in sizes
        ]
    if name == "mistral3":
        sizes = [[32, 16], [16, 24]]
        return [
            {"pixel_values": views(1, 3, 32, 32), "image_sizes": torch.tensor([size])}
            for size in sizes
        ]
    if name in ("idefics3", "smolvlm"):
        first = torch.cat(
            [views(1, 1, 3, 16, 16), torch.zeros(1, 1, 3, 16, 16)], 1
        )  # padded to the other's two
        return [{"pixel_values": first}, {"pixel_values": views(1, 2, 3, 16, 16)}]
    return [{"pixel_values": views(1, 3, 16, 16)}, {"pixel_values": views(2, 3, 16, 16)}]


def inputs_of(name: str, model, rows: list[dict]) -> dict:
    """Model inputs for prompts with these pictures, padded on the left to the longest."""
    counts = [num_tokens(model, row) for row in rows]
    length = max(counts) + 6
    ids, mask = torch.full((len(rows), length), 5), torch.ones(len(rows), length, dtype=torch.long)
    for row, count in enumerate(counts):
        pad = max(counts) - count
        ids[row, :pad] = mask[row, :pad] = 0
        ids[row, pad + 1] = START
        ids[row, pad + 2 : pad + 2 + count] = IMAGE
        ids[row, -2] = 7 + count % 3
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    if name.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    if name in ("paligemma", "gemma3"):
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def num_tokens(model, row: dict) -> int:
    """Image tokens that a prompt's pictures take."""
    with torch.no_grad():
        pooled = model.get_image_features(**row).pooler_output
    return sum(part.shape[0] if part.dim() > 1 else 1 for part in pooled)


def fine_of(model, inputs: dict) -> dict:
    """Finer views of the inputs' pictures, where an upgraded model reads them."""
    if not model.plan.tiles:
        return {}
    draw = torch.Generator().manual_seed(2)
    pixels = inputs["pixel_values"]
    views = torch.randn(len(pixels), model.plan.tiles**2, *pixels.shape[1:], generator=draw)
    return {"fine_pixel_values": views}


WITH_VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def with_video(name: str, inputs: dict) -> dict:
    """The same prompts, each with a video of two frames of 4 x 4 patches before its last two
    tokens.
    """
    draw = torch.Generator().manual_seed(6)
    frame = [START, *[VIDEO] * 4, END]
    video = {
        "llava_onevision": (
            [VIDEO] * 9
        ),  # each frame is pooled to 2 x 2, and a newline ends the whole
        "qwen3_vl": frame + frame,
    }.get(name, [START, *[VIDEO] * 8, END])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids = torch.cat([ids[:, :-2], torch.tensor([video]).expand(len(ids), -1), ids[:, -2:]], dim=1)
    grown = inputs | {
        "input_ids": ids,
        "attention_mask": torch.cat([mask, torch.ones(len(ids), len(video)).to(mask)], 1),
    }
    if name == "llava_onevision":
        return grown | {"pixel_values_videos": torch.randn(len(ids), 2, 3, 16, 16, generator=draw)}
    kinds = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    grid = torch.tensor([[2, 4, 4]] * len(ids))
    pixels = torch.randn(len(ids) * 32, 96, generator=draw)
    return grown | {
        "mm_token_type_ids": kinds,
        "pixel_values_videos": pixels,
        "video_grid_thw": grid,
    }
