"""Tiny models that vLLM can run, and the same prompts for it and for `generate`.

vLLM's attention on CPUs knows heads of width 32, 64, 128 and more, so these models are wider than
others.
"""

import os

import numpy as np
import torch
import transformers
from helpers.tiny import tiny_tokenizer
from PIL import Image
from transformers import AutoModel, CLIPImageProcessorPil, CLIPVisionConfig

from sparsecut import build

# Read when vLLM is imported or starts an engine.
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
SIZE = 32  # pixels of a view's side
ANSWER = 12  # tokens of an answer
END = "</s>"

# What each family's configuration needs besides the common sizes.
HEAD = {"head_dim": 32}
GEMMA = {**HEAD, "query_pre_attn_scalar": 32}
FAMILIES = {
    "Llama": {},
    "Mistral": HEAD,
    "Qwen2": {},
    "Qwen3": HEAD,
    "Qwen3Moe": {**HEAD, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "Gemma": HEAD,
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Phi3": {},
    "Olmo2": {},
    "Granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "SmolLM3": {},
    "StableLm": {},
    "Cohere": {},
    "Cohere2": HEAD,
    "Phi": {},
    "Starcoder2": {},
    "Glm": HEAD,
    "Glm4": HEAD,
    "Olmo": {},
    "Olmo3": {},
    "Exaone4": {},
    "Ernie4_5": HEAD,
    "OPT": {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "SeedOss": HEAD,
    "Arcee": {},
    "Apertus": {},
    "Nemotron": {},
    "Mixtral": {**HEAD, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "HunYuanDenseV1": HEAD,
    "Falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "multi_query": False},
    "Bloom": {},
    "Ministral3": HEAD,
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make_language(family: str):
    """A random decoder of a family, wide enough for answers that differ."""
    names = (
        [f"{family}TextConfig", f"{family}Config"] if family == "Gemma3" else [f"{family}Config"]
    )
    config_class = getattr(transformers, names[0])
    tokenizer = tiny_tokenizer()
    config = config_class(
        vocab_size=len(tokenizer) + 9,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **FAMILIES[family],
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if family.startswith("Gemma"):  # its head is its embeddings, and would repeat the last token
        model.get_input_embeddings().weight.data *= 0.1
    return model


def make_vision():
    """A random CLIP: views of 32 x 32 pixels, 4 x 4 patches."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    return AutoModel.from_config(config)


def make_vllm_model(family: str = "Llama", plan="sparsecut", **settings):
    """(model, processor) of random parts, whose shortcuts change what it answers."""
    torch.manual_seed(0)
    model, processor = build(
        make_vision(),
        make_language(family),
        plan,
        image_processor=CLIPImageProcessorPil(
            size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}
        ),
        **{"tokenizer": tiny_tokenizer(), **settings},
    )
    for weight in model.fusion.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval(), processor


def save_vllm_model(folder, *args, **kwargs):
    """Make a model and save it; returns (model, processor)."""
    model, processor = make_vllm_model(*args, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def draw_images(number: int, seed: int = 0) -> list[Image.Image]:
    """Random images, each of them of another size."""
    random = np.random.RandomState(seed)
    images = []
    for index in range(number):
        shape = (24 + index % 7 * 4, 24 + index % 5 * 6, 3)
        images.append(Image.fromarray(random.randint(0, 255, shape, dtype=np.uint8)))
    return images


@torch.no_grad()
def generate_answer(model, processor, text: str, images=(), length: int = ANSWER) -> list[int]:
    """What `generate` answers greedily, as token ids."""
    inputs = processor(images=list(images) or None, text=text, return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return cut_answer(outputs[0, inputs["input_ids"].shape[1] :].tolist(), processor)


def generate_without_shortcuts(model, processor, text: str, images=()) -> list[int]:
    """The same with every shortcut above the input switched off."""
    above = [number for number in range(len(model.plan.shortcuts)) if number != model.fusion.main]
    with model.fusion.switched_off(*above):
        return generate_answer(model, processor, text, images)


def cut_answer(tokens: list[int], processor) -> list[int]:
    """An answer up to its end token."""
    end = processor.tokenizer.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def make_request(processor, text: str, images=()) -> dict:
    """A prompt as vLLM takes it: token ids with one placeholder for each image."""
    request = {"prompt_token_ids": processor.tokenizer(text).input_ids}
    if images:
        request["multi_modal_data"] = {"image": list(images)}
    return request


def start_engine(folder, **settings):
    """An engine of vLLM in this process."""
    os.environ.update(SETTINGS)
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "max_model_len": 256,
        "gpu_memory_utilization": 0.1,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 4},
        "seed": 0,
    }
    return LLM(str(folder), **{**defaults, **settings})


def stop_engine(engine) -> None:
    """End an engine, so that another one can start in this process."""
    from vllm.distributed import cleanup_dist_env_and_memory

    engine.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def ask_engine(
    engine, processor, requests: list[dict], length: int = ANSWER, **settings
) -> list[list[int]]:
    """The engine's greedy answers to requests that it gets together, as token ids."""
    from vllm import SamplingParams

    outputs = engine.generate(
        requests, SamplingParams(temperature=0, max_tokens=length), use_tqdm=False, **settings
    )
    return [cut_answer(list(output.outputs[0].token_ids), processor) for output in outputs]
