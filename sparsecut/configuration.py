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
        # The base class resets how sub-configurations compute attention and experts, also of models that already run with it.
        ready = [c for c in (self.vision_config, self.text_config) if isinstance(c, PreTrainedConfig)]
        names = ("_attn_implementation", "_experts_implementation")
        kept = [(config, name, getattr(config, name)) for config in ready for name in names]
        super().__post_init__(**kwargs)
        for config, name, implementation in kept:
            if getattr(config, name) is None:
                setattr(config, name, implementation)
        check_vision_config(self.vision_config)
        check_text_config(self.text_config)
        spec = "sparsecut" if self.plan is None else self.plan
        self.plan = make_plan(spec, self.vision_depth, self.language_depth).to_dict()
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
        return _side(self.vision_config, "image_size") // _side(self.vision_config, "patch_size")

    @property
    def image_size(self) -> int:
        """Side of one view in pixels."""
        return _side(self.vision_config, "image_size")

    @property
    def num_image_tokens(self) -> int:
        """Positions one picture takes in the prompt."""
        return self.get_plan().image_tokens(self.patch_rows**2)


# Encoders with an image size and a patch size whose blocks do not end with one state per patch, row by row: windows that
# merge, packed or masked patches, feature maps, detection tokens at the end, videos.
UNSUPPORTED_ENCODERS = (
    "convnext",
    "convnextv2",
    "donut-swin",
    "hiera",
    "maskformer-swin",
    "mgp-str",
    "pixtral",
    "sam3_vit_model",
    "sam_hq_vision_model",
    "sam_vision_model",
    "siglip2_vision_model",
    "swin",
    "swin2sr",
    "swinv2",
    "timesformer",
    "videomae",
    "vit_mae",
    "vitdet",
    "vivit",
    "yolos",
)


def check_vision_config(config) -> None:
    """Refuse an encoder whose blocks are not known to put out a fixed square grid of patches."""
    sides = {name: getattr(config, name, None) for name in ("image_size", "patch_size")}
    sizes = {name: getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size")}
    pairs = [value if isinstance(value, list | tuple) else (value, value) for value in sides.values()]
    whole = all(isinstance(n, int) for n in (*sizes.values(), *(n for pair in pairs for n in pair)))
    if config.model_type in UNSUPPORTED_ENCODERS or not whole:
        given = ", ".join(f"{name}={value!r}" for name, value in (sides | sizes).items())
        raise ValueError(
            f"the vision encoder {config.model_type} has {given}, but a stack of blocks over a fixed square grid of patches is "
            "needed; use an encoder like CLIP, SigLIP, ViT or DINOv2 (packed, windowed, masked and convolutional ones are not supported)"
        )
    for name, pair in zip(sides, pairs, strict=True):
        if pair[0] != pair[1]:
            raise ValueError(
                f"the vision encoder {config.model_type} has {name}={sides[name]!r}, but views are square; use a square one"
            )
    (size, _), (patch, _) = pairs
    if size % patch:
        raise ValueError(
            f"{config.model_type} has image_size {size}, which is not a multiple of its patch_size {patch}; "
            f"set image_size to {size // patch * patch} or use another encoder"
        )


def check_text_config(config) -> None:
    """Refuse language models that cannot read a prompt of embeddings from left to right, where a configuration tells."""
    text, reasons = config.get_text_config(), []
    if config.is_encoder_decoder or any(hasattr(text, f"{n}_layers") for n in ("encoder", "num_encoder", "decoder")):
        reasons.append("belongs to a pair of encoder and decoder")
    elif hasattr(text, "add_cross_attention") and not getattr(text, "is_decoder", True):
        reasons.append("looks at later tokens too (is_decoder is false)")
    if getattr(text, "hidden_size_per_layer_input", 0):
        reasons.append("reads the token ids again in every layer (hidden_size_per_layer_input)")
    if reasons:
        raise ValueError(
            f"the language model {config.model_type} {' and '.join(reasons)}, but image features can only be given to a decoder "
            "that reads embeddings from left to right; use a decoder-only transformer such as Llama, Qwen or Mistral"
        )


def _side(vision_config, name: str) -> int:
    value = getattr(vision_config, name)
    return value if isinstance(value, int) else value[0]


register_configuration()
