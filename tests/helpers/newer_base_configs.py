"""Configurations of tiny models of the families that came last; see base_configs."""

import transformers as hf
from helpers.base_configs import (
    COMMON,
    EXPERTS,
    GLM_IDS,
    IDS,
    IMAGE,
    LLAMA,
    NO_REST,
    PIXTRAL,
    QWEN,
    ROPE,
    SIGLIP,
    SIZES,
    START,
    TEXT,
    VIDEO,
    text,
)

AUDIO_TOKEN = 57
BOTH = {**COMMON, "video_token_id": VIDEO}
DEEPSTACK = {**NO_REST, "deepstack_visual_indexes": [1, 2]}
WINDOWS = {**QWEN, "window_size": 16, "fullatt_block_indexes": [1, 3]}
SAM = {
    "model_type": "sam_vision_model",
    **SIZES,
    "image_size": 64,
    "patch_size": 4,
    "output_channels": 8,
    "mlp_dim": 32,
    "window_size": 4,
    "global_attn_indexes": [1],
    "num_pos_feats": 8,
}
# Attention with compressed keys and values, and experts, as DeepSeek V3 has them.
LATENT = {
    **TEXT,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
INDEXED = {**LATENT, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2}
NO_HEAD_DIM = {name: value for name, value in TEXT.items() if name != "head_dim"}
AUDIO = {  # is not used
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 32,
    "max_source_positions": 10,
}

CONFIGS = {
    "deepseek_vl_hybrid": lambda: hf.DeepseekVLHybridConfig(
        vision_config=SIGLIP, high_res_vision_config=SAM, text_config=LLAMA, **COMMON
    ),
    "gemma4": lambda: hf.Gemma4Config(
        vision_config={
            **SIZES,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pooling_kernel_size": 2,
            "patch_size": 4,
            "position_embedding_size": 64,
        },
        text_config={  # the last layers use keys and values of the first ones
            **TEXT,
            "sliding_window": 64,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        audio_config=None,
        audio_token_id=AUDIO_TOKEN,
        **BOTH,
    ),
    "exaone4_5": lambda: hf.Exaone4_5_Config(
        vision_config={**WINDOWS, "num_key_value_heads": 2},
        text_config=text("exaone4", sliding_window=64),
        **BOTH,
    ),
    "qwen2_5_omni_thinker": lambda: hf.Qwen2_5OmniThinkerConfig(
        vision_config=WINDOWS,
        text_config={**NO_HEAD_DIM, **ROPE},
        audio_config=AUDIO,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO_TOKEN,
        vision_start_token_id=START,
    ),
    "hyperclovax_vision_v2": lambda: hf.HyperCLOVAXVisionV2Config(
        vision_config={"model_type": "qwen2_5_vl_vision", **WINDOWS},
        text_config=text("hyperclovax"),
        **BOTH,
    ),
    "qwen3_omni_moe_thinker": lambda: hf.Qwen3OmniMoeThinkerConfig(
        vision_config=DEEPSTACK,
        text_config={**TEXT, **ROPE, **EXPERTS, "num_experts": 4},
        audio_config={**AUDIO, "downsample_hidden_size": 8},
        audio_token_id=AUDIO_TOKEN,
        **IDS,
    ),
    "cohere_compass": lambda: hf.CohereCompassConfig(
        vision_config=DEEPSTACK,
        text_config={
            **NO_HEAD_DIM,
            "rope_parameters": dict.fromkeys(
                ("sliding_attention", "full_attention"), ROPE["rope_parameters"]
            ),
        },
        **IDS,
    ),
    "cosmos3_omni": lambda: hf.Cosmos3OmniConfig(
        vision_config={"model_type": "qwen3_vl_vision", **DEEPSTACK},
        text_config=text("qwen3_vl_text", **ROPE),
        **IDS,
    ),
    "cosmos3_edge": lambda: hf.Cosmos3EdgeConfig(
        vision_config={**SIZES, "patch_size": 4, "num_patches": 16},
        text_config={**TEXT, **ROPE},
        projector_hidden_size=32,
        **IDS,
    ),
    "ernie4_5_vl_moe": lambda: hf.Ernie4_5_VLMoeConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 16,
            "num_heads": 2,
            "patch_size": 4,
            "intermediate_size": 32,
        },
        text_config={
            **TEXT,
            **ROPE,
            "moe_intermediate_size": [24, 24],
            "moe_k": 2,
            "moe_num_experts": 4,
        },
        **GLM_IDS,
    ),
    "dots3_note": lambda: hf.Dots3NoteConfig(
        vision_config={
            **SIZES,
            "patch_size": 4,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"],
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
        },
        audio_config={
            **SIZES,
            "num_hidden_layers": 1,
            "feature_size": 8,
            "downsample_hidden_size": 8,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
        text_config={
            **INDEXED,
            "head_dim": 16,
            "shared_experts_intermediate_size": 24,
            "layer_types": ["indexed_attention"] * 4,
            "use_dsa": True,
        },
        audio_token_id=AUDIO_TOKEN,
        **BOTH,
    ),
    "minimax_m3_vl": lambda: hf.MiniMaxM3VLConfig(
        vision_config={**SIZES, "image_size": 16, "patch_size": 4},
        text_config={
            **TEXT,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
            "dense_intermediate_size": 48,
            "shared_intermediate_size": 24,
            "rotary_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 8,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=32,
    ),
    "kimi_k25": lambda: hf.Kimi_K25Config(
        vision_config={**SIZES, "patch_size": 4, "pos_emb_height": 4, "pos_emb_width": 4},
        text_config={"model_type": "deepseek_v3", **LATENT, "first_k_dense_replace": 1},
        projection_hidden_size=16,
        **IDS,
    ),
    "muse_glimmer": lambda: hf.MuseGlimmerConfig(
        vision_config={
            **SIZES,
            "patch_size": 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "max_position_embeddings": 16,
        },
        text_config={**TEXT, "sliding_window": 64},
        out_hidden_size=64,
        projector_hidden_size=32,
        **BOTH,
    ),
    "inkling2": lambda: hf.Inkling2Config(
        vision_config={
            **SIZES,
            "patch_size": 4,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 32,
            "text_hidden_size": 32,
        },
        text_config={
            **TEXT,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "unpadded_vocab_size": 64,
            "n_layers_per_attn_res_block": 2,
        },
        **COMMON,
    ),
    "granite_docling": lambda: hf.GraniteDoclingConfig(
        vision_config={
            **SIZES,
            "image_size": 16,
            "patch_size": 4,
            "scale_factor": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [1],
        },
        text_config={
            **TEXT,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 0.3,
        },
        pad_token_id=0,
        **COMMON,
    ),
    "mistral_large4": lambda: hf.MistralLarge4Config(
        vision_config=PIXTRAL,
        text_config={**INDEXED, "head_dim": 8},
        image_token_index=IMAGE,
    ),
}
