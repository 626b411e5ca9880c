"""A finished vision-language model with shortcuts on top: the base's own object, untouched, and the
fusion beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .configuration_upgraded import SparseCutUpgradeConfig
from .families import get_family
from .fusion import Fusion
from .hooks import whole_modules
from .modeling_base import SparseCutPreTrainedModel
from .plan import Plan
from .schema import UserError
from .upgrade_hooks import (
    UpgradeCall,
    connect,
    disconnect_all,
    get_encoder_depth,
    get_encoder_width,
    shortcuts_active,
)

IGNORED = -100  # a label that is not learned
WEIGHTS, FACTS = "fusion.safetensors", "fusion.json"


class SparseCutUpgrade(SparseCutPreTrainedModel, GenerationMixin):
    r"""A finished vision-language model (`base`) whose decoder receives sparse shortcuts beside
    its own input (arXiv 2602.00505).

    It takes the inputs of its base, and `fine_pixel_values` where the plan reads finer views;
    forward, generate, cache and prompt format are the base's own. Until the fusion is trained it
    answers as the base does, bit for bit. The base itself goes without shortcuts when it is called
    directly.
    """

    config: SparseCutUpgradeConfig
    config_class = SparseCutUpgradeConfig
    is_upgrade = True
    supports_feature_cache = False  # the base runs its encoder in its own way
    supports_packing = False  # the base counts positions in its own way

    def __init__(self, config: SparseCutUpgradeConfig, base: PreTrainedModel | None = None):
        super().__init__(config)
        self.plan: Plan = config.get_plan()
        if base is None and config.tie_word_embeddings:
            config.base_config.tie_word_embeddings = True
        self.base = (
            base
            if base is not None
            else AutoModelForImageTextToText.from_config(config.base_config)
        )
        self.family = get_family(self.base)
        parts = self.family.parts(self.base)
        self.fusion = Fusion(
            self.plan,
            vision_depth=get_encoder_depth(parts.vision),
            vision_dim=get_encoder_width(parts.vision),
            language_dim=parts.language.config.get_text_config().hidden_size,
            rows=patch_rows(parts.vision.config) if self.plan.tiles else 1,
            num_under=self.family.patches_under(self.base),
        )
        connect(parts)
        self.post_init()
        self._no_split_modules = whole_modules(self)

    @property
    def generation_config(self):
        """The base's own generation settings."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value):
        if "base" in self._modules:  # while the base is not there yet, its own are to come
            self.base.generation_config = value

    @property
    def base_model(self) -> nn.Module:
        """What the base has below its head."""
        return self.base.base_model if "base" in self._modules else self

    def get_input_embeddings(self):
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.base.set_output_embeddings(new_embeddings)

    def get_decoder(self):
        return self.base.get_decoder()

    @property
    def saves_fusion_only(self) -> bool:
        """Whether `save_fusion` is enough to load the model again, as its base has a known name."""
        return self.config.base_name is not None

    def vision_backbone(self) -> nn.Module:
        """The base's vision encoder."""
        return self.family.parts(self.base).vision

    def language_backbone(self) -> nn.Module:
        """The base's language model, without its head."""
        return self.family.parts(self.base).language

    def shortcuts_active(self, fine_pixel_values: torch.Tensor | None = None):
        """A block inside which the base's own calls have the shortcuts, in this thread; yields what
        is known of the call.
        """
        return shortcuts_active(
            UpgradeCall(self.family, self.family.parts(self.base), self.fusion, fine_pixel_values)
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *args,
        pixel_values: torch.Tensor | None = None,
        fine_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ):
        """The base's own forward with the shortcuts' features added; arguments and result are the
        base's.

        fine_pixel_values [pictures, tiles^2, 3, S, S]: finer views of the pictures, from the
        processor, where the plan reads them.
        num_items_in_batch: learned tokens of the whole step, over which the loss is then the mean,
        for every base. Raises ValueError where these are missing, RuntimeError where a shortcut did
        not fire exactly once.
        """
        named = {
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "logits_to_keep": logits_to_keep,
        }
        own = num_items_in_batch is not None and getattr(self.base, "accepts_loss_kwargs", True)
        if own:
            kwargs["num_items_in_batch"] = num_items_in_batch
        with self.shortcuts_active(fine_pixel_values) as call:
            output = self.base(
                input_ids, *args, **{k: v for k, v in named.items() if v is not None}, **kwargs
            )
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is not None and num_items_in_batch is not None and not own:
            # This base knows only the mean over the tokens it is given.
            loss = output["loss"] = loss * ((labels[:, 1:] != IGNORED).sum() / num_items_in_batch)
        if loss is not None and self.training and not call.is_fusion_used:
            # A text-only batch leaves fusion unused on this rank, but DDP needs a gradient from
            # every rank.
            output["loss"] = loss + 0.0 * sum(
                p.sum() for p in self.fusion.parameters() if p.requires_grad
            )
        return output

    @can_return_tuple
    def get_image_features(self, *args, fine_pixel_values: torch.Tensor | None = None, **kwargs):
        """The base's own image features with the shortcuts' beside them in pooler_output, for
        `mm_encoder_outputs`.
        """
        with self.shortcuts_active(fine_pixel_values):
            return self.base.get_image_features(*args, **kwargs)

    def generate(self, *args, fine_pixel_values: torch.Tensor | None = None, **kwargs):
        """The base's own `generate`, in every mode it has, with the shortcuts' features added to
        the prompt.
        """
        with self.shortcuts_active(fine_pixel_values):
            return self.base.generate(*args, **kwargs)

    def save_pretrained(
        self, folder: str | Path, *args, save_original_format: bool = False, **kwargs
    ):
        """Write the whole model, its weights named as they are here, not as in old files of the
        base; a Trainer reads them so.
        """
        return super().save_pretrained(
            folder, *args, save_original_format=save_original_format, **kwargs
        )

    def save_fusion(self, folder: str | Path, state_dict: dict | None = None) -> None:
        """Write the shortcuts alone: fusion.safetensors (weights) and fusion.json (the plan, the
        base's name and its digest).

        state_dict: the whole model's weights where its own are sharded between processes.
        Raises ValueError where an adapter stands inside the shortcuts.
        """
        fusion = self.fusion
        if hasattr(
            fusion, "modules_to_save"
        ):  # PEFT's wrapper, which trains a copy for each adapter
            fusion = fusion.modules_to_save[fusion.active_adapter]
        weights = fusion.state_dict()
        if state_dict is not None:
            weights = {name: state_dict[f"fusion.{name}"] for name in weights}
        weights = {name: value.contiguous() for name, value in weights.items()}
        if inside := [name for name in weights if "base_layer" in name]:
            raise UserError(
                f"an adapter stands inside the shortcuts (at {inside[0]}), whose weights are saved"
                " apart from any adapter; merge it (merge_and_unload), or leave the fusion out of"
                " it (exclude_modules=r'.*fusion.*')"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        facts = {
            "base": self.config.base_name,
            "base_type": self.config.base_config.model_type,
            "base_digest": self.config.base_digest,
            "plan": self.plan.to_dict(),
            "depths": [self.config.vision_depth, self.config.language_depth],
            "version": getattr(
                sys.modules[__package__], "__version__", None
            ),  # none where this is remote code
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")

    def detach(self) -> PreTrainedModel:
        """The base as it was given, with nothing of ours left on it; this model is of no use
        afterwards.
        """
        disconnect_all(self.family.parts(self.base))
        return self.base


def patch_rows(vision_config) -> int:
    """Rows of patches in one view of a fixed-size encoder."""
    size, patch = vision_config.image_size, vision_config.patch_size
    size, patch = (side if isinstance(side, int) else side[0] for side in (size, patch))
    return size // patch
