"""The upgraded model: a pretrained VLM, unchanged, with the fusion beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .adapters import check_no_other_adapters, save_adapters
from .configuration import SparseCutUpgradeConfig
from .families import get_family
from .fusion import Fusion
from .hooks import RECOMPUTES_HOOKS, get_unsplit_classes, name_cache
from .modeling_base import (
    IGNORED,
    SparseCutPreTrainedModel,
    has_part_below_head,
    share_modules,
    without_head,
)
from .schema import UserError
from .upgrade_hooks import (
    UpgradeCall,
    connect,
    disconnect_all,
    get_encoder_depth,
    get_encoder_width,
    make_position_counter,
    shortcuts_active,
)

WEIGHTS, FACTS = "fusion.safetensors", "fusion.json"


class SparseCutUpgradeModel(SparseCutPreTrainedModel):
    r"""A pretrained VLM without its head (`base`), with sparse shortcuts into its decoder.

    Its inputs are those of its base, and `fine_pixel_values` where the plan reads fine views.
    Called directly, the base runs without shortcuts.

    Args:
        config: The base's configuration and the plan.
        base: The base, if it is loaded already. Default: a new one. It is connected, not copied.

    Raises:
        UserError: The base is of no supported family.
    """

    config: SparseCutUpgradeConfig
    config_class = SparseCutUpgradeConfig
    is_upgrade = True
    supports_feature_cache = False  # the base runs its encoder in its own way
    supports_packing = True  # whether this base keeps packed records apart is tried

    def __init__(self, config: SparseCutUpgradeConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.plan = config.get_plan()
        if base is None:
            if config.tie_word_embeddings:
                config.base_config.tie_word_embeddings = True
            base = AutoModelForImageTextToText.from_config(config.base_config)
        if not self.has_head:
            base = without_head(base)
            above = rf"^base\.(?!{base.base_model_prefix}\.)"
            self._keys_to_ignore_on_load_unexpected = [above]
        self.base = base
        self.family = get_family(base)
        parts = self.family.parts(base)
        self.fusion = Fusion(
            self.plan,
            vision_depth=get_encoder_depth(parts.vision),
            vision_dim=get_encoder_width(parts.vision),
            language_dim=parts.language.config.get_text_config().hidden_size,
            rows=count_patch_rows(parts.vision.config) if self.plan.tiles else 1,
            num_under=self.family.patches_under(base),
        )
        connect(parts)
        self.post_init()
        self._no_split_modules = get_unsplit_classes(self)

    @property
    def saves_fusion_only(self) -> bool:
        """Whether `save_fusion` is enough to load the model again, as its base has a known name."""
        return self.config.base_name is not None

    def get_position_counter(self) -> Any:
        """What counts positions of packed records, where the base has several axes; else None."""
        return make_position_counter(self.family.parts(self.base).inner)

    def vision_backbone(self) -> nn.Module:
        """The base's vision encoder."""
        return self.family.parts(self.base).vision

    def language_backbone(self) -> nn.Module:
        """The base's language model, without its head."""
        return self.family.parts(self.base).language

    def get_input_embeddings(self) -> Any:
        """Return the token embedding of the language model."""
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the token embedding of the language model."""
        self.base.set_input_embeddings(value)

    def get_encoder(self, modality: str | None = None) -> Any:
        """Return the base's encoder of "image", "video" or "audio"; the base where it has none."""
        return self.base.get_encoder(modality)

    def get_decoder(self) -> Any:
        """Return the decoder of the language model."""
        return self.base.get_decoder()

    def shortcuts_active(self, fine_pixel_values: Tensor | None = None) -> Any:
        """A context in which the base's own calls have the shortcuts, in this thread.

        Args:
            fine_pixel_values: See `SparseCutUpgrade.forward`.

        Yields:
            The `UpgradeCall`: what is known of the call.
        """
        parts = self.family.parts(self.base)
        return shortcuts_active(UpgradeCall(self.family, parts, self.fusion, fine_pixel_values))

    def split_views(self, inputs: dict) -> tuple[dict, Tensor | None]:
        """Split a call's inputs into the base's own and the fine views.

        Args:
            inputs: Arguments with `pixel_values` of the coarse views [images, 3, S, S] and
                `fine_pixel_values`, or with `pixel_values` of all views together
                [images, 1 + tiles^2, 3, S, S], coarse view first.
        """
        rest = {name: value for name, value in inputs.items() if name != "fine_pixel_values"}
        fine = inputs.get("fine_pixel_values")
        pixels = inputs.get("pixel_values")
        if fine is None and self.plan.tiles and pixels is not None and pixels.dim() == 5:
            return {**rest, "pixel_values": pixels[:, 0]}, pixels[:, 1:]
        return rest, fine

    def forward(self, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Hidden states: the base model's own forward, with the shortcuts' features added.

        Args:
            input_ids: [B, L].
            *args: As the base model takes them.
            **kwargs: As the base model takes them, and `fine_pixel_values`; see
                `SparseCutUpgrade.forward`.
        """
        kwargs, fine_pixel_values = self.split_views(kwargs)
        with self.shortcuts_active(fine_pixel_values) as call:
            output = self.base.base_model(input_ids, *args, **kwargs)
        if isinstance(output, dict):
            states = output["last_hidden_state"]
            output["last_hidden_state"] = self.include_fusion(states, call.is_fusion_used)
        return output

    @can_return_tuple
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own image features, with the shortcuts' beside them in `pooler_output`.

        They can be given to `forward` and `generate` as `mm_encoder_outputs`.
        """
        kwargs, fine_pixel_values = self.split_views(kwargs)
        with self.shortcuts_active(fine_pixel_values):
            return self.base.get_image_features(*args, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        save_original_format: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Write the whole model, weights named as here and not as in old files of the base.

        A Trainer reads them under these names.
        """
        return super().save_pretrained(
            save_directory, *args, save_original_format=save_original_format, **kwargs
        )

    def detach(self) -> PreTrainedModel:
        """Take everything of ours off the base and return it; this model is unusable afterwards."""
        disconnect_all(self.family.parts(self.base))
        return self.base


class SparseCutUpgrade(SparseCutUpgradeModel, GenerationMixin):
    r"""A pretrained VLM (`base`) whose decoder receives sparse shortcuts besides its own input.

    forward, generate, cache and prompt format are the base's own. Until the fusion is trained,
    the model answers exactly as its base (arXiv 2602.00505).

    Args:
        config: The base's configuration and the plan.
        base: The base, if it is loaded already. Default: a new one. It is connected, not copied.
    """

    has_head = True

    @property
    def generation_config(self) -> Any:
        """The base's own generation settings."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        if "base" in self._modules:  # not yet while PreTrainedModel.__init__ runs
            self.base.generation_config = value

    @property
    def base_model(self) -> nn.Module:
        """The same modules without the head."""
        if "base" not in self._modules or not has_part_below_head(self.base):
            return self
        modules = {"base": without_head(self.base), "fusion": self.fusion}
        return share_modules(self, SparseCutUpgradeModel, modules)

    def get_output_embeddings(self) -> Any:
        """Return the head of the language model."""
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace the head of the language model."""
        self.base.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        pixel_values: Tensor | None = None,
        fine_pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's own forward, with the shortcuts' features added.

        Arguments and result are the base's, besides these.

        Args:
            pixel_values: As the base takes them. Where the plan reads fine views, also all views
                together, [images, 1 + tiles^2, 3, S, S].
            fine_pixel_values: Fine views of the images, [images, tiles^2, 3, S, S], from the
                processor, where the plan reads them.
            num_items_in_batch: Number of tokens with a label in the whole step. The loss is then
                the mean over these, whatever the base.
            cache: What transformers 5.24 calls `past_key_values`; every release takes both names.

        Raises:
            UserError: Fine views are missing, or a video is given.
            RuntimeError: A shortcut did not fire exactly once.
        """
        _refuse_videos(kwargs)
        images = {"pixel_values": pixel_values, "fine_pixel_values": fine_pixel_values}
        images, fine_pixel_values = self.split_views(images)
        named = {
            **images,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            **name_cache(self.base, past_key_values if cache is None else cache),
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "logits_to_keep": logits_to_keep,
        }
        base_scales_loss = getattr(self.base, "accepts_loss_kwargs", True)
        if base_scales_loss:
            named = {**named, "num_items_in_batch": num_items_in_batch}
        # A new dict: torch.compile breaks the graph of some bases where a dict is changed.
        arguments = {name: value for name, value in named.items() if value is not None}
        with self.shortcuts_active(fine_pixel_values) as call:
            output = self.base(input_ids, *args, **arguments, **kwargs)
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is None:
            return output
        if num_items_in_batch is not None and not base_scales_loss:
            # This base takes the mean over the tokens of this batch.
            num_labels = (labels[:, 1:] != IGNORED).sum()
            loss = output["loss"] = loss * (num_labels / num_items_in_batch)
        output["loss"] = self.include_fusion(loss, call.is_fusion_used)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own `generate`, with the shortcuts' features added to the prompt.

        Raises:
            UserError: A prompt with images is read in chunks, before transformers 5.23.
        """
        _refuse_videos(kwargs)
        _check_chunked_prefill(kwargs, self.generation_config)
        kwargs, fine_pixel_values = self.split_views(kwargs)
        with self.shortcuts_active(fine_pixel_values):
            return self.base.generate(*args, **kwargs)

    def save_fusion(
        self,
        folder: str | Path,
        state_dict: dict | None = None,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **settings: Any,
    ) -> None:
        """Write the shortcuts alone: their weights, the plan, and which base they belong to.

        Adapters on parts of the base are written beside them.

        Args:
            folder: Where fusion.safetensors and fusion.json go.
            state_dict: The whole model's weights, where they are sharded between processes.
            push_to_hub: Push them too; see `push_fusion`.
            repo_id: The repository's name on the hub. Default: the folder's.
            **settings: For `push_fusion`.

        Raises:
            UserError: An adapter is inside the shortcuts, or the folder holds one of another model.
        """
        check_no_other_adapters(self, Path(folder))
        weights = self._read_fusion_weights(state_dict)
        inside = [name for name in weights if "base_layer" in name]
        if inside:
            raise UserError(
                f"an adapter is inside the shortcuts (at {inside[0]}), whose weights are saved"
                " without adapters; merge it (merge_and_unload), or leave the fusion out of it"
                " (exclude_modules=r'.*fusion.*')"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / WEIGHTS)
        config = self.config
        facts = {
            "base": config.base_name,
            "base_type": config.base_config.model_type,
            "base_digest": config.base_digest,
            "plan": self.plan.to_dict(),
            "depths": [config.vision_depth, config.language_depth],
            # None where this file runs as remote code
            "version": getattr(sys.modules[__package__], "__version__", None),
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        save_adapters(self, folder)
        if push_to_hub:
            self.push_fusion(repo_id or folder.resolve().name, **settings)

    def push_fusion(self, repo_id: str, processor: Any = None, **settings: Any) -> str:
        """Push the shortcuts alone to the hub, to a small repository that names its base.

        `sparsecut.load` takes its name. Adapters are pushed with them.

        Args:
            repo_id: The repository's name, "owner/shortcuts".
            processor: The processor, if it is another one than the base's.
            **settings: See `sharing.push_folder`: private, token, dry_run.

        Returns:
            The address of the repository.

        Raises:
            UserError: The hub refuses it, or the package is missing, as in code saved with a model.
        """
        if find_spec(f"{__package__}.sharing") is None:
            raise UserError("shortcuts alone are pushed by the package; run pip install sparsecut")
        sharing = import_module(
            f"{__package__}.sharing"
        )  # by name, as it is not saved with a model
        return sharing.push_fusion(self, repo_id, processor=processor, **settings)

    def _read_fusion_weights(self, state_dict: dict | None) -> dict[str, Tensor]:
        fusion = self.fusion
        # PEFT's wrapper trains a copy for each adapter.
        if (copies := getattr(fusion, "modules_to_save", None)) is not None:
            fusion = copies[fusion.active_adapter]
        weights = {}
        for name, value in fusion.state_dict().items():
            if state_dict is not None:
                value = state_dict[f"fusion.{name}"]
            weights[name] = value.contiguous()
        return weights


def _check_chunked_prefill(inputs: Mapping, generation_config: Any) -> None:
    """Before 5.23: refuse chunks of a prompt with images, as every chunk would get all images."""
    config = inputs.get("generation_config") or generation_config
    size = inputs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
    if RECOMPUTES_HOOKS and size and inputs.get("pixel_values") is not None:
        raise UserError(
            f"prefill_chunk_size is {size}, but before 5.23 transformers gives every chunk all"
            " images; leave it out, or install transformers>=5.23"
        )


def count_patch_rows(vision_config: Any) -> int:
    """Rows of patches in one view of a fixed-size encoder."""
    size, patch = vision_config.image_size, vision_config.patch_size
    if not isinstance(size, int):
        size = size[0]
    if not isinstance(patch, int):
        patch = patch[0]
    return size // patch


def _refuse_videos(arguments: dict) -> None:
    """Raise UserError for a video: the shortcuts would add nothing to it, without a word."""
    if arguments.get("pixel_values_videos") is not None:
        raise UserError(
            "a video was given (pixel_values_videos), but shortcuts read images only and would add"
            " nothing to its frames; give some frames as images"
        )
