"""The parts of a model that a stage trains: their parameters, which of them rest, and which no
picture reaches.
"""

from __future__ import annotations

import torch
from torch import nn

from ..adapters import LORA, get_adapted_part, get_adapter_parameters, get_adapters
from ..config.recipe import Stage
from ..schema import UserError


def all_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by every name that `train` may hold: the model's parts, and adapters that are on
    them.
    """
    return model.parameter_groups() | {
        f"{part}{LORA}": get_adapter_parameters(model, part) for part in get_adapters(model)
    }


def check_parts(model: nn.Module, train: tuple[str, ...]) -> None:
    """Raise ValueError where the model has no such part; whether an adapter is there already does
    not count.
    """
    parts = model.parameter_groups()
    if unknown := [name for name in train if (get_adapted_part(name) or name) not in parts]:
        raise UserError(
            f"the model has no part {unknown[0]}; its parts are {', '.join(parts)}, and only"
            " upgraded models have a projector of their own"
        )


def trained_parts(model: nn.Module, train: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters of the parts named; ValueError where the model has no such part, or these have
    no parameter.
    """
    check_parts(model, train)
    parts = all_parts(model)
    if not any(parts[name] for name in train):
        sizes = {name: sum(p.numel() for p in parameters) for name, parameters in parts.items()}
        raise UserError(
            f"training {', '.join(train)} would train nothing; the model's parts have so many"
            f" parameters: {sizes}"
        )
    return [parameter for name in train for parameter in parts[name]]


def freeze(model: nn.Module, train: tuple[str, ...]) -> None:
    """Let gradients reach the named parts only; ValueError where these have no parameter."""
    parameters = trained_parts(model, train)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def part_names(model: nn.Module, stage: Stage) -> dict[int, str]:
    """id of every parameter -> the part it is trained as; the head counts by itself only where the
    stage names it.
    """
    parts = all_parts(model)
    names = [name for name in parts if name != "head"]
    if "head" in stage.lr or "language" not in stage.train:
        names.append("head")  # last, so that it takes its parameters from the language model
    return {id(p): name for name in names for p in parts[name]}


def frozen_modules(model: nn.Module, stage: Stage) -> list[tuple[nn.Module, str]]:
    """Modules of the parts that a stage does not train, each with its part's name."""
    modules = {
        "vision": _own_modules(model.vision_backbone()),
        "fusion": _own_modules(model.fusion),
        "language": _own_modules(model.language_backbone()),
    }
    if model.is_upgrade:
        known = {id(module) for part in modules.values() for module in part}
        # What holds encoder or decoder is no part: its training mode belongs to the model.
        modules["projector"] = [
            m
            for m in model.base.modules()
            if not any(id(inside) in known for inside in m.modules())
        ]
    return [
        (module, part)
        for part, found in modules.items()
        if part not in stage.train
        for module in found
    ]


def freeze_unused_vision_blocks(
    model: nn.Module, parameters: list[nn.Parameter], pictures: dict[str, torch.Tensor]
) -> None:
    """Let those of the parameters rest that no picture's features depend on: an encoder's blocks
    above the deepest tap.

    They would never have a gradient, which engines that share a model between processes take for a
    fault.
    """
    device = parameters[0].device
    with torch.random.fork_rng(), torch.enable_grad():
        found = model.get_image_features(
            **{name: value.to(device) for name, value in pictures.items()}
        )
        features = [
            *found.pooler_output,
            *(z for layer in found.get("deepstack_features") or () for z in layer),
        ]
        sum(z.float().sum() for z in features).backward()
    for parameter in parameters:
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    model.zero_grad(set_to_none=True)


def _own_modules(module: nn.Module) -> list[nn.Module]:
    """A part's modules without those of its adapter, which may learn while the part rests."""
    return [inside for name, inside in module.named_modules() if "lora_" not in name]


def apply_liger(model: nn.Module, settings: dict | None) -> None:
    """Put Liger's kernels into the language model; transformers would look for the whole model's
    type, find none, and go on without.

    settings: args.liger_kernel_config. Raises ValueError where there are no kernels for this
    language model.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    module = model.language_backbone()
    if (kind := module.config.model_type) not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(
            f"args.use_liger_kernel is set, but Liger has no kernels for {kind}; it has some for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}; remove the argument"
        )
    # The loss is computed from logits, so the kernel that fuses both would stay unused.
    _apply_liger_kernel_to_instance(
        model=module, **{"fused_linear_cross_entropy": False, **(settings or {})}
    )
