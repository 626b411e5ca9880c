"""Small configurations of decoders of many kinds, and of an encoder, for counts without weights."""

from transformers import (
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from sparsecut.profiling.counting import count_plan

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
LANGUAGE = {
    "llama": LlamaConfig(**SIZES),
    "alternating windows": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=16, sliding_window_pattern=3
    ),
    "experts": MixtralConfig(**SIZES, num_local_experts=4),
    "alternating experts": Qwen3MoeConfig(
        **SIZES,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        decoder_sparse_step=2,
    ),
    "gpt2": GPT2Config(n_embd=32, n_layer=8, n_head=4, vocab_size=64),
}
VISION = CLIPVisionConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
)
CONTEXT = {"method": "sparsecut", "fine": 0.5, "gate": "context", "rank": 2}


def count_both_ways(family: str, plan: str | dict) -> tuple:
    """The cost of a plan with each layer run, and with one of each kind."""
    settings = {"num_text_tokens": 20, "batch_size": 2}
    whole = count_plan(VISION, LANGUAGE[family], plan, **settings, whole=True)
    return whole, count_plan(VISION, LANGUAGE[family], plan, **settings)
