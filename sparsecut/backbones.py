"""The two models that `build` joins: found by name, their configurations read, then loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from .encoder_classes import find_encoder_class
from .encoders import count_blocks, get_encoder
from .loading import load_pretrained, load_weights
from .schema import UserError
from .shipped_model import BACKBONES_FOLDER, SHIPPED_MODEL
from .waits import show_loading

logger = logging.getLogger(__name__)

SHAPES = SHIPPED_MODEL  # names the built-in small backbones
OLD_SHAPES = "world"  # their former name


@dataclass(frozen=True)
class Backbones:
    """Where both parts of a model come from, and what is known of them before they are loaded.

    Attributes:
        vision: The encoder: a folder, a hub name, or a module.
        language: The language model, in the same forms.
        vision_config: The encoder's configuration.
        text_config: The language model's.
        whole_config: That of the encoder's whole checkpoint, which may hold other parts too.
    """

    vision: str | nn.Module
    language: str | nn.Module
    vision_config: Any
    text_config: Any
    whole_config: Any


def find_backbones(
    vision: str | nn.Module, language: str | nn.Module, hub: dict[str, Any]
) -> Backbones:
    """Find both parts of a model, and read their configurations.

    Args:
        vision: The encoder, as `build` takes it. Of a model with two towers it is the encoder.
        language: The language model, as `build` takes it.
        hub: Arguments of `from_pretrained` about the hub.

    Raises:
        UserError: One cannot be found or read.
    """
    vision = resolve(vision, "vision")
    language = resolve(language, "language")
    whole_config = vision_config = _read_config(vision, "vision", hub)
    text_config = _read_config(language, "language", hub)
    if hasattr(whole_config, "vision_config"):  # a two-tower checkpoint such as CLIP's
        vision_config = whole_config.vision_config
        if not isinstance(vision, str):
            vision = _find_encoder(vision, vision_config)
    return Backbones(vision, language, vision_config, text_config, whole_config)


def load_backbones(backbones: Backbones, settings: dict) -> tuple[nn.Module, nn.Module]:
    """Return the encoder and the language model, loaded where they are names.

    Args:
        backbones: Where they come from.
        settings: Arguments of `from_pretrained`.

    Raises:
        UserError: Weights are missing or cannot be read.
    """
    vision, language = backbones.vision, backbones.language
    if isinstance(vision, str):
        with show_loading(vision):
            vision = _load_encoder(
                vision, backbones.vision_config, backbones.whole_config, settings
            )
    if isinstance(language, str):
        complaint = (
            f"the weights of the language model {language} cannot be read; fetch the model again"
        )
        config = backbones.text_config
        with show_loading(language):
            language = load_weights(
                AutoModelForCausalLM, language, complaint, config=config, **settings
            )
    return get_encoder(vision), language


def read_depths(vision: str | nn.Module, language: str | nn.Module, **hub: Any) -> tuple[int, int]:
    """Numbers of encoder blocks and decoder layers, read from configurations alone."""
    vision_config = _read_config(resolve(vision, "vision"), "vision", hub)
    text_config = _read_config(resolve(language, "language"), "language", hub)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    return count_blocks(vision_config), text_config.get_text_config().num_hidden_layers


def resolve(source: Any, part: str) -> Any:
    """The source itself, or for "shapes" the shipped folder of a built-in backbone.

    Args:
        source: A hub name, a folder, "shapes" or a module.
        part: "vision" or "language".

    Raises:
        UserError: The source is a path without a folder. A hub name has at most one slash.
    """
    if not isinstance(source, str):
        return source
    if source == OLD_SHAPES:
        logger.warning("the %s model %r is now called %r", part, OLD_SHAPES, SHAPES)
        source = SHAPES
    if source == SHAPES:
        return str(BACKBONES_FOLDER / part)
    is_path = source.count("/") > 1 or source.startswith((".", "/"))
    if is_path and not Path(source).is_dir():
        raise UserError(
            f"the {part} model {source!r} is a path, but there is no such folder; correct it, or"
            " make it first, as the comment at the top of the recipe describes"
        )
    return source


def _read_config(source: Any, part: str, hub: dict) -> Any:
    if isinstance(source, nn.Module):
        return source.config
    return load_pretrained(
        AutoConfig,
        source,
        f"the {part} model {source!r} could not be read; give a folder, a hub name, or {SHAPES!r}",
        **hub,
    )


def _find_encoder(model: nn.Module, config: Any) -> nn.Module:
    """The encoder of a model of several parts: the outermost module with this configuration."""
    for module in model.modules():
        if getattr(module, "config", None) is config:
            return module
    raise UserError(
        f"no part of {type(model).__name__} has its vision_config, so its encoder cannot be found;"
        " give the encoder itself"
    )


def _load_encoder(name: str, config: Any, whole_config: Any, settings: dict) -> nn.Module:
    """The encoder of a checkpoint; UserError where weights are missing, which would be random.

    Args:
        name: A folder or hub name.
        config: The encoder's configuration.
        whole_config: That of the whole checkpoint, which may hold other parts too.
        settings: Further arguments of `from_pretrained`.
    """
    complaint = f"the weights of the encoder {name} cannot be read; fetch the model again"
    # Shortcuts read blocks. Checkpoints of classifiers have no pooler.
    settings = {"optional": r"(^|\.)pooler\.", **settings}
    kind = AutoModel if type(config) in MODEL_MAPPING else find_encoder_class(config)
    try:
        return load_weights(kind, name, complaint, config=config, **settings)
    except UserError:
        if whole_config is config:
            raise
    # In this checkpoint the encoder's weights have names that only the whole model knows.
    whole = load_weights(AutoModel, name, complaint, config=whole_config, **settings)
    return _find_encoder(whole, whole.config.vision_config)


def read_tool(auto_class: Any, source: Any, argument: str, hub: dict) -> Any:
    """Read a tokenizer, image processor or feature extractor of a hub name or folder.

    Args:
        auto_class: The Auto class that reads it.
        source: The hub name or folder.
        argument: What the user would give instead, for errors.
        hub: Arguments of `from_pretrained` about the hub.

    Raises:
        UserError: The source is a module, or has no such thing that can be read.
    """
    if not isinstance(source, str):
        raise UserError(
            f"a loaded module was given without {argument}, but the module alone does not say how"
            f" its input is prepared; give {argument}=..."
        )
    return load_pretrained(
        auto_class,
        source,
        f"{source} has no {argument} that can be read; give the folder or hub name of a complete"
        " model",
        **hub,
    )
