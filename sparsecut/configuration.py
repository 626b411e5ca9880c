"""The configuration of a SparseCut model: an encoder's, a language model's, and the plan that
connects them.
"""

from __future__ import annotations

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from .encoders import PatchGrid, is_audio, read_grid
from .methods import make_plan
from .plan import Plan
from .registration import register_configuration, register_model
from .schema import UserError


@strict
class SparseCutConfig(PreTrainedConfig):
    r"""
    Configuration of [`SparseCutForConditionalGeneration`].

    vision_config, text_config: configurations (or their dicts) of any supported encoder and causal
    language model.
    plan: a method's name, a method with options, or a plan in full; kept in full, and refused if it
    does not fit the depths.
    view_size: pixels of a view, or (height, width), for encoders that take pictures of any size;
    else the encoder's own.
    image_token_id: the placeholder that stands once per image token in `input_ids`.
    mask_image_token: give the placeholder's logit the lowest value, so that neither loss nor
    decoding knows of it. Set by
        conversions, whose vocabulary never had the placeholder; elsewhere the generation config
        suppresses it.
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

    def __post_init__(self, **kwargs):
        # The base class resets how sub-configurations compute attention and experts, also of models
        # that already run with it.
        ready = [
            c for c in (self.vision_config, self.text_config) if isinstance(c, PreTrainedConfig)
        ]
        names = ("_attn_implementation", "_experts_implementation")
        kept = [(config, name, getattr(config, name)) for config in ready for name in names]
        super().__post_init__(**kwargs)
        for config, name, implementation in kept:
            if getattr(config, name) is None:
                setattr(config, name, implementation)
        grid = read_grid(self.vision_config, self.view_size)
        check_text_config(self.text_config)
        spec = "sparsecut" if self.plan is None else self.plan
        plan = make_plan(spec, self.vision_depth, self.language_depth)
        check_fine_views(self.vision_config, grid, plan)
        self.plan = plan.to_dict()
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
    def grid(self) -> PatchGrid:
        """What a view is and how its patches lie, from sizes of the encoder's configuration, never
        a length of something.
        """
        return read_grid(self.vision_config, self.view_size)

    @property
    def num_patches(self) -> int:
        """Patches of one view."""
        return self.grid.num_patches

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Side of one view in pixels, or height and width where they differ; of a sound, mels and
        frames.
        """
        height, width = self.grid.view[-2:]
        return height if height == width and not is_audio(self.vision_config) else (height, width)

    @property
    def num_image_tokens(self) -> int:
        """Positions one picture takes in the prompt."""
        return self.get_plan().image_tokens(self.num_patches)


def check_fine_views(vision_config, grid: PatchGrid, plan: Plan) -> None:
    """Refuse fine views of a sound, which has one view."""
    if plan.tiles and is_audio(vision_config):
        raise UserError(
            f"the plan has tiles={plan.tiles}, but {vision_config.model_type} listens to sounds,"
            " which have no finer views; choose a plan without, for example {'method':"
            " 'sparsecut', 'tiles': 0}"
        )


def check_text_config(config) -> None:
    """Refuse language models that cannot read a prompt of embeddings from left to right, where a
    configuration tells.
    """
    text, reasons = config.get_text_config(), []
    if config.is_encoder_decoder or any(
        hasattr(text, f"{n}_layers") for n in ("encoder", "num_encoder", "decoder")
    ):
        reasons.append("belongs to a pair of encoder and decoder")
    elif hasattr(text, "add_cross_attention") and not getattr(text, "is_decoder", True):
        reasons.append("looks at later tokens too (is_decoder is false)")
    if getattr(text, "hidden_size_per_layer_input", 0):
        reasons.append("reads the token ids again in every layer (hidden_size_per_layer_input)")
    if reasons:
        raise UserError(
            f"the language model {config.model_type} {' and '.join(reasons)}, but image features"
            " can only be given to a decoder that reads embeddings from left to right; use a"
            " decoder-only transformer such as Llama, Qwen or Mistral"
        )


register_configuration()
