"""The configurations of both models: one joined from two parts, and an upgraded pretrained VLM."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.utils import CONFIG_NAME

from .encoders import PatchGrid, count_blocks, is_audio, is_staged, read_grid
from .loading import check_runs_no_code
from .methods import make_plan
from .plan import Plan
from .registration import get_model_classes, register_configurations, register_models
from .saved_code import write_code
from .schema import UserError

IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


@strict
class SparseCutConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseCutForConditionalGeneration`].

    Attributes:
        vision_config: Configuration of the vision (or audio) encoder, or its dict.
        text_config: Configuration of the causal language model, or its dict.
        plan: The shortcuts: a method's name, a method with options, or a whole plan. It is
            stored as a whole plan. Default: the method `sparsecut`.
        view_size: Pixels of a view, or (height, width). None for the encoder's own size.
            Encoders of images of any size may have none; some others have positions for one
            size only.
        image_token_id: The placeholder in `input_ids`, once per image token.
        mask_image_token: Give the placeholder's logit the lowest value, so that neither the loss
            nor decoding uses it. Conversions set it, as their vocabulary never had the
            placeholder. Elsewhere the generation config suppresses the placeholder.
        tie_word_embeddings: Not used: the language model's own configuration decides.

    Raises:
        UserError: The encoder or the language model is not supported, or the plan does not fit
            their depths.
    """

    model_type = "sparsecut"
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    plan: dict | str | None = None
    view_size: int | list[int] | tuple[int, ...] | None = None
    image_token_id: int = 32000
    mask_image_token: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        implementations = _read_implementations(self.vision_config, self.text_config)
        super().__post_init__(**kwargs)
        _restore_implementations(implementations)
        read_grid(self.vision_config, self.view_size)  # refuses encoders without a fixed grid
        check_text_config(self.text_config)
        spec = "sparsecut" if self.plan is None else self.plan
        plan = make_plan(spec, self.vision_depth, self.language_depth)
        check_plan(self.vision_config, plan)
        self.plan = plan.to_dict()
        register_models(SparseCutConfig)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """The configuration that a file holds; UserError where it would fetch and run code."""
        check_runs_no_code(config_dict, kwargs.get("name_or_path") or f"a {cls.model_type} model")
        return super().from_dict(without_gguf(config_dict), **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the code of the model; see `saved_code`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        _write_model_code(type(self), Path(save_directory))

    def get_plan(self) -> Plan:
        """The plan as a `Plan`."""
        return Plan.from_dict(self.plan)

    @property
    def vision_depth(self) -> int:
        """Number of encoder blocks."""
        return count_blocks(self.vision_config)

    @property
    def language_depth(self) -> int:
        """Number of decoder layers."""
        return self.text_config.get_text_config().num_hidden_layers

    @property
    def grid(self) -> PatchGrid:
        """Shape of a view and layout of its patches, read from the encoder's configuration."""
        taps = None
        if is_staged(self.vision_config):
            taps = self.get_plan().resolved_taps(self.vision_depth)
        return read_grid(self.vision_config, self.view_size, taps)

    @property
    def num_patches(self) -> int:
        """Patches of one view."""
        return self.grid.num_patches

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of a view in pixels, or (height, width); for audio (mels, frames)."""
        height, width = self.grid.view[-2:]
        if height == width and not is_audio(self.vision_config):
            return height
        return height, width

    @property
    def num_image_tokens(self) -> int:
        """Positions of one image in the prompt."""
        return self.get_plan().image_tokens(self.num_patches, self.grid.rows)


@strict
class SparseCutUpgradeConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseCutUpgrade`].

    Attributes:
        base_config: Configuration of the pretrained VLM that was upgraded, or its dict.
        plan: The shortcuts, as a whole plan.
        base_name: Hub name or folder of the base. None once the base's weights were trained.
        base_digest: `fingerprint.base_hash` of the base, to recognize it again.
        tie_word_embeddings: Whether the base ties its embeddings to its head.
    """

    model_type = "sparsecut_upgrade"
    sub_configs_defaults: ClassVar[dict] = {
        "base_config": SubConfigSpec(config_class=AutoConfig, model_type="llava")
    }

    base_config: dict | PreTrainedConfig | None = None
    plan: dict | None = None
    base_name: str | None = None
    base_digest: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        register_models(SparseCutUpgradeConfig)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> Any:
        """The configuration that a file holds; UserError where it would fetch and run code."""
        check_runs_no_code(config_dict, kwargs.get("name_or_path") or f"a {cls.model_type} model")
        return super().from_dict(without_gguf(config_dict), **kwargs)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Write config.json, and beside it the code of the model; see `saved_code`."""
        super().save_pretrained(save_directory, *args, **kwargs)
        _write_model_code(type(self), Path(save_directory))

    @classmethod
    def from_base(
        cls, base: Any, plan: Plan, name: str | None, digest: str | None
    ) -> SparseCutUpgradeConfig:
        """Make the configuration of a loaded base under a plan.

        Args:
            base: The loaded pretrained VLM.
            plan: The plan of its shortcuts.
            name: The base's hub name or folder, where known.
            digest: The base's hash, see `fingerprint.base_hash`.
        """
        # Copied, because transformers resets a sub-configuration that is handed over.
        return cls(
            base_config=copy.deepcopy(base.config),
            plan=plan.to_dict(),
            base_name=name,
            base_digest=digest,
        )

    def get_plan(self) -> Plan:
        """The plan as a `Plan`."""
        return Plan.from_dict(self.plan)

    def get_text_config(self, decoder: Any = None, encoder: Any = None) -> PreTrainedConfig:
        """The configuration of the base's language model."""
        return self.base_config.get_text_config(decoder=decoder, encoder=encoder)

    @property
    def text_config(self) -> PreTrainedConfig:
        """The configuration of the base's language model."""
        return self.base_config.get_text_config()

    @property
    def vision_config(self) -> PreTrainedConfig:
        """The configuration of the base's vision encoder."""
        return self.base_config.vision_config

    @property
    def vision_depth(self) -> int:
        """Number of encoder blocks."""
        vision = self.vision_config
        if hasattr(vision, "num_hidden_layers"):
            return vision.num_hidden_layers
        return vision.depth

    @property
    def language_depth(self) -> int:
        """Number of decoder layers."""
        return self.text_config.num_hidden_layers

    @property
    def image_token_id(self) -> int:
        """The base's placeholder for one image token."""
        return self.base_config.image_token_id


def _write_model_code(config_class: type, folder: Path) -> None:
    """Write the code of a configuration and of its models beside its config.json."""
    auto_map = {"AutoConfig": f"configuration.{config_class.__name__}"}
    classes = [config_class]
    for auto_class, model_class in get_model_classes(config_class).items():
        classes.append(model_class)
        module = model_class.__module__.rpartition(".")[2]
        auto_map[auto_class] = f"{module}.{model_class.__name__}"
    write_code(folder / CONFIG_NAME, classes, auto_map)


def without_gguf(values: Any) -> Any:
    """A configuration without a note that its language model was once read from a GGUF file.

    Earlier versions saved it. Weights in a folder of ours are never in that format.
    """
    if not isinstance(values, dict):
        return values
    kept = {}
    for key, value in values.items():
        is_note = key == "quantization_config" and isinstance(value, dict)
        if not (is_note and value.get("quant_method") == "gguf"):
            kept[key] = without_gguf(value)
    return kept


def _read_implementations(*configs: Any) -> list[tuple]:
    """How sub-configurations compute attention and experts: (config, name, value).

    PreTrainedConfig resets this on sub-configurations, also of models that already run with it.
    """
    ready = [config for config in configs if isinstance(config, PreTrainedConfig)]
    return [(config, name, getattr(config, name)) for config in ready for name in IMPLEMENTATIONS]


def _restore_implementations(implementations: list[tuple]) -> None:
    for config, name, value in implementations:
        if getattr(config, name) is None:
            setattr(config, name, value)


def check_plan(vision_config: Any, plan: Plan) -> None:
    """Raise UserError for plans of upgraded models, and for fine views of audio, which has none."""
    if plan.has_base_input:
        raise UserError(
            "the plan has mix='base', which stands for a pretrained VLM's own input, but a joined"
            " model has none; give layer 0 a shortcut with taps, or use sparsecut.upgrade"
        )
    if plan.tiles and is_audio(vision_config):
        raise UserError(
            f"the plan has tiles={plan.tiles}, but {vision_config.model_type} is an audio encoder,"
            " and audio has no fine views; set tiles to 0, for example"
            " {'method': 'sparsecut', 'tiles': 0}"
        )


def check_text_config(config: Any) -> None:
    """Raise UserError for language models that cannot read embeddings from left to right."""
    text = config.get_text_config()
    encoder_fields = ("encoder_layers", "num_encoder_layers", "decoder_layers")
    reasons = []
    if config.is_encoder_decoder or any(hasattr(text, name) for name in encoder_fields):
        reasons.append("is part of an encoder-decoder pair")
    elif hasattr(text, "add_cross_attention") and not getattr(text, "is_decoder", True):
        reasons.append("attends to later tokens too (is_decoder is false)")
    if getattr(text, "hidden_size_per_layer_input", 0):
        reasons.append("reads the token ids again in every layer (hidden_size_per_layer_input)")
    if reasons:
        raise UserError(
            f"the language model {config.model_type} {' and '.join(reasons)}. Image features can"
            " only be given to a decoder that reads embeddings from left to right; use a"
            " decoder-only transformer such as Llama, Qwen or Mistral"
        )


register_configurations()


def _keeps_keys_and_values(module: nn.Module) -> bool:
    """Whether a language model has a cache of keys and values: state-space models have none."""
    from .hooks import CACHE_NAMES, get_argument_names

    layer_types = getattr(module.config.get_text_config(), "layer_types", None)
    if layer_types and set(layer_types) == {"linear_attention"}:
        return False
    has_default_cache = getattr(module, "_supports_default_dynamic_cache", lambda: True)
    if getattr(module, "_is_stateful", False) and not has_default_cache():
        return False
    return bool(get_argument_names(module) & set(CACHE_NAMES))


def check_language_model(module: nn.Module) -> None:
    """Raise UserError for a language model that takes no embeddings or no cache."""
    from .hooks import get_argument_names  # it needs all of transformers

    missing = sorted({"inputs_embeds"} - get_argument_names(module))
    if not _keeps_keys_and_values(module):
        missing.append("a cache of keys and values")
    if missing:
        raise UserError(
            f"{type(module).__name__} does not take {' or '.join(missing)}. Image features"
            " and generation need both; use a decoder-only transformer such as Llama, Qwen or"
            " Mistral"
        )
