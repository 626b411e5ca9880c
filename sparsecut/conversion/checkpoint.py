"""A folder that the released SparseCut code saved, turned into one of ours."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from ..building import save
from ..modeling import SparseCutForConditionalGeneration
from ..processing import SparseCutProcessor
from ..schema import UserError
from .released import MIXES, TAPS, VISION, from_official

IMAGE_TOKEN = "<image>"
LLAMA = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {
    "architectures",
    "model_type",
    "transformers_version",
}
FORMS = ("*.safetensors", "pytorch_model*.bin")

# What the released code was trained and asked with; a first system turn replaces its opening words.
VICUNA = """\
{%- set ns = namespace(system='A chat between a curious user and an artificial intelligence assistant. \
The assistant gives helpful, detailed, and polite answers to the user\\'s questions.') -%}
{%- for message in messages if message['role'] == 'system' -%}{%- set ns.system = message['content'] -%}{%- endfor -%}
{{ ns.system + ' ' }}
{%- for message in messages if message['role'] != 'system' -%}
{%- if message['role'] == 'assistant' -%}
ASSISTANT:{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
{%- else -%}
{{ 'USER: ' + message['content'] + ' ' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}"""


def convert(
    checkpoint: str | Path,
    out: str | Path,
    *,
    vision: str,
    fusion: str | None = None,
    taps: list[int] | None = None,
    layers: list[int] | None = None,
) -> tuple[SparseCutForConditionalGeneration, SparseCutProcessor]:
    """Read a released checkpoint, write it to `out` as a model that `load` and the Auto classes
    read, and return both parts.

    vision: hub name or folder of the vision tower, for its configuration, its image processor and,
    where the checkpoint does not hold them, its weights. fusion, taps, layers: as in
    `official.from_official`; None takes what the checkpoint's config.json says (mm_projector_type,
    feature_order_reverse) and the released lists. Nothing is written if anything is wrong.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; choose another folder or remove it first")
    settings = read_settings(checkpoint)
    vision_config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(
        vision_config, "vision_config", vision_config
    )  # a two-tower checkpoint such as CLIP's
    input_tap = settings.get("mm_vision_select_layer", -2)
    if settings.get("feature_order_reverse"):
        input_tap = 0  # the released code takes the input from the other end, too
        taps = [vision_config.num_hidden_layers - 1 - tap for tap in TAPS] if taps is None else taps
    fusion = fusion or settings.get("mm_projector_type")
    if fusion not in MIXES:
        raise UserError(
            f"the checkpoint's fusion is {fusion!r}, which is none of the released code's"
            f" projectors ({', '.join(MIXES)}); name the right one with --fusion"
        )
    tokenizer, image_processor = (
        AutoTokenizer.from_pretrained(checkpoint),
        AutoImageProcessor.from_pretrained(vision),
    )
    text_config = LlamaConfig(**{key: value for key, value in settings.items() if key in LLAMA})
    token_id = add_image_token(tokenizer, text_config.vocab_size)
    weights = read_weights(checkpoint)
    if not any(name.startswith(VISION) for name in weights):
        weights |= tower_weights(vision, vision_config)
    model = from_official(
        weights,
        vision_config=vision_config,
        text_config=text_config,
        fusion=fusion,
        taps=taps,
        layers=layers,
        input_tap=input_tap,
    )
    model.config.image_token_id = token_id
    if (checkpoint / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = SparseCutProcessor(
        image_processor,
        tokenizer,
        image_size=model.config.image_size,
        tiles=model.plan.tiles,
        num_image_tokens=model.config.num_image_tokens,
        image_token=IMAGE_TOKEN,
    )
    save(model, processor, out)
    return model, processor


def read_settings(checkpoint: Path) -> dict:
    """The checkpoint's config.json; ValueError where it is missing or asks for what the model here
    does not do.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise UserError(
            f"{checkpoint} holds no config.json; give the folder that the released code saved, with"
            " config.json, weights and tokenizer files"
        )
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"{file} wants the class token among the patches, which none of the released projectors"
            " can take"
        )
    if settings.get("mm_use_im_start_end"):
        raise UserError(
            f"{file} wants tokens around every picture (mm_use_im_start_end), which a conversion"
            " does not add"
        )
    return settings


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, from safetensors files or, where there are none,
    pytorch_model*.bin.
    """
    for form in FORMS:
        weights = {}
        for file in sorted(checkpoint.glob(form)):
            weights |= load_file(file) if file.suffix == ".safetensors" else _load_pickled(file)
        if weights:
            return weights
    raise UserError(f"{checkpoint} holds no weights; files named {' or '.join(FORMS)} are needed")


def _load_pickled(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def tower_weights(vision: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    """A vision tower's own weights under the names that the released code gives them."""
    tower = AutoModel.from_pretrained(vision, config=config)
    return {VISION + name: tensor for name, tensor in tower.state_dict().items()}


def add_image_token(tokenizer, vocab_size: int) -> int:
    """Give a released tokenizer the placeholder, padding on the left and a template where it has
    none; returns the token's id.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint's config.json says"
            f" vocab_size={vocab_size}; the files do not belong together"
        )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
    )
    tokenizer.padding_side = "left"  # generation continues from the last column
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = VICUNA
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
