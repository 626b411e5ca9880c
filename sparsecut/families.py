"""Families of vision-language models that can be upgraded: where they keep their parts, and which patches lie under a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Parts:
    """Where a model keeps things: the module with get_image_features, the encoder whose blocks are read, the decoder."""

    inner: nn.Module
    vision: nn.Module
    language: nn.Module


@dataclass(frozen=True)
class Family:
    """How a family is laid out.

    parts(model) -> Parts. patches_under(model): patches under one image token. index(inner, shape, call) -> [tokens, patches] for one
    call of get_image_features: numbers of patches in the flattened states of a block, -1 where a token shows none. fine: whether a
    picture is one fixed-size view, to which finer ones can be added.
    """

    parts: Callable[[nn.Module], Parts]
    patches_under: Callable[[nn.Module], int]
    index: Callable[[nn.Module, tuple, dict], Tensor]
    fine: bool = False


def _llava_parts(model: nn.Module) -> Parts:
    return Parts(model.model, model.model.vision_tower, model.model.language_model)


def _without_class_token(inner: nn.Module, shape: tuple, call: dict) -> Tensor:
    pictures, length, _ = shape
    return torch.arange(pictures * length).view(pictures, length)[:, 1:].reshape(-1, 1)


FAMILIES = {"llava": Family(_llava_parts, lambda model: 1, _without_class_token, fine=True)}


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model; ValueError with the names that are known for others."""
    if model.config.model_type not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) is not a vision-language model that can be upgraded; known are "
            f"{', '.join(sorted(FAMILIES))}. An encoder and a language model can be joined with sparsecut.build"
        )
    return FAMILIES[model.config.model_type]
