"""What both kinds of model share: their base class, their outputs, and the checks of image inputs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .fusion import Fusion
from .hooks import remove_gradient_hooks
from .plan import Plan
from .schema import UserError


class SparseCutPreTrainedModel(PreTrainedModel):
    """Base of the joined model (`modeling`) and of the upgraded one (`modeling_upgraded`).

    Code that works with either kind asks this interface, never for attributes of one kind.

    Attributes:
        is_upgrade: The model is a pretrained VLM with shortcuts on top (`base`, `family`).
        supports_feature_cache: The encoder runs apart from the rest, so that vision features can be
            cached and given back instead of pixels.
        supports_packing: Several examples may share a row, with position ids of their own.
        plan: The shortcuts, as data.
        fusion: The trained modules of the shortcuts.
    """

    is_upgrade: ClassVar[bool] = False
    supports_feature_cache: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = True
    plan: Plan
    fusion: Fusion

    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list] = ["past_key_values"]
    _no_split_modules: ClassVar[list] = ["Fusion", "ContextGate"]

    @property
    def saves_fusion_only(self) -> bool:
        """Whether `save_fusion` is enough to load the model again, as its base has a known name."""
        return False

    def vision_backbone(self) -> nn.Module:
        """The vision encoder whose blocks the shortcuts read."""
        return self.vision_tower

    def language_backbone(self) -> nn.Module:
        """The language model whose layers the shortcuts write to."""
        return self.language_model

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that a recipe trains.

        Returns:
            "vision", "projector" (upgraded models only: what the base has besides encoder and
            language model), "fusion", "language" (its head included) and "head" (the head alone).
        """
        head = self.get_output_embeddings()
        head = list(head.parameters()) if head is not None else []
        vision = list(self.vision_backbone().parameters())
        fusion = list(self.fusion.parameters())
        language = list(self.language_backbone().parameters())
        known = {id(p) for p in language}
        language += [p for p in head if id(p) not in known]
        groups = {"vision": vision, "fusion": fusion, "language": language, "head": head}
        if self.is_upgrade:
            known = {id(p) for p in (*vision, *fusion, *language)}
            projector = [p for p in self.parameters() if id(p) not in known]
            groups = {"vision": vision, "projector": projector} | groups
        return groups

    def enable_input_require_grads(self):
        """Let embeddings require a gradient, so that checkpointed layers pass one on.

        A frozen vision encoder is left out: it would store its activations and run backward for
        nothing. An encoder with any trained parameter or adapter is not: reentrant checkpointing
        gives no gradient to blocks whose input requires none.
        """
        self.disable_input_require_grads()
        super().enable_input_require_grads()
        vision = self.parameter_groups()["vision"]
        if not any(p.requires_grad for p in vision):
            remove_gradient_hooks(self, vision)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: our `_init_weights` keeps transformers' rules.

        For custom code transformers would not initialize modules such as CLIP's attention.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, Fusion):
            for values, start in module.initial_values():
                if isinstance(start, tuple):
                    init.uniform_(values, *start)
                else:
                    init.constant_(values, start)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


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


def is_sparsecut_model(model: nn.Module) -> bool:
    """Whether this is a model of either kind, also inside PEFT's wrapper."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return isinstance(inner, SparseCutPreTrainedModel)


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
