"""The model of a recipe on paper: its parts as they will be, and a model that stands in for it
where operations are counted.

Models that recipes here name are known by their published sizes, so that no hub is asked.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlavaConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..adapters import get_adapted_part, get_part_module
from ..config.recipe import Recipe, Stage
from ..config.yaml_io import expand_path
from ..configuration import SparseCutConfig, SparseCutUpgradeConfig
from ..modeling_upgraded import FACTS, SparseCutUpgrade
from ..plan import Plan, Shortcut
from ..schema import UserError
from ..upgrading import resolve_plan
from .counting import REFERENCE, backbone_config, configuration_of

KNOWN = {  # sizes of models that recipes here name
    "openai/clip-vit-large-patch14-336": REFERENCE["vision"]["clip-l-336"],
    "lmsys/vicuna-7b-v1.5": REFERENCE["language"]["llama-7b"],
    "lmsys/vicuna-13b-v1.5": REFERENCE["language"]["llama-13b"],
    "google/siglip-base-patch16-256": SiglipVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=256,
        patch_size=16,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ),
}
BASES = {"llava-hf/llava-1.5-7b-hf": ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")}


@dataclass
class EstimatedModel:
    """config: of the model that is built, or that stands in for a finished one (None where none
    can); upgraded: a finished one's parts.

    saved: whether this package saved it, so that it is loaded as it is.
    """

    config: SparseCutConfig | None
    upgraded: SparseCutUpgrade | None = None
    saved: bool = False
    notes: list[str] = field(default_factory=list)


def on_paper(recipe: Recipe, mode: FakeTensorMode) -> EstimatedModel:
    """The recipe's model without weights, as training will have it; ValueError for parts or a plan
    that cannot be.
    """
    if recipe.model.base is not None:
        return _finished(recipe, expand_path(recipe.model.base), mode)
    found, notes = [], []
    for part in ("vision", "language"):
        name = expand_path(getattr(recipe.model, part))
        known = name in KNOWN and not Path(name).is_dir()
        if known:
            notes.append(f"{name} is counted by its published sizes")
        found.append(KNOWN[name] if known else backbone_config(name, part))
    return EstimatedModel(configuration_of(*found, recipe.fusion), notes=notes)


def trained_number(model: nn.Module, name: str, stage: Stage) -> int:
    """How many numbers of a part the stage trains, or of the adapter on it."""
    if (part := get_adapted_part(name)) is None:
        return sum(p.numel() for p in model.parameter_groups()[name])
    module, head, targets = (
        get_part_module(model, part),
        model.get_output_embeddings(),
        stage.lora.targets,
    )
    linear = {
        n: m
        for n, m in module.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not head
    }
    chosen = [
        m for n, m in linear.items() if targets == "all-linear" or n.rpartition(".")[2] in targets
    ]
    return sum(stage.lora.r * sum(m.weight.shape) for m in chosen)


def _finished(recipe: Recipe, base: str, mode: FakeTensorMode) -> EstimatedModel:
    """A finished model under its plan; a saved one brings its own."""
    spec, notes, saved = recipe.fusion, [], False
    if (Path(base) / FACTS).is_file():
        facts = json.loads((Path(base) / FACTS).read_text(encoding="utf-8"))
        if facts["base"] is None:
            raise UserError(
                f"the shortcuts in {base} do not say where their base came from; it cannot be"
                " counted without it"
            )
        base, spec, saved = facts["base"], facts["plan"], True
    config = _configuration(base, notes)
    if isinstance(config, SparseCutConfig):
        return EstimatedModel(config, notes=notes)
    if isinstance(config, SparseCutUpgradeConfig):
        config, spec, saved = config.base_config, config.plan, True
    with mode, no_init_weights():
        bare = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        bare.tie_weights()  # which transformers does after it has drawn them
        plan, family = resolve_plan(bare, spec)
        config = SparseCutUpgradeConfig.from_base(bare, plan, None, None)
        model = SparseCutUpgrade(config, base=bare)
    if not family.has_one_view(bare):
        notes.append(
            f"{base} takes pictures at sizes of their own: image tokens, operations, hours and what"
            " waits for the backward pass are not counted, and tokens are those of the text"
        )
        return EstimatedModel(None, model, saved, notes)
    notes.append(
        f"operations, and what waits for the backward pass, of {base} are those of a model built of"
        " its encoder and language model, with a projector of the plan's in place of its own"
    )
    tap = getattr(config, "vision_feature_layer", -1)
    plan = _without_base(plan, tap if isinstance(tap, int) else -1)
    return EstimatedModel(
        configuration_of(config.vision_config, config.get_text_config(), plan), model, saved, notes
    )


def _configuration(base: str, notes: list[str]) -> PreTrainedConfig:
    if base in BASES and not Path(base).is_dir():
        notes.append(f"{base} is counted by the published sizes of {' and '.join(BASES[base])}")
        vision, language = (KNOWN[name] for name in BASES[base])
        return LlavaConfig(vision_config=vision.to_dict(), text_config=language.to_dict())
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UserError(
            f"there is no model {base} that can be read; Hugging Face says: {error}"
        ) from error


def _without_base(plan: Plan, tap: int) -> Plan:
    """The plan with a shortcut into the input where a finished model has its own."""
    return replace(
        plan, shortcuts=tuple(Shortcut((tap,), 0) if s.mix == "base" else s for s in plan.shortcuts)
    )
