"""A folder that the released SparseCut code saved, converted into one of this library."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
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
from ..loading import load_pretrained, load_weights, read_tensors
from ..modeling import SparseCutForConditionalGeneration
from ..processing import SparseCutProcessor
from ..schema import UserError, read_json_file
from .released import MIXES, TAPS, VISION, from_released

IMAGE_TOKEN = "<image>"
IDENTITY = {"architectures", "model_type", "transformers_version"}  # not settings of a model
LLAMA_KEYS = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - IDENTITY
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")

# The prompt that the released code is trained with. A first system turn replaces its opening.
VICUNA = """\
{%- set ns = namespace(system='A chat between a curious user and an artificial intelligence \
assistant. \
The assistant gives helpful, detailed, and polite answers to the user\\'s questions.') -%}
{%- for message in messages if message['role'] == 'system' -%}\
{%- set ns.system = message['content'] -%}{%- endfor -%}
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
    """Convert a released checkpoint into a model that `load` and the Auto classes read.

    Nothing is written if anything is wrong.

    Args:
        checkpoint: The folder that the released code saved.
        out: The folder to write.
        vision: Hub name or folder of the vision tower. It gives the configuration, the image
            processor, and the weights if the checkpoint does not hold them.
        fusion: The released projector. None takes the checkpoint's `mm_projector_type`.
        taps: See `released.make_released_plan`. None takes the released list, reversed where the
            checkpoint has `feature_order_reverse`.
        layers: See `released.make_released_plan`.

    Returns:
        The model and its processor.

    Raises:
        UserError: The checkpoint, or what is given with it, cannot be converted.
    """
    checkpoint = Path(checkpoint)
    out = Path(out)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already; choose another folder or remove it first")
    settings = read_settings(checkpoint)
    fusion = _check_fusion(fusion or settings.get("mm_projector_type"))
    vision_config = _read_vision_config(vision)
    input_tap = settings.get("mm_vision_select_layer", -2)
    if settings.get("feature_order_reverse"):
        input_tap = 0  # the released code takes the input from the other end, too
        last = vision_config.num_hidden_layers - 1
        taps = [last - tap for tap in TAPS] if taps is None else taps
    tokenizer = _read_tokenizer(checkpoint)
    text_config = LlamaConfig(**{key: settings[key] for key in settings if key in LLAMA_KEYS})
    image_token_id = add_image_token(tokenizer, text_config.vocab_size)
    model = from_released(
        _read_all_weights(checkpoint, vision, vision_config),
        vision_config=vision_config,
        text_config=text_config,
        fusion=fusion,
        taps=taps,
        layers=layers,
        input_tap=input_tap,
    )
    model.config.image_token_id = image_token_id
    model.generation_config = _read_generation_config(checkpoint, model.generation_config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = _build_processor(model, tokenizer, vision)
    save(model, processor, out)
    return model, processor


def _check_fusion(fusion: str | None) -> str:
    if fusion not in MIXES:
        raise UserError(
            f"the checkpoint's fusion is {fusion!r}, but the released code's projectors are"
            f" {', '.join(MIXES)}; name the right one with --fusion"
        )
    return fusion


def _build_processor(
    model: SparseCutForConditionalGeneration, tokenizer, vision: str
) -> SparseCutProcessor:
    return SparseCutProcessor(
        load_pretrained(
            AutoImageProcessor,
            vision,
            f"the vision tower {vision} has no image processor that can be read; give its hub name"
            " or folder",
        ),
        tokenizer,
        image_size=model.config.image_size,
        tiles=model.plan.tiles,
        num_image_tokens=model.config.num_image_tokens,
        image_token=IMAGE_TOKEN,
    )


def _read_vision_config(vision: str) -> PreTrainedConfig:
    complaint = f"the vision tower {vision} cannot be read; give its hub name or folder"
    config = load_pretrained(AutoConfig, vision, complaint)
    return getattr(config, "vision_config", config)  # of a two-tower checkpoint such as CLIP's


def _read_tokenizer(checkpoint: Path):
    return load_pretrained(
        AutoTokenizer,
        checkpoint,
        f"{checkpoint} holds no tokenizer that can be read; give the folder that the released code"
        " saved",
    )


def _read_generation_config(checkpoint: Path, default: GenerationConfig) -> GenerationConfig:
    if (checkpoint / "generation_config.json").is_file():
        complaint = f"{checkpoint}/generation_config.json cannot be read; copy it again"
        return load_pretrained(GenerationConfig, checkpoint, complaint)
    return default


def read_settings(checkpoint: Path) -> dict:
    """Return the checkpoint's config.json.

    Raises:
        UserError: The file is missing, broken, or asks for something that is not supported.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise UserError(
            f"{checkpoint} holds no config.json; give the folder that the released code saved, with"
            " config.json, weights and tokenizer files"
        )
    settings = read_json_file(file)
    if settings.get("mm_vision_select_feature", "patch") != "patch":
        raise UserError(
            f"{file} has mm_vision_select_feature={settings['mm_vision_select_feature']!r}, which"
            " puts the class token among the patches; only 'patch' can be converted"
        )
    if settings.get("mm_use_im_start_end"):
        raise UserError(
            f"{file} has mm_use_im_start_end=true, tokens around every image; only checkpoints"
            " without them can be converted"
        )
    return settings


def _read_all_weights(
    checkpoint: Path, vision: str, vision_config: PreTrainedConfig
) -> dict[str, Tensor]:
    weights = read_weights(checkpoint)
    if not any(name.startswith(VISION) for name in weights):
        complaint = f"the weights of the vision tower {vision} cannot be read; fetch it again"
        tower = load_weights(AutoModel, vision, complaint, config=vision_config)
        weights |= {VISION + name: tensor for name, tensor in tower.state_dict().items()}
    return weights


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint folder.

    They are read from safetensors files or, where there are none, from pytorch_model*.bin.

    Raises:
        UserError: There are none of either.
    """
    for pattern in WEIGHT_FILES:
        weights = {}
        for file in sorted(checkpoint.glob(pattern)):
            weights |= _read_file(file)
        if weights:
            return weights
    raise UserError(
        f"{checkpoint} holds no weights; files named {' or '.join(WEIGHT_FILES)} are needed"
    )


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_tensors(file, "copy it again")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"the weights {file} cannot be read ({error}); copy it again") from error


def add_image_token(tokenizer, vocab_size: int) -> int:
    """Add the image placeholder to a released tokenizer.

    It also gets padding on the left, and a padding token and a chat template if it has none.

    Args:
        tokenizer: The tokenizer, which is changed.
        vocab_size: The vocabulary size of the checkpoint's config.json.

    Returns:
        The placeholder's id.

    Raises:
        UserError: The tokenizer has more tokens than the checkpoint.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint's config.json says"
            f" vocab_size={vocab_size}; give files that belong together"
        )
    tokens = {"extra_special_tokens": [IMAGE_TOKEN]}
    tokenizer.add_special_tokens(tokens, replace_extra_special_tokens=False)
    tokenizer.padding_side = "left"  # generation continues from the last column
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if not tokenizer.chat_template:
        tokenizer.chat_template = VICUNA
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
