"""Putting models together: from two names or modules, or from a saved folder."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)

from .adapters import load_adapters
from .backbones import OLD_SHAPES as OLD_SHAPES
from .backbones import SHAPES as SHAPES
from .backbones import Backbones, find_backbones, load_backbones, read_tool
from .backbones import read_depths as read_depths
from .backbones import resolve as resolve
from .card import describe_config, write_card
from .configuration import SparseCutConfig, SparseCutUpgradeConfig, check_language_model
from .encoders import (
    check_extractor,
    is_audio,
    prepare_to_load,
)
from .fitting import Fitting, warn_of_many_tokens
from .loading import (
    HUB_ARGUMENTS,
    adopt_quantization,
    find_compute_dtype,
    forget_quantization,
    holds_quantized_values,
    load_pretrained,
)
from .modeling import SparseCutForConditionalGeneration
from .placeholders import add_rows
from .plan import Plan
from .processing import SparseCutProcessor
from .processing_audio import SparseCutAudioProcessor
from .processing_upgraded import wrap_processor
from .saved_code import without_code
from .schema import UserError
from .sharing import find_shortcuts
from .shipped_model import find_shipped_model
from .timm_encoders import is_timm, make_timm_image_processor
from .upgrading import load_fusion, read_processor
from .waits import show_loading, show_step

# Arguments about the repository of shortcuts, which their base does not share.
OF_ONE_REPOSITORY = ("revision", "subfolder")


def build(
    vision: str | nn.Module,
    language: str | nn.Module,
    plan: str | dict | Plan = "sparsecut",
    *,
    image_processor: Any = None,
    tokenizer: Any = None,
    image_token: str | None = None,
    coarse: str = "squash",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    view_size: int | tuple[int, int] | None = None,
    dtype: torch.dtype | str = torch.float32,
    **from_pretrained: Any,
) -> tuple[SparseCutForConditionalGeneration, SparseCutProcessor | SparseCutAudioProcessor]:
    """Join a vision encoder and a causal language model by a plan.

    Nothing is copied and no weight changes. The plan is checked before weights are loaded.

    Args:
        vision: The encoder: a hub name, a folder, "shapes" (built-in and small), or a module.
        language: The language model, in the same forms.
        plan: A method's name, {"method": ..., options}, or a plan.
        image_processor: Needed with a loaded encoder (of audio: its feature extractor).
        tokenizer: Needed with a loaded language model.
        image_token: The placeholder. Default: "<image>", or "<audio>".
        coarse: How an image is fitted to the encoder: "squash", "crop", or "native", which keeps
            its aspect ratio; see `SparseCutProcessor`.
        min_pixels: With coarse="native", the fewest pixels of an image after it was resized.
            Default: a quarter of `max_pixels`.
        max_pixels: With coarse="native", the most. Default: as many as a view has.
        view_size: Pixels of a view, or (height, width). Encoders that take images of any size may
            need it; those that interpolate their positions take it in place of their own size.
        dtype: Of parts that are loaded here.
        **from_pretrained: For both parts' `from_pretrained`.

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        UserError: The parts cannot be read or joined, or the plan does not fit them.
    """
    hub = {name: value for name, value in from_pretrained.items() if name in HUB_ARGUMENTS}
    backbones = find_backbones(vision, language, hub)
    if isinstance(backbones.vision, str):
        prepare_to_load(backbones.vision_config, view_size)
    fitting = Fitting(coarse, min_pixels, max_pixels)
    view_size = fitting.choose_view_size(backbones.vision_config, view_size)
    config = _make_config(backbones, plan, view_size)
    fitting = fitting.complete(config)
    tokenizer = tokenizer or read_tool(AutoTokenizer, backbones.language, "tokenizer", hub)
    image_processor = _find_image_processor(image_processor, backbones.vision, config, hub)
    image_token = image_token or ("<audio>" if is_audio(config.vision_config) else "<image>")
    config.image_token_id = _add_image_token(tokenizer, image_token)
    encoder, decoder = load_backbones(backbones, {"dtype": dtype, **from_pretrained})
    with show_step("joining both models"):
        model = join_parts(config, encoder, decoder)
    model.generation_config = _make_generation_config(decoder, tokenizer, config.image_token_id)
    return model.eval(), _make_processor(config, image_processor, tokenizer, image_token, fitting)


def _make_config(backbones: Backbones, plan: str | dict | Plan, view_size: Any) -> SparseCutConfig:
    """The configuration of the joined model; where images take many tokens, that is said."""
    config = SparseCutConfig(
        vision_config=backbones.vision_config,
        text_config=backbones.text_config,
        plan=plan.to_dict() if isinstance(plan, Plan) else plan,
        view_size=view_size,
    )
    warn_of_many_tokens(config, is_loaded=not isinstance(backbones.vision, str))
    return config


def _find_image_processor(given: Any, vision: Any, config: SparseCutConfig, hub: dict) -> Any:
    """The image processor that was given, or else the encoder's own, checked and adapted to it."""
    image_processor = given or _read_image_processor(vision, config, hub)
    if is_timm(config.vision_config):
        image_processor = make_timm_image_processor(config.vision_config, image_processor)
    if is_audio(config.vision_config):
        check_extractor(image_processor, config.grid)
    return image_processor


def _read_image_processor(vision: Any, config: SparseCutConfig, hub: dict) -> Any:
    if is_timm(config.vision_config) and isinstance(vision, str):
        return make_timm_image_processor(config.vision_config)
    auto_class = AutoFeatureExtractor if is_audio(config.vision_config) else AutoImageProcessor
    return read_tool(auto_class, vision, "image_processor", hub)


def _add_image_token(tokenizer: Any, image_token: str) -> int:
    """Give a tokenizer the placeholder and a token to pad with, where it lacks them.

    Returns:
        The placeholder's id.
    """
    if image_token not in tokenizer.get_added_vocab():
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [image_token]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer.convert_tokens_to_ids(image_token)


def join_parts(
    config: SparseCutConfig, vision: nn.Module, language: nn.Module
) -> SparseCutForConditionalGeneration:
    """Return the model of two loaded parts, its fusion new, in the dtype of the language model.

    Args:
        config: The model's configuration. It takes over those of the parts.
        vision: The encoder.
        language: The language model.

    Raises:
        UserError: The language model cannot be given features.
    """
    check_language_model(language)
    for module in (*vision.modules(), *language.modules()):
        module._is_hf_initialized = True  # transformers must not draw these weights anew
    if language.get_input_embeddings().num_embeddings <= config.image_token_id:
        add_rows(language, config.image_token_id + 1)
    for part in (vision, language):
        if not holds_quantized_values(part):
            forget_quantization(part.config)
    # The parts' own, with the new size of the vocabulary.
    config.vision_config = vision.config
    config.text_config = language.config
    model = SparseCutForConditionalGeneration(config, vision_tower=vision, language_model=language)
    adopt_quantization(model, vision)
    adopt_quantization(model, language)
    model.fusion.to(find_compute_dtype(language))
    return model


def _make_generation_config(language: nn.Module, tokenizer: Any, image_token_id: int) -> Any:
    """The language model's own, without the placeholder in answers and with a token to pad with."""
    config = copy.deepcopy(language.generation_config)
    config.suppress_tokens = [*(config.suppress_tokens or []), image_token_id]
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _make_processor(
    config: SparseCutConfig,
    image_processor: Any,
    tokenizer: Any,
    image_token: str,
    fitting: Fitting,
) -> Any:
    if is_audio(config.vision_config):
        return SparseCutAudioProcessor(
            image_processor,
            tokenizer,
            num_audio_tokens=config.num_image_tokens,
            audio_token=image_token,
        )
    return SparseCutProcessor(
        image_processor,
        tokenizer,
        image_size=config.image_size,
        tiles=config.get_plan().tiles,
        num_image_tokens=config.num_image_tokens,
        image_token=image_token,
        **fitting.get_settings(config),
    )


def load(
    folder: str | Path, base: Any = None, *, processor: Any = None, **from_pretrained: Any
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a saved model and its processor; adapters that were saved beside it are put back on.

    Args:
        folder: A folder, a hub name, or "shapes": a small trained model that ships with the
            package. A folder of shortcuts alone (`save_fusion`) is loaded onto its base; see
            `upgrading.load_fusion`.
        base: For shortcuts: the base to use instead of the one they name.
        processor: For shortcuts: the processor of a loaded base.
        **from_pretrained: For `from_pretrained`.

    Returns:
        (model, processor), the model in evaluation mode.

    Raises:
        UserError: There is no saved model, or the shortcuts belong to another base.
    """
    folder = find_shipped_model(folder)
    hub = {name: value for name, value in from_pretrained.items() if name in HUB_ARGUMENTS}
    shortcuts = find_shortcuts(folder, **hub)
    if shortcuts is not None:
        settings = {name: x for name, x in from_pretrained.items() if name not in OF_ONE_REPOSITORY}
        model, processor = load_fusion(shortcuts, base, processor=processor, **settings)
        load_adapters(model, shortcuts)
        return model, processor
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json, so it is not a saved model; give the folder that"
            f" training or save_pretrained wrote, for example {folder}/final"
        )
    if base is not None or processor is not None:
        raise UserError(
            f"{folder} is a whole model with its own base and processor; leave out base and"
            " processor"
        )
    config = _read_saved_config(folder, **hub)
    if not isinstance(config, SparseCutConfig | SparseCutUpgradeConfig):
        raise UserError(
            f"{folder} holds a model of type {config.model_type}, which is not SparseCut's;"
            " give a vision-language model to sparsecut.upgrade, or an encoder and a language"
            " model to sparsecut.build"
        )
    complaint = f"the weights in {folder} cannot be read; save or fetch the model again"
    with show_loading(folder):
        model = load_pretrained(AutoModelForImageTextToText, folder, complaint, **from_pretrained)
    processor = read_processor(folder, **hub)
    if model.is_upgrade:
        # Earlier versions saved the base's own processor where there were no fine views.
        processor = wrap_processor(processor, model.plan.tiles)
    return model.eval(), processor


def _read_saved_config(name: str | Path, **hub: Any) -> Any:
    """The configuration of a folder or hub name; UserError where there is none."""
    return load_pretrained(
        AutoConfig,
        name,
        f"there is no saved model {name} that can be read; give a folder with a whole model, or a"
        " hub name",
        **hub,
    )


def is_saved(name: str | Path) -> bool:
    """Whether a folder or hub name holds a model of this package, and not another one.

    Raises:
        UserError: It holds no model.
    """
    if find_shortcuts(name) is not None:
        return True
    return isinstance(_read_saved_config(name), SparseCutConfig | SparseCutUpgradeConfig)


def save(model: PreTrainedModel, processor: Any, folder: str | Path, *, code: bool = True) -> None:
    """Write model, processor and chat template into one folder for `load` and the Auto classes.

    A model card is written too, unless there is one that a user has written or edited.

    Args:
        model: A model of either kind.
        processor: Its processor.
        folder: Where to write.
        code: Also write the source files that they need, for machines without this package
            (`trust_remote_code=True` there).
    """
    with contextlib.nullcontext() if code else without_code():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    write_card(folder, describe_config(model.config))
