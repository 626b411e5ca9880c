"""LoRA on a part of the model through PEFT: added before a stage, then merged or saved beside it.

A part's adapter is PEFT's own model around the part's module, whose layers it changes in place. The
module keeps its place in our model. Adapters are saved in PEFT's own format.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from .hub import fetch_files
from .loading import HUB_ARGUMENTS, check_finite, check_loaded_weights, read_tensors
from .schema import UserError, check_choice, read_json_file

FOLDER = "adapters"  # beside a saved model; it has one folder of PEFT's per part with an adapter
REMEDY = "remove that checkpoint and continue from an earlier one"
LORA = ":lora"  # follows a part's name in `train`: its adapter is trained, and the part is frozen


def get_adapted_part(name: str) -> str | None:
    """The part whose adapter a name in `train` means; None for the name of a part itself."""
    return name.removesuffix(LORA) if name.endswith(LORA) else None


def get_adapters(model: nn.Module) -> dict:
    """Part -> PEFT's model around it, for the parts that have an adapter."""
    return model.__dict__.setdefault("part_adapters", {})


def get_adapter_parameters(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters of a part's adapter; an empty list for a part without one."""
    adapter = get_adapters(model).get(part)
    if adapter is None:
        return []
    return [parameter for name, parameter in adapter.named_parameters() if "lora_" in name]


def add_adapters(model: nn.Module, train: tuple[str, ...], settings: Any) -> None:
    """Add an adapter to every part that `train` names with `:lora`.

    A part that has an adapter already keeps it.

    Args:
        model: a model of this package.
        train: the stage's `train`.
        settings: the stage's `lora`.

    Raises:
        UserError: PEFT is not installed, or the part has no layer of `settings.targets`.
    """
    for name in train:
        part = get_adapted_part(name)
        if part is not None and part not in get_adapters(model):
            get_adapters(model)[part] = _add_adapter(get_part_module(model, part), part, settings)


def check_targets(model: nn.Module, train: tuple[str, ...], settings: Any) -> None:
    """Check that the adapters which a stage names can be added; the model stays as it is.

    Args:
        model: a model of this package.
        train: the stage's `train`.
        settings: the stage's `lora`.

    Raises:
        UserError: As `add_adapters`.
    """
    import_peft()
    parts = filter(None, map(get_adapted_part, train))
    for part in set(parts) - set(get_adapters(model)):
        with torch.random.fork_rng():  # new weights are drawn
            _add_adapter(get_part_module(model, part), part, settings).unload()


def _add_adapter(module: nn.Module, part: str, settings: Any) -> Any:
    peft = import_peft()
    targets = settings.targets
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    parameters = list(module.parameters())
    required_grad = [parameter.requires_grad for parameter in parameters]
    try:
        adapter = peft.get_peft_model(module, config)
    except ValueError as error:
        names = ", ".join(_get_linear_names(module))
        raise UserError(
            f"no adapter can be added to {part} with targets {targets!r} ({error}); its linear"
            f" layers are {names}"
        ) from error
    # PEFT freezes the module, but the stage decides what is trained.
    for parameter, requires_grad in zip(parameters, required_grad, strict=True):
        parameter.requires_grad_(requires_grad)
    return adapter


def _get_linear_names(module: nn.Module) -> list[str]:
    """Last names of a module's linear layers, such as q_proj, each once."""
    names = set()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            names.add(name.rpartition(".")[2])
    return sorted(names)


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter's product to the weights it belongs to, and remove the adapter."""
    adapters = get_adapters(model)
    for part in list(adapters):
        adapters.pop(part).merge_and_unload()


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write the adapters in PEFT's own format, one folder per part."""
    for part, adapter in get_adapters(model).items():
        adapter.save_pretrained(str(folder / FOLDER / part), save_embedding_layers=False)


def list_adapted_parts(folder: Path) -> tuple[str, ...]:
    """The parts whose adapters lie in the folder of a saved model."""
    return tuple(sorted(source.name for source in (folder / FOLDER).glob("*/")))


def check_no_other_adapters(model: nn.Module, folder: Path) -> None:
    """Raise UserError where a folder has adapters that would be put on a model saved into it."""
    for part in list_adapted_parts(folder):
        if part not in get_adapters(model):
            raise UserError(
                f"{folder / FOLDER / part} holds an adapter of another model, which would be put on"
                " this one when it is loaded; remove it, or give a new folder"
            )


def fetch_adapters(name: str | Path, settings: dict) -> Path:
    """The folder that may hold adapters of a model, fetched where it is on the hub.

    Args:
        name: A folder or hub name.
        settings: Those of `from_pretrained`; see `loading.HUB_ARGUMENTS`.
    """
    hub = {key: settings[key] for key in HUB_ARGUMENTS if settings.get(key) is not None}
    hub.pop("trust_remote_code", None)
    if Path(name).exists():
        return Path(name) / hub.get("subfolder", "")
    return fetch_files(str(name), [f"{FOLDER}/*"], hub)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Add the adapters saved beside a model to its parts.

    Raises:
        UserError: An adapter is of no part of the model, cannot be read, or has other weights.
    """
    for part in list_adapted_parts(folder):
        source = folder / FOLDER / part
        module = get_part_module(model, part)
        adapter = _load_adapter(module, source)
        _check_adapter(adapter, source)
        get_adapters(model)[part] = adapter.eval()


def _load_adapter(module: nn.Module, source: Path) -> Any:
    settings = read_json_file(source / "adapter_config.json")
    if settings.get("megatron_config"):
        raise UserError(
            f"the adapter in {source} has megatron_config, which makes PEFT import the module that"
            " its configuration names; take it out of adapter_config.json"
        )
    peft_model = import_peft().PeftModel
    try:
        return peft_model.from_pretrained(module, str(source), is_trainable=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(
            f"the adapter in {source} cannot be read ({type(error).__name__}: {error}); save or"
            " fetch the model again"
        ) from error


def _check_adapter(adapter: Any, source: Path) -> None:
    """Raise UserError where weights of an adapter were not in its file, or have no place in it."""
    peft = import_peft()
    found = set(peft.load_peft_weights(str(source), device="cpu"))
    expected = set(peft.get_peft_model_state_dict(adapter, save_embedding_layers=False))
    # A file may hold layers of the model itself, such as its embeddings.
    own = {
        f"base_model.model.{_strip_layer(name)}" for name in adapter.get_base_model().state_dict()
    }
    info = {"missing_keys": expected - found, "unexpected_keys": found - expected - own}
    check_loaded_weights(adapter, info, str(source))
    check_finite(adapter, str(source))


def load_checkpoint(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint, adapters included, into a model with the same adapters.

    Raises:
        UserError: The checkpoint lacks weights of the model, or holds others.
    """
    files = sorted(folder.glob("model*.safetensors"))
    weights = {}
    for path in files:
        weights |= read_tensors(path, REMEDY)
    if files:
        _load_all_weights(model, weights, folder)
    for part, adapter in get_adapters(model).items():
        source = folder / FOLDER / part
        weights = read_tensors(source / "adapter_model.safetensors", REMEDY)
        import_peft().set_peft_model_state_dict(adapter, weights)
        _check_adapter(adapter, source)


def _load_all_weights(model: nn.Module, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a model all its weights but those of adapters; tied ones need to be there once."""
    current = model.state_dict()
    names = {_strip_layer(name): name for name in current if ".lora_" not in name}
    values = {name: current[own] for name, own in names.items()}
    if not weights.keys() <= names.keys():
        own_names = _find_own_names(model, dict(values))
        weights = {own_names.get(name, name): weight for name, weight in weights.items()}
    info = {
        "missing_keys": _list_missing(values, weights),
        "unexpected_keys": set(weights) - set(names),
    }
    check_loaded_weights(model, info, str(folder))
    own_weights = {names[name]: weight for name, weight in weights.items()}
    model.load_state_dict(own_weights, strict=False)


def _list_missing(values: dict[str, Tensor], weights: dict[str, Tensor]) -> list[str]:
    """Names of a model's values without a weight; those tied to a value with one do not count."""
    loaded = {values[name].data_ptr() for name in weights if name in values}
    absent = [name for name in values if name not in weights]
    return [name for name in absent if values[name].data_ptr() not in loaded]


def _find_own_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, str]:
    """Name in files -> name in the model, for its weights without adapters.

    Transformers saves some encoders, such as DINOv2, under the names that they have on the hub.
    """
    own_names = {id(value): name for name, value in state.items()}
    saved = revert_weight_conversion(model, state)
    return {name: own_names[id(value)] for name, value in saved.items() if id(value) in own_names}


def strip_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights without those of adapters, under the names of a model without adapters."""
    return {_strip_layer(name): value for name, value in state.items() if ".lora_" not in name}


def find_plain_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Those of the names that are a layer's without its adapter, which it has in the model."""
    own = {_strip_layer(name) for name in model.state_dict() if ".base_layer." in name}
    return [name for name in names if name in own]


def _strip_layer(name: str) -> str:
    """A weight's name without PEFT's wrapper around its layer."""
    return name.replace(".base_layer.", ".")


def get_part_module(model: nn.Module, part: str) -> nn.Module:
    """The module that a part's adapter is added to; part: "vision" or "language".

    Raises:
        UserError: No adapter can be added to this part.
    """
    modules = {"vision": model.vision_backbone, "language": model.language_backbone}
    check_choice("the part with an adapter", part, modules)
    return modules[part]()


def import_peft() -> Any:
    """Import the package peft.

    Raises:
        UserError: It is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "adapters need the package peft, which is not installed; run pip install"
            " 'sparsecut[lora]'"
        ) from error
    return peft
