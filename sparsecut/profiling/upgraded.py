"""What an upgrade costs: parameters, FLOPs and bytes of the base alone and with the shortcuts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from PIL import Image

from ..prompts import prepare_inputs, render_prompt
from ..training.freezing import count_parameters
from ..upgrading import upgrade
from .counting import UNITS
from .fake_models import create_flop_counter


@dataclass(frozen=True)
class UpgradeCost:
    """What one prompt with one image costs in an upgraded model.

    Attributes:
        num_base_parameters: Parameters of the base.
        num_fusion_parameters: Parameters of the shortcuts, which are all that has to be trained.
        base_flops: FLOPs of the prefill of the base alone (`fake_models` says what counts).
        upgraded_flops: FLOPs of the prefill with the shortcuts.
        fusion_bytes: Bytes of the shortcuts' weights, as they are loaded.
        features_bytes: Bytes of the features for the decoder's layers during prefill.
        num_image_tokens: Image tokens of the prompt, the same for both.
        num_prompt_tokens: Tokens of the prompt, the same for both.
    """

    num_base_parameters: int
    num_fusion_parameters: int
    base_flops: int
    upgraded_flops: int
    fusion_bytes: int
    features_bytes: int
    num_image_tokens: int
    num_prompt_tokens: int

    def to_dict(self) -> dict:
        """Plain numbers, for JSON."""
        return asdict(self)


@torch.no_grad()
def count_upgrade(
    model, processor, *, size: tuple[int, int] = (640, 480), text: str = "What is it?"
) -> UpgradeCost:
    """Count the prefill of an upgraded model.

    The model really runs, once without and once with shortcuts, so this works for every family.

    Args:
        model: The upgraded model.
        processor: Its processor.
        size: Width and height of the prompt's grey image, in pixels.
        text: The prompt's text.
    """
    message = {"role": "user", "content": f"{processor.image_token}\n{text}"}
    prompt = render_prompt(processor, [message])
    image = Image.new("RGB", size, (127, 127, 127))
    inputs = prepare_inputs(model, processor, [prompt], [[image]])
    base_inputs = {name: value for name, value in inputs.items() if name != "fine_pixel_values"}
    with create_flop_counter() as base:
        model.base(**base_inputs, logits_to_keep=1)
    with create_flop_counter() as upgraded:
        model(**inputs, logits_to_keep=1)
    num_image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    layers = {shortcut.layer for shortcut in model.plan.shortcuts if shortcut.mix != "base"}
    weights = list(model.fusion.parameters())
    num_values = len(layers) * num_image_tokens * model.config.text_config.hidden_size
    return UpgradeCost(
        num_base_parameters=count_parameters(model.base.parameters()),
        num_fusion_parameters=count_parameters(weights),
        base_flops=base.get_total_flops(),
        upgraded_flops=upgraded.get_total_flops(),
        fusion_bytes=sum(p.numel() * p.element_size() for p in weights),
        features_bytes=num_values * weights[0].element_size(),
        num_image_tokens=num_image_tokens,
        num_prompt_tokens=inputs["input_ids"].shape[1],
    )


def count_upgrades(
    base: str, specs: Mapping[str, str | dict | None], **options
) -> dict[str, UpgradeCost]:
    """Load a base once and count it under each plan.

    Args:
        base: The base, by hub name or folder.
        specs: What `upgrade` takes as a plan, by name.
        **options: The options of `count_upgrade`.

    Returns:
        Costs by name.
    """
    costs = {}
    start = base
    processor = None
    for name, spec in specs.items():
        model, upgraded_processor = upgrade(start, spec, processor=processor)
        costs[name] = count_upgrade(model, upgraded_processor, **options)
        start = model.detach()
        processor = upgraded_processor
    return costs


def format_upgrade_cost(cost: UpgradeCost) -> str:
    """Lay out a cost as lines of text."""
    percent = 100 * cost.num_fusion_parameters / cost.num_base_parameters
    factor = cost.upgraded_flops / cost.base_flops
    rows = {
        "base": f"{cost.num_base_parameters:,} parameters, unchanged",
        "shortcuts": (
            f"{cost.num_fusion_parameters:,} parameters ({percent:.2f} % of the base),"
            f" {_format_bytes(cost.fusion_bytes)}"
        ),
        "prompt": (
            f"{cost.num_prompt_tokens} tokens, {cost.num_image_tokens} of them for one image, as"
            " before"
        ),
        "FLOPs": (
            f"{_format_flops(cost.base_flops)} for the base, {_format_flops(cost.upgraded_flops)}"
            f" with shortcuts ({factor:.3f} times)"
        ),
        "memory": (
            f"{_format_bytes(cost.features_bytes)} of features during prefill, nothing more in the"
            " cache"
        ),
    }
    return "\n".join(f"  {heading:<14} {text}" for heading, text in rows.items())


def _format_bytes(number: int) -> str:
    if number >= 2**20:
        return f"{number / 2**20:,.1f} MiB"
    return f"{number / 2**10:,.1f} KiB"


def _format_flops(number: int) -> str:
    unit, size = next((u for u in UNITS if number >= u[1] / 10), UNITS[-1])
    return f"{number / size:,.3f} {unit}"
