"""LoRA on a part of the model, through PEFT: put on before a stage, merged into the part or kept
beside the model after it.

A part's adapter is PEFT's own model around the part's module, whose layers it changes in place; the module keeps its place in our
model, and what is saved is PEFT's own format.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from .schema import UserError

FOLDER = "adapters"  # beside a saved model: one folder of PEFT's for every part that has an adapter
LORA = ":lora"  # behind a part's name in `train`: its adapter learns, and the part rests


def adapted(name: str) -> str | None:
    """The part whose adapter is meant by a name in `train`, None where the part itself is."""
    return name.removesuffix(LORA) if name.endswith(LORA) else None


def adapters_of(model: nn.Module) -> dict:
    """Part -> PEFT's model around it, for parts that have an adapter."""
    return model.__dict__.setdefault("part_adapters", {})


def adapter_parameters(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The adapter's own parameters; none where the part has no adapter."""
    found = adapters_of(model).get(part)
    return (
        [p for name, p in found.named_parameters() if "lora_" in name] if found is not None else []
    )


def add_adapters(model: nn.Module, train: tuple[str, ...], settings) -> None:
    """Put an adapter on every part that `train` names with `:lora`; one that is there already goes
    on learning.

    settings: the stage's `lora`. Raises ValueError where PEFT is missing, or no layer of the part
    is one it is to change.
    """
    for part in filter(None, map(adapted, train)):
        if part in adapters_of(model):
            continue
        peft = need_peft()
        module = module_of(model, part)
        targets = (
            list(settings.targets) if not isinstance(settings.targets, str) else settings.targets
        )
        config = peft.LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=targets,
        )
        frozen = [p.requires_grad for p in module.parameters()]
        try:
            adapters_of(model)[part] = peft.get_peft_model(module, config)
        except ValueError as error:
            names = sorted(
                {
                    name.rpartition(".")[2]
                    for name, m in module.named_modules()
                    if isinstance(m, nn.Linear)
                }
            )
            raise UserError(
                f"no adapter can be put on {part} with targets {settings.targets!r}: {error}; its"
                f" linear layers are {', '.join(names)}"
            ) from None
        for parameter, learns in zip(
            (p for n, p in module.named_parameters() if "lora_" not in n), frozen, strict=True
        ):
            parameter.requires_grad_(learns)  # what learns is the stage's to say


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter's product to the weights it stands beside, and take it off."""
    for part in list(adapters_of(model)):
        adapters_of(model).pop(part).merge_and_unload()


def save_adapters(model: nn.Module, folder: Path) -> None:
    """Write adapters in PEFT's own format, one folder for each part."""
    for part, adapter in adapters_of(model).items():
        adapter.save_pretrained(str(folder / FOLDER / part), save_embedding_layers=False)


def load_adapters(model: nn.Module, folder: Path) -> None:
    """Put the adapters saved with a model back on its parts."""
    for path in sorted((folder / FOLDER).glob("*/adapter_config.json")):
        module = module_of(model, path.parent.name)
        adapter = need_peft().PeftModel.from_pretrained(module, str(path.parent), is_trainable=True)
        adapters_of(model)[path.parent.name] = adapter.eval()


def read_weights(model: nn.Module, folder: Path) -> None:
    """Read a checkpoint's weights, and those of its adapters, into a model that has the same
    adapters.
    """
    names = {name.replace(".base_layer.", "."): name for name in model.state_dict()}
    for path in sorted(folder.glob("model*.safetensors")):
        model.load_state_dict(
            {names[name]: value for name, value in load_file(path).items()}, strict=False
        )
    for part, adapter in adapters_of(model).items():
        weights = load_file(folder / FOLDER / part / "adapter_model.safetensors")
        need_peft().set_peft_model_state_dict(adapter, weights)


def without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have without adapters."""
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if ".lora_" not in name
    }


def module_of(model: nn.Module, part: str) -> nn.Module:
    """The module that a part's adapter stands on."""
    if part == "vision":
        return model.vision_backbone()
    assert part == "language", part
    return model.language_backbone()


def need_peft():
    """The package peft; ValueError where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UserError(
            "adapters need the package peft, which is not installed; install it (pip install"
            " 'sparsecut[lora]')"
        ) from None
    return peft
