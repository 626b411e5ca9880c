"""Upgrading a finished vision-language model in place, and keeping its shortcuts apart from it.

A folder of saved shortcuts (`SparseCutUpgrade.save_fusion`) names its base, which stays where it is, whatever its size.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from .configuration_upgraded import SparseCutUpgradeConfig
from .families import VLMFamily, family_of
from .fingerprint import base_hash
from .methods import make_plan
from .modeling_upgraded import FACTS, WEIGHTS, SparseCutUpgrade
from .plan import Plan
from .processing_upgraded import PROCESSOR_FILE, with_fine_views
from .schema import UserError
from .upgrade_hooks import depth_of

# by default a shortcut's projector is this many times narrower inside than the language model
NARROW = 16

# Arguments that say how to reach the hub, and so go to configurations, tokenizers and image
# processors too.
HUB_ARGUMENTS = ("token", "cache_dir", "local_files_only", "force_download", "trust_remote_code")


def upgrade(
    base: str | Path | PreTrainedModel,
    plan: str | dict | Plan | None = None,
    *,
    processor=None,
    dtype: torch.dtype | str = "auto",
    **from_pretrained,
) -> tuple[SparseCutUpgrade, object]:
    """Give a finished vision-language model shortcuts; it answers exactly as before until they are
    trained.

    base: hub name, folder, or a loaded model (then with its processor; without one, None is
    returned for it). plan: a method's name, {"method": ..., options} or a plan; by default
    `sparsecut` with projectors a sixteenth of the language model wide inside. Its first shortcut
    into the input stands for the base's own. Further arguments go to `from_pretrained`. Nothing of
    the base is copied or changed. Returns (model, processor), in evaluation mode. Raises ValueError
    for families that are not known, whose parts cannot be read, and for plans that do not fit.
    """
    if not isinstance(base, nn.Module):
        hub = {name: value for name, value in from_pretrained.items() if name in HUB_ARGUMENTS}
        processor = processor or read_processor(base, **hub)
        base = _read(AutoModelForImageTextToText, base, dtype=dtype, **from_pretrained)
    base = getattr(base, "get_base_model", lambda: base)()  # a model inside PEFT's wrapper
    if isinstance(base, SparseCutUpgrade):
        raise UserError(
            "this model is upgraded already; give its base (model.detach()) to choose other"
            " shortcuts"
        )
    plan, family = plan_for(base, plan)
    parts = family.parts(base)
    if not any(p.is_floating_point() for p in parts.language.parameters()):
        raise UserError(
            f"the language model {type(parts.language).__name__} holds no floating-point weight, so"
            " features cannot be added to what its layers take; give a base whose embeddings and"
            " norms are left in float32, float16 or bfloat16"
        )
    name = getattr(base.config, "_name_or_path", None) or None
    for module in base.modules():
        module._is_hf_initialized = True  # ready weights are not drawn anew
    model = SparseCutUpgrade(
        SparseCutUpgradeConfig.of(base, plan, name, base_hash(base)), base=base
    )
    _place(model)
    if plan.tiles and processor is not None:
        processor = with_fine_views(processor, plan.tiles)
    return model.eval(), processor


def load_fusion(
    folder: str | Path,
    base: str | Path | PreTrainedModel | None = None,
    *,
    processor=None,
    check_base: bool = True,
    **from_pretrained,
) -> tuple[SparseCutUpgrade, object]:
    """Saved shortcuts on their base: the one they name, or the one given (a quantised one, or one
    beside an adapter, too).

    check_base: refuse a base whose digest is another than that of the base the shortcuts were
    trained on. Raises ValueError for that, and for a folder or weights that do not fit. Returns
    (model, processor), in evaluation mode.
    """
    folder = Path(folder)
    facts = json.loads((folder / FACTS).read_text())
    if base is None and facts["base"] is None:
        raise UserError(
            f"the shortcuts in {folder} do not say where their base came from; give it as base=..."
        )
    plan, weights = Plan.from_dict(facts["plan"]), load_file(folder / WEIGHTS)
    name = base if isinstance(base, str | Path) else facts["base"]
    base = (
        base
        if isinstance(base, nn.Module)
        else _read(AutoModelForImageTextToText, name, **from_pretrained)
    )
    inner = getattr(base, "get_base_model", lambda: base)()
    if inner.config.model_type != facts["base_type"] or (
        check_base and base_hash(inner) != facts["base_digest"]
    ):
        given = getattr(inner.config, "_name_or_path", "") or "a model"
        raise UserError(
            f"the shortcuts in {folder} were trained on {facts['base']} ({facts['base_type']},"
            f" digest {facts['base_digest']}), but the base given is {given}"
            f" ({inner.config.model_type}, digest {base_hash(inner)}); give that base, or say"
            " check_base=False if the two are the same model in another number format"
        )
    if processor is None:
        own = (
            folder / PROCESSOR_FILE
        ).is_file()  # training leaves the processor it used beside the shortcuts
        where = folder if own else name
        processor = (
            read_processor(where) if where is not None else None
        )  # a loaded base may come from nowhere
    model, processor = upgrade(inner, plan, processor=processor)
    problems = model.fusion.load_state_dict(weights, strict=False)
    if problems.missing_keys or problems.unexpected_keys:
        raise UserError(
            f"{folder / WEIGHTS} and the plan beside it do not belong together (missing"
            f" {problems.missing_keys[:3]}, too many {problems.unexpected_keys[:3]}); save the"
            " shortcuts again with save_fusion"
        )
    return model, processor


def plan_for(base: PreTrainedModel, plan: str | dict | Plan | None) -> tuple[Plan, VLMFamily]:
    """The plan that `upgrade` makes of its argument for a finished model, and the model's family;
    ValueError where it does not fit.
    """
    family = family_of(base)
    depths = depth_of(family.parts(base).vision), base.config.get_text_config().num_hidden_layers
    if plan is None:
        plan = {
            "method": "sparsecut",
            "rank": max(16, base.config.get_text_config().hidden_size // NARROW),
        }
    plan = make_plan(plan, *depths)
    plan = plan if plan.has_base_input else plan.for_upgrade(fine=family.has_one_view(base))
    if plan.tiles and not family.has_one_view(base):
        raise UserError(
            f"the plan has tiles={plan.tiles}, but {base.config.model_type} brings its own"
            " resolutions and takes no further views; set tiles to 0"
        )
    return plan, family


def _place(model: SparseCutUpgrade) -> None:
    """The fusion in the number format of the base, where its first decoder layer is."""
    weight = next(
        p for p in model.family.parts(model.base).language.parameters() if p.is_floating_point()
    )
    dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.float32
    model.fusion.to(device=weight.device if weight.device.type != "meta" else None, dtype=dtype)


def _read(auto_class, name, **from_pretrained):
    try:
        return auto_class.from_pretrained(name, **from_pretrained)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"the base {name} could not be read as a vision-language model; give a folder, a hub"
            f" name or a loaded model. Hugging Face says: {error}"
        ) from error


def read_processor(name: str | Path, **hub):
    """The processor saved under a name; ValueError where transformers silently gives its tokenizer
    alone.
    """
    processor = _read(AutoProcessor, name, **hub)
    if not hasattr(processor, "tokenizer"):
        wanted = (
            getattr(processor, "init_kwargs", {}).get("processor_class") or "what prepares them"
        )
        raise UserError(
            f"{name} gives {type(processor).__name__}, which takes no pictures: {wanted} is not in"
            " the folder, not known here, or needs a package that is not installed (torchvision,"
            " say); install it, or hand over a processor"
        )
    return processor
