"""Upgrade a pretrained VLM in place, and load its shortcuts, which are saved apart from it.

A folder of saved shortcuts (`SparseCutUpgrade.save_fusion`) names its base model. The base stays
where it is, whatever its size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from .absent_videos import read_without_videos
from .configuration import SparseCutUpgradeConfig
from .families import VLMFamily, get_family
from .fingerprint import base_hash
from .loading import (
    HUB_ARGUMENTS,
    adopt_quantization,
    check_finite,
    check_loaded_weights,
    forget_quantization,
    holds_quantized_values,
    load_pretrained,
    load_weights,
    read_tensors,
)
from .methods import make_plan
from .modeling_upgraded import FACTS, WEIGHTS, SparseCutUpgrade
from .plan import Plan
from .processing_upgraded import PROCESSOR_FILE, wrap_processor
from .schema import UserError, is_whole_number, read_json_file
from .upgrade_hooks import get_encoder_depth
from .waits import show_loading, show_step

# Width of the language model over the inner width of a projector, in the default plan.
NARROWING = 16
SMALLEST_RANK = 16
UNREADABLE = (
    "the base {name} could not be read as a pretrained VLM; give a folder, a hub name or a loaded"
    " model"
)
FACT_NAMES = {"base", "base_type", "base_digest", "plan", "depths"}  # of fusion.json


def upgrade(
    base: str | Path | PreTrainedModel,
    plan: str | dict | Plan | None = None,
    *,
    processor: Any = None,
    dtype: torch.dtype | str = "auto",
    **from_pretrained: Any,
) -> tuple[SparseCutUpgrade, ProcessorMixin]:
    """Add shortcuts to a pretrained VLM.

    The model answers exactly as before until the shortcuts are trained. Nothing of the base is
    copied or changed.

    Args:
        base: hub name, folder, or a loaded model.
        plan: name of a method, {"method": ..., options}, or a plan. The default is `sparsecut` with
            projectors that are a sixteenth as wide inside as the language model. The first shortcut
            into the input stands for the base's own image features.
        processor: the base's processor. A loaded model given without one gets None.
        dtype: dtype of a base that is loaded here.
        from_pretrained: further arguments of the base's `from_pretrained`.

    Returns:
        (model, processor), in evaluation mode.

    Raises:
        UserError: The base cannot be read, its family or parts are not known, or the plan does not
            fit.
    """
    if not isinstance(base, nn.Module):
        hub = {name: value for name, value in from_pretrained.items() if name in HUB_ARGUMENTS}
        processor = processor or read_processor(base, **hub)
        base = _load_base(base, dtype=dtype, **from_pretrained)
    base = _unwrap_peft(base)
    if isinstance(base, SparseCutUpgrade):
        raise UserError(
            "this model is upgraded already; to choose other shortcuts, give its base"
            " (model.detach())"
        )
    plan, family = resolve_plan(base, plan)
    language = family.parts(base).language
    if not any(p.is_floating_point() for p in language.parameters()):
        raise UserError(
            f"the language model {type(language).__name__} has no floating-point weight, so no"
            " features can be added to its hidden states; give a base whose embeddings and norms"
            " are float32, float16 or bfloat16"
        )
    with show_step("adding shortcuts"):
        model = _wrap(base, plan)
        _move_fusion(model)
    if processor is not None:
        processor = wrap_processor(processor, plan.tiles)
    return model.eval(), processor


def _unwrap_peft(model: nn.Module) -> nn.Module:
    """The model inside PEFT's wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _wrap(base: PreTrainedModel, plan: Plan) -> SparseCutUpgrade:
    name = getattr(base.config, "_name_or_path", None) or None
    config = SparseCutUpgradeConfig.from_base(base, plan, name, base_hash(base))
    if not holds_quantized_values(base):
        forget_quantization(config.base_config)
    for module in base.modules():
        module._is_hf_initialized = True  # transformers must not draw these weights anew
    model = SparseCutUpgrade(config, base=base)
    adopt_quantization(model, base)
    return model


def _move_fusion(model: SparseCutUpgrade) -> None:
    """Move the fusion to the dtype of the base and to the device of its first decoder layer."""
    language = model.language_backbone()
    weight = next(p for p in language.parameters() if p.is_floating_point())
    is_quantized = weight.dtype.itemsize == 1
    dtype = torch.float32 if is_quantized else weight.dtype
    device = None if weight.device.type == "meta" else weight.device
    model.fusion.to(device=device, dtype=dtype)


def load_fusion(
    folder: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    processor: Any = None,
    check_base: bool = True,
    **from_pretrained: Any,
) -> tuple[SparseCutUpgrade, object]:
    """Load saved shortcuts onto their base.

    Args:
        folder: what `SparseCutUpgrade.save_fusion` wrote.
        base: hub name, folder or loaded model; by default the base that the shortcuts name. It may
            be quantized or have an adapter.
        processor: the base's processor; by default read from the folder or from the base.
        check_base: refuse a base with other weights than those the shortcuts were trained on.
        from_pretrained: further arguments of the base's `from_pretrained`.

    Returns:
        (model, processor), in evaluation mode.

    Raises:
        UserError: The folder cannot be read, or the base or the weights do not fit.
    """
    folder = Path(folder)
    facts = read_facts(folder)
    if base is None and facts["base"] is None:
        raise UserError(f"the shortcuts in {folder} name no base; give it as base=...")
    name = base if isinstance(base, str | Path) else facts["base"]
    if not isinstance(base, nn.Module):
        base = _load_base(name, **from_pretrained)
    base = _unwrap_peft(base)
    _check_base(folder, facts, base, check_weights=check_base)
    if processor is None:
        # Training saves the processor that it used beside the shortcuts.
        source = folder if (folder / PROCESSOR_FILE).is_file() else name
        processor = None if source is None else read_processor(source)
    model, processor = upgrade(base, Plan.from_dict(facts["plan"]), processor=processor)
    load_fusion_weights(model.fusion, folder)
    return model, processor


def load_fusion_weights(fusion: nn.Module, folder: Path) -> None:
    """Give a fusion the weights of saved shortcuts.

    Raises:
        UserError: The file is damaged, or its weights are not finite or not those of this fusion.
    """
    file = folder / WEIGHTS
    weights = read_tensors(
        file, f"give a folder with {FACTS} and {WEIGHTS}, as save_fusion writes it"
    )
    try:
        problems = fusion.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # weights of another size
        raise UserError(
            f"the weights {file} do not fit the plan in {FACTS} ({error}); save the shortcuts again"
            " with save_fusion"
        ) from error
    info = {
        "missing_keys": problems.missing_keys,
        "unexpected_keys": problems.unexpected_keys,
    }
    check_loaded_weights(fusion, info, str(file))
    check_finite(fusion, str(file))


def read_facts(folder: Path) -> dict:
    """Return what fusion.json says about saved shortcuts; UserError where it is damaged."""
    facts = read_json_file(folder / FACTS)
    missing = sorted(FACT_NAMES - set(facts))
    if missing:
        raise UserError(
            f"{folder / FACTS} lacks {' and '.join(missing)}; save the shortcuts again with"
            " save_fusion"
        )
    depths = facts["depths"]
    if not isinstance(depths, list) or len(depths) != 2 or not all(map(is_whole_number, depths)):
        raise UserError(
            f"{folder / FACTS} has depths={depths!r}, but two whole numbers are needed; save the"
            " shortcuts again with save_fusion"
        )
    return facts


def _check_base(folder: Path, facts: dict, base: nn.Module, *, check_weights: bool) -> None:
    model_type = base.config.model_type
    is_same_type = model_type == facts["base_type"]
    if is_same_type and not check_weights:
        return
    if is_same_type and base_hash(base) == facts["base_digest"]:
        return
    name = getattr(base.config, "_name_or_path", "") or "a model"
    raise UserError(
        f"the shortcuts in {folder} were trained on {facts['base']} ({facts['base_type']}, hash"
        f" {facts['base_digest']}), but the base is {name} ({model_type}, hash {base_hash(base)});"
        " give the former, or check_base=False if both are one model in two dtypes"
    )


def resolve_plan(base: PreTrainedModel, plan: str | dict | Plan | None) -> tuple[Plan, VLMFamily]:
    """Make the plan of an upgrade from the argument of `upgrade`.

    Returns:
        The plan, and the family of the base.

    Raises:
        UserError: The family is not known, or the plan does not fit the base.
    """
    family = get_family(base)
    text_config = base.config.get_text_config()
    vision_depth = get_encoder_depth(family.parts(base).vision)
    if plan is None:
        rank = max(SMALLEST_RANK, text_config.hidden_size // NARROWING)
        plan = {"method": "sparsecut", "rank": rank}
    plan = make_plan(plan, vision_depth, text_config.num_hidden_layers)
    if not plan.has_base_input:
        plan = plan.for_upgrade(fine=family.has_one_view(base))
    if plan.tiles and not family.has_one_view(base):
        raise UserError(
            f"the plan has tiles={plan.tiles}, but {base.config.model_type} has resolutions of its"
            " own and takes no fine views; set tiles to 0"
        )
    return plan, family


def _load_base(name: Any, **from_pretrained: Any) -> PreTrainedModel:
    """A pretrained VLM; UserError where it cannot be read or some weights would be random."""
    complaint = UNREADABLE.format(name=name)
    with show_loading(name):
        return load_weights(AutoModelForImageTextToText, name, complaint, **from_pretrained)


def read_processor(name: str | Path, **hub: Any) -> Any:
    """Load the processor of a folder or hub name.

    Raises:
        UserError: It cannot be read. transformers silently returns a part of it, such as the
            tokenizer, where the processor's class is not known; this is refused too.
    """
    with read_without_videos():
        processor = load_pretrained(AutoProcessor, name, UNREADABLE.format(name=name), **hub)
    if not isinstance(processor, ProcessorMixin):
        settings = getattr(processor, "init_kwargs", {})
        wanted = settings.get("processor_class") or "its processor"
        raise UserError(
            f"{name} gives only {type(processor).__name__}, which takes no images: {wanted} is not"
            " in the folder, not known here, or needs a package that is not installed (such as"
            " torchvision); install it, or give processor=..."
        )
    return processor
