"""Which parameters a stage trains, and which stay frozen.

`train` in a recipe names parts: vision, projector, fusion, language, head, or an adapter on one of
them, as in `language:lora`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..adapters import LORA, get_adapted_part, get_adapter_parameters, get_adapters
from ..config.recipe import Stage
from ..schema import UserError


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of values in all of the parameters."""
    return sum(parameter.numel() for parameter in parameters)


def get_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Parameters by every name that `train` may hold: the model's parts and its adapters."""
    parts = model.parameter_groups()
    for part in get_adapters(model):
        parts[f"{part}{LORA}"] = get_adapter_parameters(model, part)
    return parts


def check_parts(model: nn.Module, train: tuple[str, ...]) -> None:
    """Check that a model has the parts that a stage trains.

    Args:
        model: The model.
        train: Names of parts. An adapter counts as its part, whether it is there already or not.

    Raises:
        UserError: If the model lacks one of them.
    """
    parts = model.parameter_groups()
    unknown = [name for name in train if (get_adapted_part(name) or name) not in parts]
    if unknown:
        raise UserError(
            f"the model has no part {unknown[0]!r}; its parts are {', '.join(parts)}, and only"
            " upgraded models have a projector of their own"
        )


def get_trained_parameters(model: nn.Module, train: tuple[str, ...]) -> list[nn.Parameter]:
    """Get the parameters of the named parts.

    Raises:
        UserError: If the model lacks a part, or if the parts have no parameters at all.
    """
    check_parts(model, train)
    parts = get_parts(model)
    if not any(parts[name] for name in train):
        sizes = {name: count_parameters(parameters) for name, parameters in parts.items()}
        raise UserError(
            f"training {', '.join(train)} would train nothing; numbers of parameters by part:"
            f" {sizes}"
        )
    return [parameter for name in train for parameter in parts[name]]


def freeze(model: nn.Module, train: tuple[str, ...]) -> None:
    """Let gradients reach the named parts only.

    Raises:
        UserError: If the model lacks a part, or if the parts have no parameters at all.
    """
    parameters = get_trained_parameters(model, train)
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def unfreeze(model: nn.Module) -> None:
    """Let gradients reach every parameter again; those of a quantized base are integers."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())


def trains_base(stage: Stage) -> bool:
    """Whether a stage changes weights of an upgraded model's base.

    An adapter that is saved beside the base does not change it.
    """
    adapter_is_merged = stage.lora is None or stage.lora.merge
    for name in stage.train:
        is_separate = name == "fusion" or (get_adapted_part(name) and not adapter_is_merged)
        if not is_separate:
            return True
    return False


def get_part_names(model: nn.Module, stage: Stage) -> dict[int, str]:
    """The part that each parameter is trained as, by the parameter's id.

    The head belongs to the language model, unless the stage names it separately.
    """
    parts = get_parts(model)
    names = [name for name in parts if name != "head"]
    if "head" in stage.lr or "language" not in stage.train:
        names.append("head")  # last, so that it takes its parameters from the language model
    return {id(parameter): name for name in names for parameter in parts[name]}


def get_frozen_modules(model: nn.Module, stage: Stage) -> list[tuple[nn.Module, str]]:
    """Modules of the parts that a stage does not train, each with its part's name."""
    modules = {
        "vision": _modules_without_adapters(model.vision_backbone()),
        "fusion": _modules_without_adapters(model.fusion),
        "language": _modules_without_adapters(model.language_backbone()),
    }
    if model.is_upgrade:
        modules["projector"] = _projector_modules(model, modules)
    frozen = []
    for part, part_modules in modules.items():
        if part not in stage.train:
            frozen += [(module, part) for module in part_modules]
    return frozen


def _projector_modules(model: nn.Module, parts: dict[str, list[nn.Module]]) -> list[nn.Module]:
    """Modules of a base beside its encoder and its language model.

    A module that holds one of these is no part: its training mode belongs to the model.
    """
    known = {id(module) for modules in parts.values() for module in modules}
    projector = []
    for module in model.base.modules():
        if known.isdisjoint(map(id, module.modules())):
            projector.append(module)
    return projector


def _modules_without_adapters(module: nn.Module) -> list[nn.Module]:
    """A part's modules without those of its adapter, which may be trained while the part is not."""
    return [inside for name, inside in module.named_modules() if "lora_" not in name]


def freeze_unused_vision_blocks(
    model: nn.Module, parameters: list[nn.Parameter], image_inputs: dict[str, torch.Tensor]
) -> None:
    """Freeze the parameters that no image feature depends on.

    These are an encoder's blocks above the deepest tap. They would never receive a gradient, which
    engines that share a model between processes treat as an error.

    Args:
        model: The model.
        parameters: Parameters of the vision encoder and of a base's projector.
        image_inputs: What `get_image_features` takes of one image.
    """
    device = parameters[0].device
    inputs = {name: value.to(device) for name, value in image_inputs.items()}
    if model.plan.needs_prompt:
        width = model.get_input_embeddings().weight.shape[-1]
        inputs["prompts"] = torch.zeros(1, width, device=device)
    with torch.random.fork_rng(), torch.enable_grad():
        output = model.get_image_features(**inputs)
        features = list(output.pooler_output)
        for layer in output.get("deepstack_features") or ():
            features += layer
        sum(feature.float().sum() for feature in features).backward()
    for parameter in parameters:
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def reach_without_images(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let a batch without images give parameters a gradient of zero, as the model does for fusion.

    This happens inside the model's forward pass. Engines that share a model between processes look
    there for parameters without gradients, and do not expect one later.

    Args:
        model: The model.
        parameters: Trained parameters that only images reach.
    """

    def add_parameters(module, args, kwargs, output):
        if kwargs.get("pixel_values") is None and output.loss is not None:
            output["loss"] = output.loss + 0.0 * sum(p.sum() for p in parameters)
        return output

    if not parameters:
        yield
        return
    handle = model.register_forward_hook(add_parameters, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def apply_liger(model: nn.Module, settings: dict | None) -> None:
    """Put Liger's kernels into the language model.

    Transformers would look for kernels of the whole model's type, find none, and go on without.

    Args:
        model: The model; its language model is changed in place.
        settings: The argument `liger_kernel_config`.

    Raises:
        UserError: If Liger has no kernels for this language model.
    """
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    language_model = model.language_backbone()
    model_type = language_model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        supported = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(
            f"args.use_liger_kernel is set, but Liger has no kernels for {model_type}; it supports"
            f" {supported}; remove the argument"
        )
    # The loss is computed from logits, so the kernel that fuses both would stay unused.
    kernels = {"fused_linear_cross_entropy": False, **(settings or {})}
    _apply_liger_kernel_to_instance(model=language_model, **kernels)
