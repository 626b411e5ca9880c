"""Another plan for a model that is trained already, which keeps the projector of its input."""

from __future__ import annotations

import copy
from typing import Any

from .building import join_parts
from .configuration import SparseCutConfig
from .methods import make_plan
from .modeling import SparseCutForConditionalGeneration
from .plan import Plan, Shortcut
from .schema import UserError


def replan(
    model: SparseCutForConditionalGeneration, processor: Any, plan: str | dict | Plan
) -> tuple[SparseCutForConditionalGeneration, Any]:
    """Give a model that `build` made, and that is trained, another plan.

    Encoder and language model are kept, and so are the weights of the shortcut into the input. All
    else of the fusion is new. Where the new plan shares its projector, every shortcut begins with
    the trained one: the way CLI (arXiv 2601.10710) begins. Where its gates start at zero, the new
    model answers as the old one did, bit for bit. The old model must not be used any more.

    Args:
        model: The trained model.
        processor: Its processor. It is not changed.
        plan: The new plan: a method's name, a method with options, or a plan.

    Returns:
        (model, processor) with the new plan, the model in evaluation mode.

    Raises:
        UserError: The model was upgraded, or the new plan's input is not that of the old one.
    """
    if not isinstance(model, SparseCutForConditionalGeneration):
        raise UserError(
            f"replan takes a model that `build` made, but this is a {type(model).__name__}; give"
            " other shortcuts to an upgraded model's base (model.detach()) by sparsecut.upgrade"
        )
    new = make_plan(plan, model.config.vision_depth, model.config.language_depth)
    _check_input(model.plan, new, model.config.vision_depth)
    config = SparseCutConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        plan=new.to_dict(),
        view_size=model.config.view_size,
        image_token_id=model.config.image_token_id,
        mask_image_token=model.config.mask_image_token,
    )
    trained = model.fusion.get_path(model.fusion.main)
    made = join_parts(config, model.vision_tower, model.language_model)
    made.fusion.to(trained.linear_1.weight)
    made.fusion.get_path(made.fusion.main).load_state_dict(trained.state_dict())
    made.generation_config = model.generation_config
    processor = copy.deepcopy(processor)
    processor.tiles = new.tiles
    return made.eval(), processor


def _check_input(old: Plan, new: Plan, depth: int) -> None:
    """Refuse a plan whose input would not read what the trained projector was trained on."""
    pairs = {}
    for name, plan in (("model", old), ("plan", new)):
        shortcut = plan.shortcuts[plan.input_number]
        pairs[name] = _describe_input(plan, shortcut, depth)
    if pairs["model"] != pairs["plan"]:
        raise UserError(
            f"the trained model feeds its input by {pairs['model']}, but the new plan by"
            f" {pairs['plan']}; replan keeps the input's projector, so use a plan that reads the"
            " same, for example with the same norm"
        )


def _describe_input(plan: Plan, shortcut: Shortcut, depth: int) -> str:
    taps = []
    for group in shortcut.tap_groups:
        resolved = [tap % (depth + 1) for tap in group]
        taps.append(resolved if len(resolved) > 1 else resolved[0])
    grains = 1 if shortcut.is_coarse else plan.num_grains
    grain = f" grain {shortcut.grain}," if shortcut.grain else ""
    return f"mix={shortcut.mix!r} of the taps {taps},{grain} {grains} grains, norm={plan.norm}"
