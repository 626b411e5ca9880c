"""What an upgrade costs: parameters, operations and bytes of one prompt, of the base alone and with
the shortcuts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import nn

from ..upgrading import upgrade
from .counting import counter


@dataclass(frozen=True)
class UpgradeCost:
    """One prompt of one picture through an upgraded model.

    num_*_parameters: of the base, and of the shortcuts, which are all that has to be trained.
    *_flops: operations of the prompt pass, of the base alone and with shortcuts (conventions:
    cost.py). fusion_bytes: the shortcuts' weights as they are loaded. features_bytes: what is kept
    for the decoder's layers during the prompt pass. num_image_tokens: the same for both.
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
        """Plain numbers: what JSON holds."""
        return asdict(self)


@torch.no_grad()
def count_upgrade(
    model, processor, *, size: tuple[int, int] = (640, 480), text: str = "What is it?"
) -> UpgradeCost:
    """Count one prompt pass of an upgraded model with its processor, on a grey picture of `size`
    (width, height) in pixels.

    The model is really run, once without and once with shortcuts, so this works for every family
    and takes two prompt passes.
    """
    from ..prompts import prepare_inputs, render_prompt

    prompt = render_prompt(
        processor, [{"role": "user", "content": f"{processor.image_token}\n{text}"}]
    )
    inputs = prepare_inputs(model, processor, [prompt], [[Image.new("RGB", size, (127, 127, 127))]])
    own = {name: value for name, value in inputs.items() if name != "fine_pixel_values"}
    with counter() as base:
        model.base(**own, logits_to_keep=1)
    with counter() as upgraded:
        model(**inputs, logits_to_keep=1)
    tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    layers = len({s.layer for s in model.plan.shortcuts if s.mix != "base"})
    weights = list(model.fusion.parameters())
    width = model.config.text_config.hidden_size
    return UpgradeCost(
        num_base_parameters=_number(model.base),
        num_fusion_parameters=_number(model.fusion),
        base_flops=base.get_total_flops(),
        upgraded_flops=upgraded.get_total_flops(),
        fusion_bytes=sum(p.numel() * p.element_size() for p in weights),
        features_bytes=layers * tokens * width * weights[0].element_size(),
        num_image_tokens=tokens,
        num_prompt_tokens=inputs["input_ids"].shape[1],
    )


def count_upgrades(base: str, specs: dict[str, str | dict], **prompt) -> dict[str, UpgradeCost]:
    """Load a base once and count it under each plan (name -> what `upgrade` takes); see
    `count_upgrade`.
    """
    counts, given, processor = {}, base, None
    for name, spec in specs.items():
        model, of_plan = upgrade(given, spec, processor=processor)
        counts[name] = count_upgrade(model, of_plan, **prompt)
        given, processor = model.detach(), of_plan
    return counts


def describe_cost(cost: UpgradeCost) -> str:
    """The cost as lines of text."""
    share = 100 * cost.num_fusion_parameters / cost.num_base_parameters
    return "\n".join(
        [
            f"  base           {cost.num_base_parameters:,} parameters, left as they are",
            (
                f"  shortcuts      {cost.num_fusion_parameters:,} parameters ({share:.2f} % of the"
                f" base), {_bytes(cost.fusion_bytes)}"
            ),
            (
                f"  prompt         {cost.num_prompt_tokens} tokens, {cost.num_image_tokens} of them for"
                " one picture, as before"
            ),
            (
                f"  operations     {_flops(cost.base_flops)} for the base,"
                f" {_flops(cost.upgraded_flops)} with shortcuts"
                f" ({cost.upgraded_flops / cost.base_flops:.3f} times)"
            ),
            (
                f"  memory         {_bytes(cost.features_bytes)} of features during the prompt pass,"
                " nothing more in the cache"
            ),
        ]
    )


def _number(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _bytes(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number >= 2**20 else f"{number / 2**10:,.1f} KiB"


def _flops(number: int) -> str:
    unit, size = next(
        (u for u in (("TFLOP", 1e12), ("GFLOP", 1e9)) if number >= u[1] / 10), ("MFLOP", 1e6)
    )
    return f"{number / size:,.3f} {unit}"
