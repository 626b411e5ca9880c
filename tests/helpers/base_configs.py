"""Configurations of a tiny model of every family of pretrained VLMs that can be upgraded.

The encoder has width 16 and four blocks, the language model width 32 and four layers.
"""

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
NO_REST = {**QWEN, "num_position_embeddings": 16}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
GLM_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": 59,
    "video_end_token_id": 58,
}
GLM_VISION = {**QWEN, "image_size": 16}
GLM_TEXT = {**TEXT, "rope_parameters": {**ROPE["rope_parameters"], "partial_rotary_factor": 1.0}}
PIXTRAL = {
    "model_type": "pixtral",
    **SIZES,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 4,
}
JANUS_IMAGES = {  # the part that draws images, which is not used
    "embed_dim": 4,
    "num_embeddings": 16,
    "latent_channels": 8,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 4,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
}


def text(kind: str, **settings) -> dict:
    """Settings of a tiny language model."""
    return {"model_type": kind, **TEXT, **settings}


COMMON = {"image_token_id": IMAGE}
LLAMA, QWEN2, QWEN3 = text("llama"), text("qwen2"), text("qwen3")
SHUFFLED = {**COMMON, "text_config": LLAMA, "scale_factor": 2}

CONFIGS = {
    "llava": lambda: hf.LlavaConfig(vision_config=CLIP, text_config=LLAMA, **COMMON),
    "vipllava": lambda: hf.VipLlavaConfig(
        vision_config=CLIP, text_config=LLAMA, vision_feature_layers=[-2, -3], **COMMON
    ),
    "paligemma": lambda: hf.PaliGemmaConfig(
        vision_config={**SIGLIP, "projection_dim": 32},
        text_config=text("gemma"),
        projection_dim=32,
        **COMMON,
    ),
    "gemma3": lambda: hf.Gemma3Config(
        vision_config=SIGLIP,
        text_config=text("gemma3_text", query_pre_attn_scalar=8),
        mm_tokens_per_image=4,
        **COMMON,
    ),
    "llava_next": lambda: hf.LlavaNextConfig(
        vision_config=CLIP, text_config=LLAMA, **TILES, **COMMON
    ),
    "llava_onevision": lambda: hf.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=QWEN2,
        vision_feature_select_strategy="full",
        video_token_id=VIDEO,
        **TILES,
        **COMMON,
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
        **COMMON,
    ),
    "idefics3": lambda: hf.Idefics3Config(
        vision_config={**SIGLIP, "model_type": "idefics3_vision"}, **SHUFFLED
    ),
    "smolvlm": lambda: hf.SmolVLMConfig(
        vision_config={**SIGLIP, "model_type": "smolvlm_vision"}, **SHUFFLED
    ),
    "internvl": lambda: hf.InternVLConfig(
        vision_config={
            **CLIP,
            "model_type": "internvl_vision",
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        text_config=QWEN2,
        **COMMON,
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
    "qwen3_vl_moe": lambda: hf.Qwen3VLMoeConfig(
        vision_config={**NO_REST, "deepstack_visual_indexes": [1, 2]},
        text_config={**TEXT, **ROPE, **EXPERTS, "num_experts": 4},
        **IDS,
    ),
    "qwen3_5": lambda: hf.Qwen3_5Config(
        vision_config=NO_REST, text_config={**TEXT, **ROPE, **LINEAR}, **IDS
    ),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeConfig(
        vision_config=NO_REST,
        text_config={
            **TEXT,
            **ROPE,
            **LINEAR,
            **EXPERTS,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
        },
        **IDS,
    ),
    "glm4v": lambda: hf.Glm4vConfig(vision_config=GLM_VISION, text_config=GLM_TEXT, **GLM_IDS),
    "glm46v": lambda: hf.Glm46VConfig(
        vision_config={"model_type": "glm4v_vision", **GLM_VISION},
        text_config={"model_type": "glm4v_text", **GLM_TEXT},
        **GLM_IDS,
    ),
    "glm4v_moe": lambda: hf.Glm4vMoeConfig(
        vision_config=GLM_VISION,
        text_config={**GLM_TEXT, **EXPERTS, "n_routed_experts": 4},
        **GLM_IDS,
    ),
    "glm_ocr": lambda: hf.GlmOcrConfig(vision_config=GLM_VISION, text_config=GLM_TEXT, **GLM_IDS),
    "lfm2_vl": lambda: hf.Lfm2VlConfig(
        vision_config={
            "model_type": "siglip2_vision_model",
            **SIZES,
            "patch_size": 4,
            "num_patches": 16,
            "vision_use_head": False,
        },
        text_config=text("lfm2", layer_types=["conv", "full_attention"] * 2),
        projector_hidden_size=32,
        **COMMON,
    ),
    "lfm3_vl": lambda: hf.Lfm3VlConfig(
        vision_config={
            **SIZES,
            "num_key_value_heads": 2,
            "patch_size": 4,
            "layer_types": ["conv", "full_attention"] * 2,
        },
        text_config=text("lfm3"),
        projector_hidden_size=32,
        **IDS,
    ),
    "paddleocr_vl": lambda: hf.PaddleOCRVLConfig(
        vision_config={**SIZES, "image_size": 16, "patch_size": 4},
        text_config={**TEXT, **ROPE},
        **IDS,
    ),
    "video_llama_3": lambda: hf.VideoLlama3Config(
        vision_config={**SIZES, "patch_size": 4},
        text_config=QWEN2,
        video_token_id=VIDEO,
        **COMMON,
    ),
    "aya_vision": lambda: hf.AyaVisionConfig(
        vision_config=SIGLIP,
        text_config=text("cohere2"),
        image_token_index=IMAGE,
        alignment_intermediate_size=32,
    ),
    "cohere2_vision": lambda: hf.Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config=text("cohere2"),
        alignment_intermediate_size=32,
        **COMMON,
    ),
    "ovis2": lambda: hf.Ovis2Config(
        vision_config={
            **SIZES,
            "image_size": 16,
            "patch_size": 4,
            "vocab_size": 40,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 5,
        },
        text_config=QWEN2,
        visual_indicator_token_ids=[50, 51, 52, 53, 54],
        vocab_size=64,
        hidden_size=32,
        **COMMON,
    ),
    "qianfan_ocr": lambda: hf.QianfanOCRConfig(
        vision_config={**SIZES, "image_size": [16, 16], "patch_size": [4, 4]},
        text_config=QWEN3,
        **COMMON,
    ),
    "llava_next_video": lambda: hf.LlavaNextVideoConfig(
        vision_config=CLIP,
        text_config=LLAMA,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        **TILES,
    ),
    "lighton_ocr": lambda: hf.LightOnOcrConfig(vision_config=PIXTRAL, text_config=QWEN3, **COMMON),
    "deepseek_vl": lambda: hf.DeepseekVLConfig(vision_config=SIGLIP, text_config=LLAMA, **COMMON),
    "janus": lambda: hf.JanusConfig(
        vision_config={
            **SIZES,
            "image_size": 16,
            "patch_size": 4,
            "projection_dim": 32,
            "num_image_tokens": 16,
        },
        text_config=LLAMA,
        vq_config=JANUS_IMAGES,
        **COMMON,
    ),
}
