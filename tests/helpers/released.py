"""Random weights under the names of the released code, and folders as that code saves them."""

import json
from pathlib import Path

import torch
from helpers.tiny import tiny_tokenizer
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
)

from sparsecut.conversion.released import VISION


def build_released(fusion: str, depth: int = 40, width: int = 32, seed: int = 0):
    """Random weights under the released names, with their configurations."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=width,
        num_attention_heads=2,
        intermediate_size=40,
        num_hidden_layers=24,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=24,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_hidden_layers=depth,
        vocab_size=50,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
    )
    language = AutoModelForCausalLM.from_config(text).eval()
    tower = AutoModel.from_config(vision).eval()
    if fusion == "cross_mlp":
        parts = {"mlp": mlp(5 * width)}
    elif fusion == "cross_attention":
        parts = {
            "attn": nn.MultiheadAttention(width, 1, batch_first=True),
            "norm1": nn.LayerNorm(width),
            "norm2": nn.LayerNorm(width),
            "ffn": nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            ),
            "mlp": mlp(width),
        }
    else:
        parts = mlp(width)
    projector = nn.ModuleDict(parts) if isinstance(parts, dict) else parts
    for p in [*projector.parameters(), *tower.parameters()]:
        nn.init.normal_(p, std=0.2)
    weights = {
        f"model.mm_projector.{k}": v for k, v in projector.state_dict().items()
    } | language.state_dict()
    prefix = "model.vision_tower.vision_tower.vision_model."
    weights |= {prefix + k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    return weights, {"vision_config": vision, "text_config": text}, (tower, projector, language)


def mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, 24))


def write_vision_folder(folder: Path, weights: dict, config: CLIPVisionConfig) -> Path:
    """The vision tower inside released weights, saved the Hugging Face way."""
    tower = AutoModel.from_config(config)
    names = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
    plain = {
        k.removeprefix(VISION).removeprefix("vision_model."): w
        for k, w in weights.items()
        if k.startswith(VISION)
    }
    tower.load_state_dict({names[k]: w for k, w in plain.items() if k in names})
    tower.save_pretrained(folder)
    CLIPImageProcessorPil(size=config.image_size, crop_size=config.image_size).save_pretrained(
        folder
    )
    return folder


def write_released_folder(
    folder: Path,
    weights: dict,
    text: dict,
    *,
    fusion="cross_mlp",
    pickled=False,
    tower=True,
    **more,
) -> Path:
    """What the released code saves: config.json, weights (with or without the tower), tokenizer
    without a template.
    """
    folder.mkdir(exist_ok=True)
    settings = {**text, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    settings |= {
        "mm_projector_type": fusion,
        "mm_vision_select_layer": -2,
        "mm_hidden_size": 32,
    } | more
    (folder / "config.json").write_text(json.dumps(settings))
    weights = {k: w.contiguous() for k, w in weights.items() if tower or not k.startswith(VISION)}
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):  # two shards
        some = {name: weights[name] for name in part}
        if pickled:
            torch.save(some, folder / f"pytorch_model-{number}.bin")
        else:
            save_file(some, folder / f"model-{number}.safetensors")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder
