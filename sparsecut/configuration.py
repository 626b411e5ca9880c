"""The configuration of a SparseCut model: an encoder's, a language model's, and the plan that connects them."""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .methods import make_plan
from .plan import Plan
from .registration import register_configuration, register_model


@strict
class SparseCutConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseCutForConditionalGeneration`].

    vision_config, text_config: configurations (or their dicts) of any supported encoder and causal language model.
    plan: a method's name, a method with options, or a plan in full; kept in full, and refused if it does not fit the depths.
    image_token_id: the placeholder that stands once per image token in `input_ids`.
    mask_image_token: give the placeholder's logit the lowest value, so that neither loss nor decoding knows of it. Set by
        conversions, whose vocabulary never had the placeholder; elsewhere the generation config suppresses it.
    """

    model_type = "sparsecut"
    sub_configs_defaults: ClassVar[dict] = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    plan: dict | str | None = None
    image_token_id: int = 32000
    mask_image_token: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # The base class resets the attention implementation of sub-configurations, also of models that already run with one.
        ready = [c for c in (self.vision_config, self.text_config) if isinstance(c, PreTrainedConfig)]
        kept = [(c, c._attn_implementation) for c in ready]
        super().__post_init__(**kwargs)
        for config, implementation in kept:
            if config._attn_implementation is None:
                config._attn_implementation = implementation
        spec = "sparsecut" if self.plan is None else self.plan
        self.plan = make_plan(spec, self.vision_depth, self.language_depth).to_dict()
        _ = self.patch_rows  # refuse an encoder without a known grid before anything is built
        register_model()

    def get_plan(self) -> Plan:
        """The plan as data of this package."""
        return Plan.from_dict(self.plan)

    @property
    def vision_depth(self) -> int:
        """Number of encoder blocks."""
        return self.vision_config.num_hidden_layers

    @property
    def language_depth(self) -> int:
        """Number of decoder layers."""
        return self.text_config.get_text_config().num_hidden_layers

    @property
    def patch_rows(self) -> int:
        """Rows (and columns) of patches in one view: image size over patch size, never a length of something."""
        size, patch = (_side(self.vision_config, name) for name in ("image_size", "patch_size"))
        if size % patch:
            raise ValueError(
                f"{self.vision_config.model_type} has image_size {size}, which is not a multiple of its patch_size {patch}; "
                f"set image_size to {size // patch * patch} or use another encoder"
            )
        return size // patch

    @property
    def image_size(self) -> int:
        """Side of one view in pixels."""
        return _side(self.vision_config, "image_size")

    @property
    def num_image_tokens(self) -> int:
        """Positions one picture takes in the prompt."""
        return self.get_plan().image_tokens(self.patch_rows**2)


def _side(vision_config, name: str) -> int:
    value = getattr(vision_config, name, None)
    pair = value if isinstance(value, list | tuple) else (value, value)
    if vision_config.model_type in UNSUPPORTED_ENCODERS or any(not isinstance(v, int) for v in pair):
        raise ValueError(
            f"the vision encoder {vision_config.model_type} has {name}={value!r}, but a fixed square grid of patches is needed; "
            "use an encoder like CLIP, SigLIP, ViT or DINOv2 (packed, windowed and variable-size encoders are not supported)"
        )
    if pair[0] != pair[1]:
        raise ValueError(
            f"the vision encoder {vision_config.model_type} has {name}={value!r}, but views are square; use a square one"
        )
    return pair[0]


UNSUPPORTED_ENCODERS = (
    "pixtral",
    "siglip2_vision_model",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "swin",
    "swinv2",
    "sam_vision_model",
)

register_configuration()
