"""What the model returns, and the checks that pictures and prompts belong together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .plan import Plan
from .schema import UserError


@dataclass
class SparseCutImageFeatures(BaseModelOutputWithPooling):
    """Fused features of pictures, under the names that `generate` expands for beams and cuts for
    chunked prefill.

    last_hidden_state: the deepest states read from the coarse views, [P, N, D].
    pooler_output: per picture the input feature [N', H]; deepstack_features: for each layer of
    `plan.layers`, the same.
    pixel_values: what they were made from, for an assistant model that makes features of its own.
    """

    deepstack_features: list[list[Tensor]] | None = None
    pixel_values: Tensor | None = None


@dataclass
class SparseCutCausalLMOutputWithPast(ModelOutput):
    """Loss, logits [B, L, vocabulary], cache, optional states, and the pictures' input features
    [tokens, H].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor] | None = None
    attentions: tuple[Tensor] | None = None
    image_hidden_states: Tensor | None = None


def has_begun(cache: Cache | None) -> bool:
    """Whether a cache holds a prompt already."""
    return cache is not None and cache.get_seq_length() > 0


def check_image_tokens(
    mask: Tensor, images: SparseCutImageFeatures | None, *, bare: bool = False, num_each: int = 0
) -> None:
    """Raise ValueError unless features and image tokens are equally many; bare: only warn.

    num_each: tokens of one picture, where a prompt goes on: fewer of them without a picture were
    written by the model. A warning is what a pass is worth that neither trains nor generates nor
    continues and was given no pictures: transformers' own classes take such passes, and its tests
    compare ways of computing attention by them.
    """
    wanted, given = (
        int(mask.sum()),
        (0 if images is None else sum(len(f) for f in images.pooler_output)),
    )
    if wanted == given or (images is None and wanted < num_each):
        return
    message = (
        f"the prompts hold {wanted} image tokens, but the pictures given make {given}; every"
        " picture's placeholder must be expanded to all of its image tokens and none cut off (a"
        " length limit?): use the model's processor, one placeholder per picture"
    )
    if not bare:
        raise UserError(message)
    warnings.warn(f"{message}. They are read as ordinary tokens here", stacklevel=3)


def check_image_features(images: SparseCutImageFeatures | None, plan: Plan, width: int) -> None:
    """Raise ValueError where features that were handed over come from a model of another width or
    plan.
    """
    if images is None:
        return
    given = images.pooler_output[0].shape[-1], len(images.deepstack_features or ())
    if given != (width, len(plan.layers)):
        raise UserError(
            f"the image features given have width {given[0]} and {given[1]} layers above the input,"
            f" but this model needs width {width} and {len(plan.layers)} layers; make them with"
            " this model's get_image_features, or give pixel_values"
        )
