"""The common base of both kinds of model: base class, outputs, and checks of image inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)

from .any_size import check_places
from .encoders import PatchGrid, encoder_inputs
from .fusion import Fusion, check_adapted_fusion
from .gradient_hooks import remove_gradient_hooks, take_tuples
from .hooks import CACHE_NAMES
from .loading import check_not_bare_vllm, is_quantized
from .placeholders import IGNORED as IGNORED
from .plan import Plan
from .saved_model import SavedModel
from .schema import UserError


class SparseCutPreTrainedModel(SavedModel):
    """Base of the joined model (`modeling`) and of the upgraded one (`modeling_upgraded`).

    Code that works with either kind asks this interface, never for attributes of one kind.

    Attributes:
        is_upgrade: The model is a pretrained VLM with shortcuts on top (`base`, `family`).
        supports_feature_cache: The encoder runs apart from the rest, so that vision features can be
            cached and given back instead of pixels.
        supports_packing: Several examples may share a row, with position ids of their own.
        has_head: The language model has its head, so the model gives logits and generates.
        plan: The shortcuts, as data.
        fusion: The trained modules of the shortcuts.
    """

    is_upgrade: ClassVar[bool] = False
    supports_feature_cache: ClassVar[bool] = True
    supports_packing: ClassVar[bool] = True
    has_head: ClassVar[bool] = False
    _has_checked_adapters = False
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
    _skip_keys_device_placement: ClassVar[list] = list(CACHE_NAMES)
    _no_split_modules: ClassVar[list] = ["Fusion", "ContextGate", "ZeroContextGate"]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        check_not_bare_vllm(config)
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Finish as transformers does; no quantizer is to touch the shortcuts."""
        super().post_init()
        if is_quantized(self.config):
            # This is the list that all quantizers of transformers leave out.
            kept = {*(self._keep_in_fp32_modules or ()), "fusion"}
            parts = self.config.text_config, self.config.vision_config
            if [is_quantized(part) for part in parts] == [True, False]:
                kept.add("vision_tower")  # it was joined to a quantized language model
            self._keep_in_fp32_modules = kept

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

    def count_parameters(self) -> dict[str, int]:
        """Numbers of parameters by the names of `parameter_groups`."""
        counts = {}
        for name, parameters in self.parameter_groups().items():
            counts[name] = sum(parameter.numel() for parameter in parameters)
        return counts

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
        language += _parameters_outside(head, language)
        if not self.is_upgrade:
            return {"vision": vision, "fusion": fusion, "language": language, "head": head}
        projector = _parameters_outside(self.parameters(), [*vision, *fusion, *language])
        return {
            "vision": vision,
            "projector": projector,
            "fusion": fusion,
            "language": language,
            "head": head,
        }

    def enable_input_require_grads(self) -> None:
        """Let embeddings require a gradient, so that checkpointed layers pass one on.

        A frozen vision encoder is left out: it would store its activations and run backward for
        nothing. An encoder with any trained parameter or adapter is not: reentrant checkpointing
        gives no gradient to blocks whose input requires none.
        """
        self.disable_input_require_grads()
        super().enable_input_require_grads()
        take_tuples(self)
        vision = self.parameter_groups()["vision"]
        if not any(p.requires_grad for p in vision):
            remove_gradient_hooks(self, vision)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; see `check_adapted_fusion` for what is refused inside PEFT's wrapper.

        An encoder's batch statistics stay those it was trained with. Otherwise a frozen encoder
        would change while the fusion is trained.
        """
        if mode and getattr(self, "peft_config", None) and not self._has_checked_adapters:
            check_adapted_fusion(self.fusion)
            self._has_checked_adapters = True
        super().train(mode)
        for module in self.vision_backbone().modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def include_fusion(self, values: Tensor, is_used: bool) -> Tensor:
        """Add a zero that depends on every trained parameter of an unused fusion, in training.

        A text-only batch leaves the fusion unused on this rank, but DDP needs a gradient of every
        parameter from every rank, and backward needs one parameter at least.

        Args:
            values: A loss, or hidden states of a trainer that makes its loss of them.
            is_used: Whether they depend on the fusion.
        """
        if is_used or not self.training:
            return values
        zero = 0.0 * sum(p.sum() for p in self.fusion.parameters() if p.requires_grad)
        return values + (zero.to(values) if isinstance(zero, Tensor) else zero)

    @classmethod
    def is_custom_code(cls) -> bool:
        """No: our `_init_weights` keeps transformers' rules.

        For custom code transformers would not initialize modules such as CLIP's attention.
        """
        return False

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        if isinstance(module, Fusion):
            for values, start in module.initial_values():
                if isinstance(start, tuple):
                    init.uniform_(values, *start)
                else:
                    init.constant_(values, start)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


def _parameters_outside(parameters: Iterable, known: Iterable) -> list[nn.Parameter]:
    known_ids = {id(parameter) for parameter in known}
    return [parameter for parameter in parameters if id(parameter) not in known_ids]


@dataclass
class SparseCutImageFeatures(BaseModelOutputWithPooling):
    """Fused features of images, under names that `generate` knows.

    `generate` repeats these lists for beams and cuts them for chunked prefill.

    Attributes:
        last_hidden_state: The deepest vision features read from the coarse views, [P, N, D]; of
            images of any size [S, D].
        pooler_output: Features for the input, [N', H] for each image.
        deepstack_features: The same for each layer of `plan.layers`; None where there is none.
        pixel_values: The pixels they were made from, for an assistant model in decoding.
        image_grids: The grids of images of any size.
    """

    deepstack_features: list[list[Tensor]] | None = None
    pixel_values: Tensor | None = None
    image_grids: Tensor | None = None


@dataclass
class SparseCutModelOutputWithPast(BaseModelOutputWithPast):
    """Output of a model without a head.

    The base class has the states after the last decoder layer and its norm [B, L, H], the cache
    under this release's name, and what was requested besides.

    Attributes:
        image_hidden_states: Features of all images that entered the input, [tokens, H].
    """

    image_hidden_states: Tensor | None = None


@dataclass
class SparseCutCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output of the whole model.

    The base class has the loss, if labels were given, the logits [B, L, vocabulary], the cache
    under this release's name, and what was requested besides.

    Attributes:
        image_hidden_states: Features of all images that entered the input, [tokens, H].
    """

    image_hidden_states: Tensor | None = None


def is_sparsecut_model(model: nn.Module) -> bool:
    """Whether this is a model of either kind, also inside PEFT's wrapper."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return isinstance(inner, SparseCutPreTrainedModel)


# Attributes that run the model they are on: accelerate's and those of torch.compile.
BOUND_TO_MODEL = ("forward", "_old_forward", "_hf_hook", "_compiled_call", "_compiled_call_impl")


def share_modules(model: PreTrainedModel, model_class: type, modules: dict[str, nn.Module]) -> Any:
    """Make a model of another class that shares attributes and modules with a model.

    Hooks on the model itself are not shared, those inside its modules are.

    Args:
        model: Where attributes (configuration, plan, settings) come from.
        model_class: Class of the result. Its `__init__` does not run.
        modules: The children of the result, by name.
    """
    shared = model_class.__new__(model_class)
    nn.Module.__init__(shared)
    for name, value in model.__dict__.items():
        if name not in shared.__dict__ and name not in BOUND_TO_MODEL:
            shared.__dict__[name] = value
    for name, module in modules.items():
        shared.add_module(name, module)
    shared.training = model.training
    return shared


def has_part_below_head(model: nn.Module) -> bool:
    """Whether a model keeps everything below its head in one child, as transformers' own do."""
    return getattr(model, "base_model_prefix", None) in model._modules


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model of the same class that holds the base model alone.

    The base model keeps its name, so weights keep theirs. The result has no use for its own
    forward; call its `base_model`.

    Raises:
        UserError: The model has no base model below its head.
    """
    if not has_part_below_head(model):
        raise UserError(
            f"{type(model).__name__} does not separate its head from the rest, so AutoModel cannot"
            " give a model without a head; load it with AutoModelForImageTextToText"
        )
    prefix = model.base_model_prefix
    body = share_modules(model, type(model), {prefix: model._modules[prefix]})
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    inside = {a: b for a, b in tied.items() if a.startswith(f"{prefix}.")}
    body.all_tied_weights_keys = inside
    body._tied_weights_keys = None
    return body


RECORDS = ("hidden_states", "attentions")  # what an encoder returns of its blocks on request
NO_RECORDS = {f"output_{name}": False for name in RECORDS}


def get_requested_records(config: Any, settings: dict) -> list[str]:
    """Which of RECORDS the settings or else the configuration request."""
    keys = {name: f"output_{name}" for name in RECORDS}
    defaults = {name: getattr(config, key, False) for name, key in keys.items()}
    return [name for name, key in keys.items() if settings.get(key, defaults[name])]


def record_encoder(
    encoder: nn.Module, grid: PatchGrid, pixel_values: Tensor, names: list[str]
) -> dict[str, tuple[Tensor]]:
    """Run every block on the coarse views and return what the encoder itself records of them.

    Args:
        encoder: The vision encoder.
        grid: Its views and patches.
        pixel_values: [P, 1 + tiles^2, *view] or [P, *view].
        names: "hidden_states", "attentions" or both.
    """
    has_views = pixel_values.dim() > 1 + len(grid.view)
    coarse = pixel_values[:, 0] if has_views else pixel_values
    inputs = encoder_inputs(grid, coarse.to(encoder.dtype))
    flags = {f"output_{name}": True for name in names}
    outputs = encoder(**inputs, return_dict=True, **flags)
    return {name: outputs.get(name) for name in names}


def has_begun(cache: Cache | None) -> bool:
    """Whether a cache already holds a prompt."""
    return cache is not None and cache.get_seq_length() > 0


def check_image_tokens(
    mask: Tensor,
    images: SparseCutImageFeatures | None,
    *,
    warn_only: bool = False,
    tokens_per_image: int = 0,
) -> None:
    """Check that there are as many image features as image tokens.

    Args:
        mask: Where image tokens are, [B, L].
        images: The features, or None.
        warn_only: Warn instead of raising. For a bare forward pass without images: transformers'
            own classes accept it, and its tests use it.
        tokens_per_image: Image tokens of one image where a prompt continues, else 0. Fewer
            tokens than that without an image were written by the model.

    Raises:
        UserError: The two numbers differ, or the tokens of an image do not stand together.
    """
    num_tokens = int(mask.sum())
    num_features = 0
    if images is not None:
        num_features = sum(len(features) for features in images.pooler_output)
    written_by_model = images is None and num_tokens < tokens_per_image
    if num_tokens == num_features and images is not None:
        check_places(mask, [len(features) for features in images.pooler_output])
    if num_tokens == num_features or written_by_model:
        return
    message = (
        f"the prompts hold {num_tokens} image tokens, but the images make {num_features} features."
        " Every image needs one placeholder, expanded to all its image tokens, none of them cut"
        " off (by a length limit, for example); prepare prompts with the model's processor"
    )
    if not warn_only:
        raise UserError(message)
    warnings.warn(f"{message}. Here image tokens are read as text", stacklevel=3)


def check_pixels(pixel_values: Tensor, grid: PatchGrid, plan: Plan) -> None:
    """Check the shape of pixels.

    Args:
        pixel_values: Pixels, which should be [P, 1 + tiles^2, *view].
        grid: The views of the encoder.
        plan: The plan, which gives the number of views.

    Raises:
        UserError: They have another shape.
    """
    shape = (plan.num_views, *grid.view)
    if tuple(pixel_values.shape[1:]) != shape:
        raise UserError(
            f"pixel_values has shape {tuple(pixel_values.shape)}, but this model's plan"
            f" (tiles={plan.tiles}) and encoder need (images, {', '.join(map(str, shape))}),"
            " coarse view first; pass all that the model's own processor returns, image_grids too"
        )


def check_image_features(images: SparseCutImageFeatures, plan: Plan, width: int) -> None:
    """Check that image features fit a model.

    Args:
        images: The features.
        plan: The model's plan.
        width: H, the width of its language model.

    Raises:
        UserError: They come from a model of another width or plan.
    """
    feature_width = images.pooler_output[0].shape[-1]
    num_feature_layers = len(images.deepstack_features or ())
    if (feature_width, num_feature_layers) != (width, len(plan.layers)):
        raise UserError(
            f"the image features have width {feature_width} and {num_feature_layers} layers above"
            f" the input, but this model needs width {width} and {len(plan.layers)} layers; make"
            " them with this model's get_image_features, or give pixel_values"
        )
