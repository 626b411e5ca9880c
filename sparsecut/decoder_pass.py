"""One pass through a decoder: features of images enter its input and the layers above."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .fusion import Fusion
from .hooks import accepts, inject, name_cache
from .modeling_base import SparseCutImageFeatures, check_image_features
from .plan import Plan


@dataclass
class DecoderFeatures:
    """What all images of a pass give to a decoder.

    Attributes:
        input: Features that replace image tokens in the input, [tokens, H]; None without images.
        layers: Layer -> features that are added before it, [tokens, H].
        gates: For some layers, what weighs these features by the hidden states they meet.
    """

    input: Tensor | None = None
    layers: dict[int, Tensor] = field(default_factory=dict)
    gates: dict[int, Callable] = field(default_factory=dict)


def gather_features(
    images: SparseCutImageFeatures | None,
    plan: Plan,
    fusion: Fusion,
    inputs_embeds: Tensor,
    tokens_per_image: int,
) -> DecoderFeatures:
    """Join the features of single images.

    Args:
        images: What `get_image_features` returned; None where there are no images.
        plan: The model's plan.
        fusion: Its fusion, for gates.
        inputs_embeds: [B, L, H], whose dtype and device the input's features get.
        tokens_per_image: Image tokens of an image, for gates.

    Raises:
        UserError: The features come from a model of another width or plan.
    """
    if images is None:
        return DecoderFeatures()
    check_image_features(images, plan, inputs_embeds.shape[-1])
    features = DecoderFeatures(torch.cat(list(images.pooler_output)).to(inputs_embeds))
    per_layer = images.deepstack_features or ()
    for layer, image_features in zip(plan.layers, per_layer, strict=True):
        features.layers[layer] = torch.cat(list(image_features))
    if features.layers:
        for layer, gate in fusion.context.items():
            features.gates[int(layer)] = partial(gate, num_tokens=tokens_per_image)
    return features


def run_decoder(
    decoder: nn.Module,
    inputs_embeds: Tensor,
    mask: Tensor,
    features: DecoderFeatures,
    attention_mask: Tensor | None,
    cache: Cache | None,
    settings: Mapping[str, Any],
) -> Any:
    """Run a decoder once on embeddings, with the features of images.

    Args:
        decoder: A language model, with or without its head.
        inputs_embeds: [B, L, H].
        mask: Where image tokens are, [B, L].
        features: Of as many image tokens as the mask has, or none.
        attention_mask: [B, L with cache], or what else the decoder takes.
        cache: Keys and values of what came before, given under the decoder's name for it.
        settings: What else the decoder is given, as far as it takes it and it is not None. Without
            `position_ids`, tokens that are not padding are counted.

    Returns:
        The decoder's output.

    Raises:
        RuntimeError: A layer did not receive its features exactly once.
    """
    if features.input is not None:
        inputs_embeds = inputs_embeds.masked_scatter(mask.unsqueeze(-1), features.input)
    position_ids = settings.get("position_ids")
    if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        position_ids = position_ids[:, -inputs_embeds.shape[1] :]
    optional = {**settings, "position_ids": position_ids, **name_cache(decoder, cache)}
    taken = {k: v for k, v in optional.items() if v is not None and accepts(decoder, k)}

    def run() -> Any:
        return decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            return_dict=True,
            **taken,
        )

    return inject(run, mask, features.layers, features.gates)
