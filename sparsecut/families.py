"""Pretrained VLM families that can be upgraded: where their parts are, and their patch geometry.

A family answers which patches lie under each image token. The answer is an index table for one call
of `get_image_features`, which patch_tables.py computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .patch_tables import (
    has_one_view,
    index_gemma3,
    index_gemma4,
    index_granite_docling,
    index_idefics3,
    index_inkling2,
    index_internvl,
    index_kimi,
    index_lfm2,
    index_llava,
    index_llava_next,
    index_llava_onevision,
    index_mistral3,
    index_muse,
    index_ovis2,
    index_paddleocr,
    index_paligemma,
    index_qwen,
    index_qwen2_5,
    index_shuffled,
    index_video_llama3,
    index_vipllava,
)
from .refused_families import explain_refusal
from .schema import UserError


@dataclass(frozen=True)
class VLMParts:
    """Parts of a pretrained VLM.

    Attributes:
        inner: The module with `get_image_features`.
        vision: The encoder whose blocks are tapped.
        language: The decoder whose layers receive features.
    """

    inner: nn.Module
    vision: nn.Module
    language: nn.Module


def _never(model: nn.Module) -> bool:  # not a lambda: models hold their family, and are pickled
    return False


@dataclass(frozen=True)
class VLMFamily:
    """Layout of a family of pretrained VLMs.

    Attributes:
        parts: Returns the parts of a model.
        patches_under: Returns the number of patches under one image token of a model.
        patch_index: Called as `patch_index(inner, shape, call)` for one call of
            `get_image_features`. `shape` is that of a block's output states, `call` holds the
            call's arguments. Returns [tokens, patches]: for each token of the concatenated
            `pooler_output`, the numbers of its patches in the flattened states, in raster order.
            A token that shows no patch has -1.
        has_one_view: Whether an image is one view of a fixed size, to which fine views can be
            added.
    """

    parts: Callable[[nn.Module], VLMParts]
    patches_under: Callable[[nn.Module], int]
    patch_index: Callable[[nn.Module, tuple, dict], Tensor]
    has_one_view: Callable[[nn.Module], bool] = _never


# --- parts ---


def _get_llava_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.vision_tower, model.model.language_model)


def _get_idefics_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.vision_model, model.model.text_model)


def _get_qwen_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.visual, model.model.language_model)


def _get_janus_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.vision_model, model.model.language_model)


def _get_lighton_parts(model: nn.Module) -> VLMParts:
    return VLMParts(model.model, model.model.vision_encoder, model.model.language_model)


# --- patches under a token, and views ---


def _count_one(model: nn.Module) -> int:
    return 1


def _count_gemma3(model: nn.Module) -> int:
    return model.model.multi_modal_projector.kernel_size**2


def _count_mistral3(model: nn.Module) -> int:
    return model.config.spatial_merge_size**2


def _count_idefics3(model: nn.Module) -> int:
    return model.model.connector.scale_factor**2


def _count_internvl(model: nn.Module) -> int:
    return round(1 / model.config.downsample_ratio) ** 2


def _count_qwen(model: nn.Module) -> int:
    return model.config.vision_config.spatial_merge_size**2


def _count_cohere(model: nn.Module) -> int:
    return model.config.downsample_factor**2


def _count_ovis2(model: nn.Module) -> int:
    return model.config.vision_config.hidden_stride**2


def _count_gemma4(model: nn.Module) -> int:
    return model.config.vision_config.pooling_kernel_size**2


def _count_kimi(model: nn.Module) -> int:
    return math.prod(model.config.vision_config.merge_kernel_size)


def _count_muse(model: nn.Module) -> int:
    return model.config.vision_config.merge_size**2


def _count_granite_docling(model: nn.Module) -> int:
    return model.config.vision_config.scale_factor**2


FAMILIES = {
    "llava": VLMFamily(_get_llava_parts, _count_one, index_llava, has_one_view),
    "vipllava": VLMFamily(_get_llava_parts, _count_one, index_vipllava, has_one_view),
    "paligemma": VLMFamily(_get_llava_parts, _count_one, index_paligemma, has_one_view),
    "gemma3": VLMFamily(_get_llava_parts, _count_gemma3, index_gemma3, has_one_view),
    "llava_next": VLMFamily(_get_llava_parts, _count_one, index_llava_next),
    "llava_onevision": VLMFamily(_get_llava_parts, _count_one, index_llava_onevision),
    "mistral3": VLMFamily(_get_llava_parts, _count_mistral3, index_mistral3),
    "idefics3": VLMFamily(_get_idefics_parts, _count_idefics3, index_idefics3),
    "smolvlm": VLMFamily(_get_idefics_parts, _count_idefics3, index_idefics3),
    "internvl": VLMFamily(_get_llava_parts, _count_internvl, index_internvl),
    "qwen2_vl": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "qwen2_5_vl": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen2_5),
    "qwen3_vl": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "qwen3_vl_moe": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "qwen3_5": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "qwen3_5_moe": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "glm4v": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "glm46v": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "glm4v_moe": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "glm_ocr": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "lfm2_vl": VLMFamily(_get_llava_parts, _count_cohere, index_lfm2),
    "lfm3_vl": VLMFamily(_get_llava_parts, _count_qwen, index_qwen),
    "paddleocr_vl": VLMFamily(_get_qwen_parts, _count_qwen, index_paddleocr),
    "video_llama_3": VLMFamily(_get_janus_parts, _count_one, index_video_llama3),
    "aya_vision": VLMFamily(_get_llava_parts, _count_cohere, index_shuffled),
    "cohere2_vision": VLMFamily(_get_llava_parts, _count_cohere, index_shuffled),
    "ovis2": VLMFamily(_get_llava_parts, _count_ovis2, index_ovis2),
    "qianfan_ocr": VLMFamily(_get_llava_parts, _count_internvl, index_internvl),
    "llava_next_video": VLMFamily(_get_llava_parts, _count_one, index_llava_next),
    "lighton_ocr": VLMFamily(_get_lighton_parts, _count_mistral3, index_mistral3),
    "deepseek_vl": VLMFamily(_get_janus_parts, _count_one, index_paligemma, has_one_view),
    "janus": VLMFamily(_get_janus_parts, _count_one, index_paligemma, has_one_view),
    "deepseek_vl_hybrid": VLMFamily(_get_janus_parts, _count_one, index_paligemma),
    "gemma4": VLMFamily(_get_llava_parts, _count_gemma4, index_gemma4),
    "exaone4_5": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen2_5),
    "qwen2_5_omni_thinker": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen2_5),
    "hyperclovax_vision_v2": VLMFamily(_get_janus_parts, _count_qwen, index_qwen2_5),
    "qwen3_omni_moe_thinker": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "cohere_compass": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "cosmos3_omni": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "cosmos3_edge": VLMFamily(_get_qwen_parts, _count_qwen, index_qwen),
    "ernie4_5_vl_moe": VLMFamily(_get_llava_parts, _count_qwen, index_qwen),
    "dots3_note": VLMFamily(_get_llava_parts, _count_qwen, index_qwen),
    "minimax_m3_vl": VLMFamily(_get_llava_parts, _count_qwen, index_qwen),
    "kimi_k25": VLMFamily(_get_llava_parts, _count_kimi, index_kimi),
    "muse_glimmer": VLMFamily(_get_llava_parts, _count_muse, index_muse),
    "inkling2": VLMFamily(_get_llava_parts, _count_qwen, index_inkling2),
    "granite_docling": VLMFamily(_get_idefics_parts, _count_granite_docling, index_granite_docling),
    "mistral_large4": VLMFamily(_get_llava_parts, _count_mistral3, index_mistral3),
}


def get_family(model: nn.Module) -> VLMFamily:
    """Return the family of a loaded model.

    Raises:
        UserError: The model is of another family, or lacks the parts of its family.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise UserError(
            f"{type(model).__name__} ({model_type}) is not a pretrained VLM that can be upgraded:"
            f" {explain_refusal(model_type)}. Known types are {', '.join(sorted(FAMILIES))}. Or"
            " join its encoder, or another one, and a language model by sparsecut.build"
        )
    family = FAMILIES[model_type]
    try:
        _check_parts(family, model)
    except AttributeError as error:
        raise UserError(
            f"{type(model).__name__} has the model type {model_type}, but not its parts ({error});"
            " give the whole model, as AutoModelForImageTextToText loads it, in a newer"
            " transformers where it has no such part"
        ) from error
    return family


def _check_parts(family: VLMFamily, model: nn.Module) -> None:
    """Read every attribute that an upgrade needs; AttributeError where one is missing."""
    parts = family.parts(model)
    family.patches_under(model)
    for module, name in (
        (parts.inner, "get_image_features"),
        (parts.vision, "config"),
        (parts.language, "config"),
    ):
        getattr(module, name)
