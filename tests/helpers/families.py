"""Tiny random models of many families, for the family tests and `make grid`.

One table has them all. The lists below name the families of the default tests and of
tests/conformance; only `make grid` runs the rest.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sparsecut.encoders import make_encoder

VOCABULARY = 64
IMAGE = VOCABULARY - 1  # the placeholder
BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {"num_key_value_heads": 2}
HEAD = {"head_dim": 8}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}

LANGUAGE = {  # model_type -> settings beyond BASE
    "llama": GQA,
    "qwen2": GQA,
    "qwen3": GQA | HEAD,
    "mistral": GQA,
    "gemma": GQA | HEAD,
    "gemma2": GQA | HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": GQA | HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "phi": GQA,
    "phi3": GQA,
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "olmo2": GQA,
    "cohere": GQA,
    "granite": GQA,
    "stablelm": GQA,
    "falcon": {"alibi": False, "new_decoder_architecture": False},
    "starcoder2": GQA,
    "olmo": GQA,
    "olmo3": GQA | {"sliding_window": 8},
    "cohere2": GQA | {"sliding_window": 8},
    "glm": GQA | HEAD,
    "glm4": GQA | HEAD,
    "smollm3": GQA,
    "helium": GQA | HEAD,
    "nemotron": GQA,
    "persimmon": {},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "codegen": {"rotary_dim": 4, "n_ctx": 128},
    "gpt_bigcode": {},
    "bloom": {},
    "mpt": {"expansion_ratio": 2, "max_seq_len": 128},
    "xglm": {"ffn_dim": 48, "d_model": 32, "attention_heads": 4, "num_layers": 4},
    "biogpt": {},
    "mixtral": GQA | {"num_local_experts": 4},
    "qwen2_moe": GQA | MOE | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": GQA | HEAD | MOE,
    "olmoe": GQA | {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": GQA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": GQA | HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": LATENT,
    "ernie4_5": GQA | HEAD,
    "exaone4": GQA | HEAD | {"sliding_window": 8},
    "seed_oss": GQA | HEAD,
    "hunyuan_v1_dense": GQA | HEAD,
    "arcee": GQA,
    "apertus": GQA,
    "ministral": GQA | HEAD,
    "bitnet": GQA,
    "lfm2": GQA | {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen3_next": (
        GQA
        | HEAD
        | MOE
        | {
            "layer_types": [
                "linear_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
            ]
        }
    ),
    "jamba": (
        GQA
        | {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        }
    ),
    "falcon_h1": (
        GQA | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    ),
    "bamba": (
        GQA
        | {
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "attn_layer_indices": [1, 3],
        }
    ),
    "recurrent_gemma": (
        GQA
        | {
            "lru_width": 32,
            "attention_window_size": 64,
            "block_types": ["recurrent", "attention"],
        }
    ),
    "olmo_hybrid": GQA,
    "qwen3_5_text": (
        GQA
        | HEAD
        | {
            "layer_types": [
                "linear_attention",
                "linear_attention",
                "linear_attention",
                "full_attention",
            ]
        }
    ),
    "phimoe": GQA | {"num_local_experts": 2},
    "flex_olmo": GQA | {"num_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 2},
    "llama4_text": GQA | HEAD | {"num_local_experts": 2},
    "deepseek_v2": LATENT,
    "diffllama": GQA,
    "doge": GQA,
    "nanochat": GQA,
    "vaultgemma": GQA | HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "modernbert-decoder": {},
    "ctrl": {},
    "zamba2": {
        "mamba_ngroups": 1,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "hybrid_layer_ids": [1, 3],
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "num_mem_blocks": 1,
    },
    "minimax": GQA | HEAD | {"num_local_experts": 2},
    "gemma4_text": GQA | HEAD,
    "bert": {},
    "rwkv": {},
    "xlstm": {},
    "mamba": {},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "bart": {
        "d_model": 32,
        "decoder_layers": 4,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
    },
    "t5": {},
}

VISION_BASE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
SAM = {
    "window_size": 1,
    "global_attn_indexes": [1],
    "output_channels": 8,
    "num_pos_feats": 4,
    "initializer_range": 0.02,
}
STAGES = {  # 4 blocks in 3 stages
    "image_size": 32,
    "depths": [1, 2, 1],
    "hidden_sizes": [8, 16, 24],
}
WINDOWS = STAGES | {"embed_dim": 8, "num_heads": [1, 2, 2], "window_size": 2, "patch_size": 4}
PYRAMID = STAGES | {
    "num_encoder_blocks": 3,
    "strides": [4, 2, 2],
    "num_attention_heads": [1, 2, 2],
    "mlp_ratios": [2, 2, 2],
}
DEEPSTACK = {"deepstack_visual_indexes": [1]}
VISION = {
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "vit": {},
    "dinov2": {},
    "dinov2_with_registers": {"num_register_tokens": 3},
    "dinov3_vit": {"num_register_tokens": 3},
    "aimv2_vision_model": {},
    "ijepa": {},
    "beit": {"use_relative_position_bias": True},
    "deit": {},
    "vit_msn": {},
    "data2vec-vision": {},
    "mlcd_vision_model": {},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [8, 8]},
    "chinese_clip_vision_model": {},
    "pixio": {},
    "vit_mae": {"mask_ratio": 0.0},
    "radio": {},
    "sapiens2": {},
    "tipsv2_vision_model": {},
    "dpt": {},
    "pixtral": {"image_size": 32},
    "siglip2_vision_model": {"num_patches": 4},
    "qwen2_vl_vision": {
        "embed_dim": 16,
        "hidden_size": 32,
        "mlp_ratio": 2,
        "depth": 4,
        "num_heads": 2,
    },
    "qwen2_5_vl_vision": {
        "depth": 4,
        "num_heads": 2,
        "out_hidden_size": 32,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl_vision": {
        "depth": 4,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        **DEEPSTACK,
    },
    "qwen3_vl_moe_vision": {
        "depth": 4,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        **DEEPSTACK,
    },
    "sam_vision_model": SAM,
    "sam_hq_vision_model": SAM,
    "sam3_vit_model": {},
    "vitdet": {},
    "altclip_vision_model": {},
    "blip_vision_model": {},
    "blip_2_vision_model": {},
    "instructblip_vision_model": {},
    "clipseg_vision_model": {},
    "metaclip_2_vision_model": {},
    "owlvit_vision_model": {},
    "owlv2_vision_model": {},
    "git_vision_model": {},
    "kosmos_2_vision_model": {},
    "flava_image_model": {},
    "janus_vision_model": {},
    "ovis2_vision": {},
    "qianfan_ocr_vision": {"image_size": [16, 16], "patch_size": [8, 8]},
    "phi4_multimodal_vision": {},
    "idefics2_vision": {},
    "idefics3_vision": {},
    "smolvlm_vision": {},
    "step3p5_vision": {},
    "llama4_vision_model": {
        "pixel_shuffle_ratio": 0.5,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "intermediate_size": 64,
    },
    "yolos": {"image_size": [16, 16], "num_detection_tokens": 3},
    "got_ocr2_vision": SAM,
    "deepseek_ocr2_sam_vision_model": SAM,
    "whisper": {
        "d_model": 16,
        "encoder_layers": 4,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "max_source_positions": 6,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 24,
        "vocab_size": 8,
        "max_target_positions": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "donut-swin": WINDOWS,
    "focalnet": STAGES
    | {"embed_dim": 8, "hidden_sizes": [8, 16, 32], "focal_levels": [1] * 3}
    | {"focal_windows": [3] * 3},
    "convnext": STAGES | {"num_stages": 3},
    "convnextv2": STAGES | {"num_stages": 3},
    "dinov3_convnext": STAGES,
    "hiera": STAGES
    | {
        "image_size": [32, 32],
        "patch_size": [3, 3],
        "patch_stride": [2, 2],
        "patch_padding": [1, 1],
        "embed_dim": 8,
        "num_heads": [1, 2, 2],
        "num_query_pool": 2,
        "masked_unit_size": [4, 4],
        "masked_unit_attention": [True, False, False],
        "mlp_ratio": 2.0,
    },
    "resnet": STAGES | {"image_size": None, "embedding_size": 8},
    "segformer": PYRAMID | {"patch_sizes": [7, 3, 3], "sr_ratios": [4, 2, 1]},
    "glpn": PYRAMID | {"patch_sizes": [7, 3, 3], "sr_ratios": [4, 2, 1]},
    "pvt": PYRAMID | {"patch_sizes": [4, 2, 2]} | {"sequence_reduction_ratios": [2, 1, 1]},
    "pvt_v2": PYRAMID | {"patch_sizes": [7, 3, 3], "sr_ratios": [2, 1, 1]},
    "poolformer": PYRAMID | {"patch_sizes": [7, 3, 3], "padding": [2, 1, 1]},
}
VIEW_SIZES = {  # with more columns than rows, for the families that take images of any size
    "pixtral": [16, 32],
    "siglip2_vision_model": [16, 24],
    "qwen2_vl_vision": [32, 48],
    "qwen2_5_vl_vision": [48, 80],
    "qwen3_vl_vision": [32, 48],
    "qwen3_vl_moe_vision": [32, 48],
    "resnet": [32, 64],
    "segformer": [32, 64],
    "glpn": [32, 64],
    "poolformer": [32, 64],
}

# These are never built, only refused.
REFUSED_VISION = {"vivit": {}, "videomae": {}}

# fmt: off
# The default suite tries families that differ in their mechanism: norms, positions, embeddings of
# another width; class and register tokens or none. tests/conformance tries the other ones.
DEFAULT_LANGUAGE = ["llama", "gemma3_text", "gpt_neox", "gpt2", "opt"]
DEFAULT_VISION = ["clip_vision_model", "siglip_vision_model", "dinov2_with_registers", "dinov3_vit"]
DEFAULT_KINDS = [  # one for each way to take or return patches, besides those above
    "pixtral", "siglip2_vision_model", "qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision",
    "sam_vision_model", "whisper",
    "vit_mae", "yolos", "vitdet", "llama4_vision_model", "swin", "convnext", "hiera",
]
OTHER_LANGUAGE = [
    "qwen2", "qwen3", "mistral", "gemma", "gemma2", "phi", "phi3", "olmo2", "cohere", "granite",
    "stablelm", "falcon",
]
OTHER_VISION = [
    "vit", "dinov2", "aimv2_vision_model", "ijepa", "beit", "blip_vision_model",
    "kosmos_2_vision_model", "idefics3_vision",
    "swinv2", "focalnet", "dinov3_convnext", "resnet", "segformer", "glpn", "pvt", "pvt_v2",
    "poolformer",
]
# fmt: on


def language_config(name: str, **settings):
    """A tiny configuration of a decoder family, its weights wide enough for its choices to be
    clear.
    """
    return AutoConfig.for_model(
        name, **BASE | {"initializer_range": 0.2} | LANGUAGE[name] | settings
    )


def vision_config(name: str, **settings):
    """A tiny configuration of an encoder family: views of 16 x 16 pixels, 2 x 2 patches, width 16,
    4 blocks.
    """
    own = (VISION | REFUSED_VISION)[name]
    base = {} if "depths" in own else VISION_BASE
    return AutoConfig.for_model(name, **base | own | settings)


def family_language(name: str, **settings):
    """A tiny causal language model of a family, its weights drawn from seed 0."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(language_config(name, **settings)).eval()


def family_vision(name: str, **settings):
    """A tiny vision encoder of a family, its weights drawn from seed 0."""
    torch.manual_seed(0)
    return make_encoder(vision_config(name, **settings)).eval()
