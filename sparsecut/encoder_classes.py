"""Which class of transformers an encoder's configuration belongs to."""

from __future__ import annotations

import inspect
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .schema import UserError

INTERPOLATION = "interpolate_pos_encoding"  # argument of an encoder's forward


def find_encoder_class(config: Any) -> type:
    """The class of a configuration's encoder: AutoModel's, or that of the configuration's folder.

    Raises:
        UserError: transformers has no such class.
    """
    # Not above: configurations are registered while transformers imports its Auto classes.
    from transformers import MODEL_MAPPING

    kind = type(config)
    if kind in MODEL_MAPPING:
        return MODEL_MAPPING[kind]
    # AutoModel does not list encoders that are always a part of a larger model.
    name = kind.__module__.replace(".configuration_", ".modeling_")
    has_file = name != kind.__module__ and find_spec(name) is not None
    candidates = list(vars(import_module(name)).values()) if has_file else []
    found = {}
    for candidate in candidates:
        runs = isinstance(candidate, type) and vars(candidate).get("forward") is not None
        if runs and getattr(candidate, "config_class", None) is kind:
            found[candidate.__name__.endswith("Model"), -len(candidate.__name__)] = candidate
    if not found:
        raise UserError(
            f"transformers has no model for the configuration {kind.__name__}; give an encoder that"
            " has one, such as CLIP, SigLIP, ViT or DINOv2"
        )
    return found[max(found)]


def asks_for_interpolation(config: Any) -> bool:
    """Whether an encoder's forward must be asked to interpolate its positions."""
    return INTERPOLATION in inspect.signature(find_encoder_class(config).forward).parameters
