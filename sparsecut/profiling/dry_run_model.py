"""The model of a recipe without weights, and a model that stands in for it where FLOPs are counted.

Models that the recipes that ship with the package name are known by their published sizes, so that
no hub is asked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..adapters import get_adapted_part, get_part_module
from ..config.recipe import Recipe, Stage
from ..config.yaml_io import expand_path
from ..configuration import SparseCutConfig, SparseCutUpgradeConfig
from ..fitting import Fitting
from ..loading import load_pretrained
from ..modeling_upgraded import FACTS, SparseCutUpgrade
from ..plan import Plan, Shortcut
from ..schema import UserError
from ..training.freezing import count_parameters
from ..upgrading import read_facts, resolve_plan
from .fake_models import build_config
from .sizes import PUBLISHED_BASES, PUBLISHED_CONFIGS, read_backbone_config


@dataclass
class EstimatedModel:
    """A recipe's model without weights.

    Attributes:
        config: Configuration of the model that is built or, for an upgraded model, of one that
            stands in for it. None where none can, because the base takes images at any size.
        upgraded: The upgraded model itself, of fake tensors. None where the model is built.
        is_saved: Whether this package has saved the base, so that it is loaded as it is.
        notes: What was assumed.
        views_per_image: Views that the largest image takes, where images are of any size.
    """

    config: SparseCutConfig | None
    upgraded: SparseCutUpgrade | None = None
    is_saved: bool = False
    notes: list[str] = field(default_factory=list)
    views_per_image: int = 1


def estimate_model(recipe: Recipe, mode: FakeTensorMode) -> EstimatedModel:
    """Build a recipe's model without weights, as training will have it.

    Args:
        recipe: The recipe.
        mode: The mode that an upgraded model's fake tensors belong to.

    Raises:
        UserError: If a model cannot be read, or if the plan does not fit.
    """
    if recipe.model.base is not None:
        return _estimate_base(recipe, expand_path(recipe.model.base), mode)
    notes: list[str] = []
    vision = _read_config(recipe.model.vision, "vision", notes)
    language = _read_config(recipe.model.language, "language", notes)
    model = recipe.model
    fitting = Fitting(model.coarse or "squash", model.min_pixels, model.max_pixels)
    encoder = getattr(vision, "vision_config", vision)
    view_size = fitting.choose_view_size(encoder, model.view_size)
    config = build_config(vision, language, recipe.fusion, view_size)
    most = fitting.complete(config).max_pixels
    num_views = 1
    if most is not None:
        num_views = math.ceil(most / math.prod(config.grid.view[-2:]))
        notes.append(
            f"images of any size are counted as the largest, of {most:,} pixels or {num_views}"
            " views; most take less"
        )
    return EstimatedModel(config, views_per_image=num_views, notes=notes)


def count_trained(model: nn.Module, name: str, stage: Stage) -> int:
    """Number of parameters that a stage trains under a name of its `train`.

    Args:
        model: The model, without adapters.
        name: A part, or an adapter such as `language:lora`.
        stage: The stage, for the adapter's settings.
    """
    part = get_adapted_part(name)
    if part is None:
        return count_parameters(model.parameter_groups()[name])
    head = model.get_output_embeddings()
    targets = stage.lora.targets
    number = 0
    for module_name, module in get_part_module(model, part).named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        if targets == "all-linear" or module_name.rpartition(".")[2] in targets:
            number += stage.lora.r * sum(module.weight.shape)
    return number


def _read_config(source: str, part: str, notes: list[str]):
    name = expand_path(source)
    if name in PUBLISHED_CONFIGS and not Path(name).is_dir():
        notes.append(f"{name} is counted by its published sizes")
        return PUBLISHED_CONFIGS[name]
    return read_backbone_config(name, part)


def _estimate_base(recipe: Recipe, base: str, mode: FakeTensorMode) -> EstimatedModel:
    """A base: a model of ours, or a pretrained VLM under its plan. A saved one has its own plan."""
    spec = recipe.fusion
    notes: list[str] = []
    is_saved = False
    if (Path(base) / FACTS).is_file():
        base, spec = _read_saved_shortcuts(Path(base))
        is_saved = True
    config = _read_base_config(base, notes)
    if isinstance(config, SparseCutConfig):
        if recipe.model.replan:
            parts = config.vision_config, config.text_config
            config = build_config(*parts, recipe.fusion, config.view_size)
        return EstimatedModel(config, notes=notes)
    if isinstance(config, SparseCutUpgradeConfig):
        spec = config.plan
        config = config.base_config
        is_saved = True
    with mode, no_init_weights():
        bare = _build_bare(config, base)
        bare.tie_weights()  # transformers does so after it has initialized them
        plan, family = resolve_plan(bare, spec)
        config = SparseCutUpgradeConfig.from_base(bare, plan, None, None)
        model = SparseCutUpgrade(config, base=bare)
    if not family.has_one_view(bare):
        notes.append(
            f"{base} takes images at their own sizes: image tokens, FLOPs, hours and the memory of"
            " activations are not counted, and tokens are those of the text"
        )
        return EstimatedModel(None, model, is_saved, notes)
    notes.append(
        f"FLOPs and activations of {base} are those of a model built of its encoder and language"
        " model, with a projector of the plan's in place of its own"
    )
    stand_in = _replace_base_input(plan, getattr(config, "vision_feature_layer", -1))
    text_config = config.get_text_config()
    return EstimatedModel(
        build_config(config.vision_config, text_config, stand_in), model, is_saved, notes
    )


def _build_bare(config: PreTrainedConfig, base: str):
    try:
        return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise UserError(
            f"the base {base} is a {config.model_type}, which is no vision-language model; give a"
            " pretrained VLM, or a model that this package has saved"
        ) from error


def _read_saved_shortcuts(folder: Path) -> tuple[str, dict]:
    """The base and the plan of saved shortcuts."""
    facts = read_facts(folder)
    if facts["base"] is None:
        raise UserError(
            f"the shortcuts in {folder} do not name their base, so they cannot be counted; name a"
            " base, or a folder that holds the whole model"
        )
    return facts["base"], facts["plan"]


def _read_base_config(base: str, notes: list[str]) -> PreTrainedConfig:
    if base in PUBLISHED_BASES and not Path(base).is_dir():
        vision, language = PUBLISHED_BASES[base]
        notes.append(f"{base} is counted by the published sizes of {vision} and {language}")
        return LlavaConfig(
            vision_config=PUBLISHED_CONFIGS[vision].to_dict(),
            text_config=PUBLISHED_CONFIGS[language].to_dict(),
        )
    return load_pretrained(
        AutoConfig, base, f"there is no model {base} that can be read; give a folder or hub name"
    )


def _replace_base_input(plan: Plan, tap) -> Plan:
    """The plan with a shortcut into the input where the base has its own projector."""
    tap = tap if isinstance(tap, int) else -1
    base_input = Shortcut((tap,), 0)
    shortcuts = tuple(base_input if s.mix == "base" else s for s in plan.shortcuts)
    return replace(plan, shortcuts=shortcuts)
